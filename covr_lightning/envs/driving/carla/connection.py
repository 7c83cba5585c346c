"""One CARLA server in synchronous mode, and everything this process changes there."""

from __future__ import annotations

import atexit
import hashlib
import itertools
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from covr_lightning.envs.driving.carla.client import answers, check_versions, import_carla
from covr_lightning.envs.driving.carla.server import CarlaServer
from covr_lightning.envs.driving.carla.traffic import TrafficDriver
from covr_lightning.envs.driving.scenario import Scenario
from covr_lightning.envs.driving.simulator import SimulatorLost
from covr_lightning.errors import ConfigError, EnvironmentLost

logger = logging.getLogger(__name__)

#: Loading a town takes minutes on a slow disk, and the server answers nothing meanwhile.
LOAD_SECONDS = 180.0
#: How long a client's threads get to be done with what the server sent last.
QUIET_SECONDS = 0.1
#: Waits between attempts to reconnect double from one second up to this.
LONGEST_WAIT_SECONDS = 30.0
#: How long a server is watched on which actors of another machine's process are.
FOREIGN_SECONDS = 3.0
#: How long the traffic manager may take to sign off at a server that answers.
SIGN_OFF_SECONDS = 6.0
TAG = "covr"
_numbers = itertools.count(1)


class CarlaConnection:
    """A server that plays one scenario's town.

    Actors spawned through it carry a role name of this process, so that none is forgotten: not after Ctrl-C, and not
    those of a process that was killed (the next one to connect removes them). Settings are put back when it closes.

    Args:
        scenario: Its town is loaded if the server shows another one.
        host: Where the server listens.
        port: Where the server listens.
        timeout_seconds: Of every call.
        tm_port: Port of the traffic manager; by default a free one.
        server: The server, if it is ours: then it is restarted when it dies, and ended on closing.
    """

    def __init__(
        self,
        scenario: Scenario,
        host: str = "127.0.0.1",
        port: int = 2000,
        timeout_seconds: float = 20.0,
        tm_port: int | None = None,
        server: CarlaServer | None = None,
    ) -> None:
        self.carla = import_carla()
        self.scenario = scenario
        self.host, self.port = host, port
        self.timeout_seconds = timeout_seconds
        self.tm_port = tm_port
        self.server = server
        self.tag = f"{TAG}-{_machine()}-{os.getpid()}-{_started(os.getpid())}-{next(_numbers)}"
        self.alive = False
        #: Who plays on it now; see :meth:`lend`.
        self.tenant: object | None = None
        self._evict: Callable[[], None] = lambda: None
        self._users = 0
        self._settings: Any = None
        self._traffic: TrafficDriver | None = None
        self.client: Any = None
        self.world: Any = None
        self.map: Any = None

    @property
    def address(self) -> str:
        """Host and port."""
        return f"{self.host}:{self.port}"

    # Coming and going -------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Connect for the first time.

        Raises:
            ConfigError: No server answers within the timeout, or it cannot play the scenario.
        """
        self._users += 1
        if self.alive:
            return
        self.abandon()
        atexit.register(self._shut)
        try:
            if self.server and not self.server.running:
                self.server.start()
            deadline = time.monotonic() + self.timeout_seconds
            while not answers(self.host, self.port):
                if time.monotonic() > deadline:
                    raise SimulatorLost("nothing listens there")
                time.sleep(0.2)
            self._connect()
        except SimulatorLost as error:
            self.close()
            raise ConfigError(self._nobody_there()) from error
        except BaseException:
            self.close()
            raise

    def _nobody_there(self) -> str:
        config = "road_gp.yaml" if "pedestrian" in self.scenario.task else "road_hw.yaml"
        return (
            f"No CARLA server answered at {self.address} within {self.timeout_seconds:g} s (data.env.host, "
            f"data.env.port): start one with `CarlaUE4.sh -RenderOffScreen -carla-rpc-port={self.port}`, or train "
            f"without one with `covr fit --config {config}`."
        )

    def reopen(self, attempts: int) -> Iterator[None]:
        """Connect again, and again with growing waits: one item per attempt that connected.

        Args:
            attempts: How often at most.

        Raises:
            EnvironmentLost: After the last attempt.
        """
        for attempt in range(attempts + 1):
            try:
                if not self.alive:
                    self.abandon()
                    # A server of ours that is there but does not answer hangs.
                    if self.server and (attempt > 0 or not self.server.running):
                        self._restart(self.server)
                    self._connect()
            except SimulatorLost as error:
                logger.warning("No connection to CARLA at %s: %s.", self.address, error)
            else:
                yield
            if attempt < attempts:
                time.sleep(min(2.0**attempt, LONGEST_WAIT_SECONDS))
        raise EnvironmentLost(
            f"The CARLA server at {self.address} did not come back in {attempts + 1} attempts (data.env.reconnects: "
            f"{attempts}); start it again"
        )

    def _restart(self, server: CarlaServer) -> None:
        try:
            server.start()
        except ConfigError as error:
            raise SimulatorLost(str(error)) from error

    def _connect(self) -> None:
        if not answers(self.host, self.port):
            raise SimulatorLost("nothing listens there")
        client = self.carla.Client(self.host, self.port)
        client.set_timeout(self.timeout_seconds)
        with self.guard():
            check_versions(client)
            world = client.get_world()
            leftovers = self._leftovers(world)
            shows_town = self._shows_town(client, world)
            settings = world.get_settings()
            if self._settings is None or not settings.synchronous_mode:  # else they are those that we gave it
                self._settings = _to_put_back(world.get_settings())
            settings.synchronous_mode = True
            settings.no_rendering_mode = False
            settings.fixed_delta_seconds = self.scenario.tick_seconds
            settings.max_substep_delta_time = 0.01
            settings.max_substeps = max(10, round(self.scenario.tick_seconds / 0.01))
            self.client, self.world, self.alive = client, world, True
            world.apply_settings(settings)
            if not shows_town:
                self._load_town()
                self.world.apply_settings(settings)  # large maps bring some of their own
                leftovers = []
            self.map = self.world.get_map()
            self.destroy(leftovers)

    def _leftovers(self, world: Any) -> list[int]:
        """Ids of the actors that processes of ours left behind; a process that still drives here stops us."""
        frame = self._first_tick(world) if world.get_settings().synchronous_mode else None
        leftovers, elsewhere = [], ""
        for actor in world.get_actors():
            role = actor.attributes.get("role_name", "")
            if not role.startswith(f"{TAG}-"):
                continue
            leftovers.append(actor.id)
            machine, pid, started = (role.split("-") + ["", "", ""])[1:4]
            if role == self.tag:
                continue
            if machine != _machine():
                elsewhere = pid
            elif _started(int(pid)) == started:
                raise self._taken(f"Process {pid} drives")
        # Whether a process of another machine, or of another container, lives cannot be asked; whether it ticks, can.
        if elsewhere and frame is not None:
            time.sleep(FOREIGN_SECONDS)
            if self._first_tick(world) != frame + 1:
                raise self._taken(f"Process {elsewhere} of another machine drives")
        return leftovers

    def _taken(self, who: str) -> ConfigError:
        return ConfigError(
            f"{who} on the CARLA server at {self.address} already; two cannot share one: start a second server and "
            "give its port (data.env.port)."
        )

    def _first_tick(self, world: Any) -> int:
        """Until a tick a new client sees nobody; it may miss the first, while it still subscribes to the state."""
        tries = 4
        for _ in range(tries - 1):
            with suppress(RuntimeError):
                return int(world.tick(self.timeout_seconds / tries))
        return int(world.tick(self.timeout_seconds / tries))

    def _shows_town(self, client: Any, world: Any) -> bool:
        """Whether the server shows the scenario's town; if not, it has to have it."""
        town = self.scenario.carla.map
        if _town(world.get_map().name) in (town, f"{town}_Opt"):
            return True
        names = {_town(name) for name in client.get_available_maps()}
        if town not in names:
            raise ConfigError(
                f"The CARLA server at {self.address} has no map {town}, which the scenario {self.scenario.name} needs; "
                f"it has {', '.join(sorted(names))}."
            )
        return False

    def _load_town(self) -> None:
        """Load the scenario's town on a server in synchronous mode.

        Loading makes the client unsubscribe from the world's state, and subscribe anew. It closes the socket without
        asking the thread that reads from it (LibCarla 0.9.16, streaming/detail/tcp/Client.cpp, `Stop`). A state that
        arrives just then kills the process: a server in asynchronous mode sends one as it answers, and 8 of 460 calls
        of load_world ended so. In synchronous mode nothing is sent between two ticks, and the load keeps that mode.
        """
        town = self.scenario.carla.map
        logger.info("Loading %s …", town)
        time.sleep(QUIET_SECONDS)
        self.client.set_timeout(max(LOAD_SECONDS, self.timeout_seconds))
        try:
            self.client.load_world(town, reset_settings=False)
        finally:
            self.client.set_timeout(self.timeout_seconds)
        self.world = self.client.get_world()

    def abandon(self) -> None:
        """Let go of a server that is lost. Nothing is asked of it any more."""
        self.alive = False
        self._end_traffic()
        self.client = self.world = self.map = None

    def close(self) -> None:
        """One user fewer; the last one leaves the server as it was. Safe to call too often."""
        self._users -= 1
        if self._users <= 0:
            self._shut()

    def _shut(self) -> None:
        self._users = 0
        atexit.unregister(self._shut)
        self._evict()
        self._evict, self.tenant = (lambda: None), None
        self._end_traffic()
        if self.alive:
            with suppress(RuntimeError):
                self.world = self.client.get_world()  # another one, if loading a town was interrupted
                self.tick_bare()  # shows those that a broken-off start left behind
                self.destroy([a.id for a in self.world.get_actors() if a.attributes.get("role_name") == self.tag])
                self.world.apply_settings(self._settings)
        self.abandon()
        if self.server:
            self.server.stop()

    def lend(self, tenant: object, evict: Callable[[], None]) -> None:
        """Give the world to one simulator; whoever had it is sent away.

        Args:
            tenant: The new one.
            evict: Called when it has to go.
        """
        if self.tenant is not tenant:
            self._evict()
        self.tenant, self._evict = tenant, evict

    # Calls ------------------------------------------------------------------------------------------------------------

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Whatever the client's library throws inside means that the server is lost."""
        if self.server and not self.server.running:
            self.alive = False
            raise SimulatorLost("the server's process has ended")
        try:
            yield
        except SimulatorLost:
            self.alive = False
            raise
        except RuntimeError as error:
            self.alive = False
            raise SimulatorLost(str(error)) from error

    def send(self, commands: list[Any]) -> None:
        """Have commands carried out before the next tick."""
        if commands:
            self.client.apply_batch_sync(commands, False)

    def tick_bare(self) -> int:
        """Tick without the traffic manager."""
        return int(self.world.tick(self.timeout_seconds))

    def tick(self) -> int:
        """Tick; the traffic manager, if it drives anybody, decides what they do next.

        Returns:
            The frame.
        """
        return self._traffic.tick() if self._traffic else self.tick_bare()

    def drive(self, speeds: Mapping[int, float], seed: int, lane_changes: bool) -> None:
        """Have the traffic manager drive these vehicles; see :meth:`TrafficDriver.drive`."""
        if not speeds:
            return
        if self._traffic is None:
            self._traffic = TrafficDriver(self.host, self.port, self.tm_port, self.timeout_seconds)
        self._traffic.drive(speeds, seed, lane_changes)

    def rest(self) -> None:
        """The traffic manager lets go of its vehicles."""
        if self._traffic:
            self._traffic.rest()

    def destroy(self, actors: Iterable[int]) -> None:
        """Destroy actors by id, and tick so that the client knows."""
        commands = [self.carla.command.DestroyActor(actor) for actor in actors]
        if commands:
            self.send(commands)
            self.tick_bare()

    def _end_traffic(self) -> None:
        traffic, self._traffic = self._traffic, None
        if traffic:
            traffic.close(SIGN_OFF_SECONDS if self.alive else 1.0)


def _to_put_back(settings: Any) -> Any:
    """The server's own settings, but never a synchronous mode that waits for somebody who is gone."""
    seconds = settings.fixed_delta_seconds
    # Where it is unset, the client hands back an arbitrary tiny number.
    if settings.synchronous_mode or (seconds is not None and seconds < 1e-4):
        settings.fixed_delta_seconds = None
    settings.synchronous_mode = False
    return settings


def _town(name: str) -> str:
    return name.rsplit("/", 1)[-1]


@cache
def _machine() -> str:
    """Eight digits that tell this machine, since it was started, or this container, from others.

    A container may have its machine's name; that process numbers mean others in it is told by their namespace.
    """
    boot = namespace = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        namespace = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{socket.gethostname()} {boot} {namespace}".encode()).hexdigest()[:8]


def _started(pid: int) -> str:
    """When a living process of this machine was started; another one that later gets its number has another time."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else numbers[18]
