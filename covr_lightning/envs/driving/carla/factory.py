"""CARLA as it is named in a YAML."""

from __future__ import annotations

import copy
from pathlib import Path

from covr_lightning import processes
from covr_lightning.envs.driving.carla.connection import CarlaConnection
from covr_lightning.envs.driving.carla.server import CarlaServer
from covr_lightning.envs.driving.carla.simulator import CarlaSimulator
from covr_lightning.envs.driving.env import DrivingFactory, RepeatDistance, RepeatReward
from covr_lightning.envs.driving.simulator import DrivingSimulator
from covr_lightning.errors import ConfigError, check_not_negative, check_positive


class Carla(DrivingFactory):
    """A driving scenario on CARLA 0.9.16.

    Training and evaluation are two environments, and two clients in synchronous mode on one server would tick each
    other. So which server an environment gets depends on what is set:

    - `carla_root`: each environment starts a server of its own there, on free ports, and ends it on closing.
    - `port` is a list: the environments that collect take its first ports, by their numbers among all of the run; the
      evaluation's take its last, one for each process of the run. The servers run already.
    - `port` is one number: one environment that collects, in the trainer's process, shares that server with the
      evaluation's. An evaluation that begins in the middle of a training episode takes the server over, and that
      episode is cut off (truncated, not terminated).

    Args:
        scenario: Name of a shipped scenario, or path of a YAML file.
        action_repeat: Simulator ticks (environment steps) per agent step.
        frame_stack: Frames in one observation.
        repeat_reward: See :class:`DrivingFactory`.
        repeat_distance: See :class:`DrivingFactory`.
        host: Where the servers listen.
        port: Where a server listens, or a list with one port per environment, those for evaluation last.
        carla_root: Folder of a CARLA installation (the one with ``CarlaUE4.sh``), to start servers from it.
        server_arguments: More of these servers' command line, such as ``-quality-level=Low``.
        graphics_adapters: GPUs that these servers draw on, in turn by the number of their environment; by default each
            takes CARLA's own choice, which is the same one for all.
        timeout_seconds: How long the server may take to answer before it counts as lost.
        reconnects: How often a reset tries to get a lost server back, with waits of 1, 2, 4 … up to 30 s; a server of
            our own is restarted.
        tm_port: Port of the traffic manager; by default a free one from 6000 above the server's port. Only for a single
            server.

    Raises:
        ConfigError: These settings exclude each other.
    """

    def __init__(
        self,
        scenario: str = "highway",
        action_repeat: int = 4,
        frame_stack: int = 3,
        repeat_reward: RepeatReward = "sum",
        repeat_distance: RepeatDistance = "integrated",
        host: str = "127.0.0.1",
        port: int | list[int] = 2000,
        carla_root: str | Path | None = None,
        server_arguments: list[str] | None = None,
        graphics_adapters: list[int] | None = None,
        timeout_seconds: float = 20.0,
        reconnects: int = 5,
        tm_port: int | None = None,
    ) -> None:
        super().__init__(scenario, action_repeat, frame_stack, repeat_reward, repeat_distance)
        if tm_port is not None and (carla_root is not None or isinstance(port, list)):
            raise ConfigError(
                f"data.env.tm_port is {tm_port}, but there are several servers (data.env.carla_root, or a list as "
                "data.env.port): leave it null, and each gets a free port."
            )
        for name, value in (("server_arguments", server_arguments), ("graphics_adapters", graphics_adapters)):
            if value and carla_root is None:
                raise ConfigError(
                    f"data.env.{name} is {value!r}, which is for servers that the run starts itself; set "
                    "data.env.carla_root, or give it to the servers that run already."
                )
        check_positive("data.env.timeout_seconds", timeout_seconds)
        check_not_negative("data.env.reconnects", reconnects)
        given = {"port": port if isinstance(port, list) else [port], "tm_port": [] if tm_port is None else [tm_port]}
        for name, ports in given.items():
            for one in ports:
                if not 0 < one < 65536:
                    raise ConfigError(f"data.env.{name} is {one}; a port can be 1 to 65535.")
        self.host = host
        self.port = port
        self.carla_root = carla_root
        self.server_arguments = server_arguments or []
        self.graphics_adapters = graphics_adapters or []
        self._number = 0
        self.timeout_seconds = timeout_seconds
        self.reconnects = reconnects
        self.tm_port = tm_port
        self._shared: CarlaConnection | None = None
        self._lent: dict[int, CarlaSimulator] = {}

    def placed(self, number: int | None, envs: int, together: bool) -> Carla:
        """The same with the server of one of a run's environments; see the class.

        Raises:
            ConfigError: There are fewer servers than environments.
        """
        evaluating = processes.count()
        if self.carla_root is not None:
            mine = copy.copy(self)
            mine._number = envs + processes.number() if number is None else number
            return mine
        collecting = f"{envs} environment{'s collect' if envs > 1 else ' collects'}"
        needed = (
            f"give a list of {envs + evaluating} ports, the last {'' if evaluating == 1 else f'{evaluating} '}for "
            "evaluation, or data.env.carla_root."
        )
        if not isinstance(self.port, list):
            if evaluating > 1 or (number is not None and (envs > 1 or not together)):
                where = "" if together else " in processes of their own"
                raise ConfigError(f"data.env.port is {self.port}, one server, but {collecting}{where}: {needed}")
            return self
        if len(self.port) < (evaluating if number is None else envs + evaluating):
            raise ConfigError(
                f"data.env.port has {len(self.port)} servers ({', '.join(map(str, self.port))}), but {collecting} and "
                f"{evaluating} evaluate{'s' if evaluating == 1 else ''}: {needed}"
            )
        mine = copy.copy(self)
        mine.port = self.port[len(self.port) - evaluating + processes.number() if number is None else number]
        return mine

    def simulator(self, seed: int) -> DrivingSimulator:
        """Connect to the server that is this environment's; see the class.

        Args:
            seed: Of starts, traffic, pedestrians and looks.

        Raises:
            ConfigError: No server answers, or none is left for this environment.
        """
        if self.carla_root is not None:
            server = CarlaServer(self.carla_root, arguments=self.arguments_of_server())
            return CarlaSimulator(self._connection(server.port, server), seed, self.reconnects)
        if isinstance(self.port, list):
            port = self._next_port(self.port)
            self._lent[port] = CarlaSimulator(self._connection(port), seed, self.reconnects)
            return self._lent[port]
        if self._shared is None:
            self._shared = self._connection(self.port)
        return CarlaSimulator(self._shared, seed, self.reconnects)

    def arguments_of_server(self) -> list[str]:
        """More of the command line of this environment's own server."""
        adapters = self.graphics_adapters
        adapter = [f"-graphicsadapter={adapters[self._number % len(adapters)]}"] if adapters else []
        return [*adapter, *self.server_arguments]

    def _connection(self, port: int, server: CarlaServer | None = None) -> CarlaConnection:
        host = server.host if server else self.host
        return CarlaConnection(self.scenario, host, port, self.timeout_seconds, self.tm_port, server)

    def _next_port(self, ports: list[int]) -> int:
        for port in ports:
            if port not in self._lent or self._lent[port].closed:
                return port
        raise ConfigError(
            f"data.env.port has {len(ports)} servers ({', '.join(map(str, ports))}), but there are more "
            "environments: give one port each for training and evaluation, or a single number to share one server."
        )
