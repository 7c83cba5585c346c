"""The calls of a CARLA server, answered from a :class:`World`."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

from covr_lightning.envs.driving.scenario import Scenario
from tests.envs.carla.loopback import streams
from tests.envs.carla.loopback.blueprints import definitions
from tests.envs.carla.loopback.opendrive import opendrive
from tests.envs.carla.loopback.painter import Painter
from tests.envs.carla.loopback.rpc import Raw, RpcError, RpcServer, Void, refusal, reply
from tests.envs.carla.loopback.streams import EPISODE_STREAM, Stamp, StreamServer
from tests.envs.carla.loopback.world import HALF_HEIGHT, HALF_WALKER, Actor, Place, World

#: Asynchronous servers tick by themselves, this often.
BEAT_SECONDS = 0.05
#: A fresh server shows this town, so that a client has to load the scenario's.
FIRST_MAP = "Town10HD_Opt"
SPEED_LIMIT_KMH = 90.0
#: Places of the fields in the settings on the wire.
SYNCHRONOUS, FIXED_DELTA = 0, 2


def initial_settings() -> list[Any]:
    """Settings of a fresh server: asynchronous, variable time steps."""
    return [False, False, [False], True, 0.01, 10, 0.0, False, 3000.0, 2000.0, False]


class LoopbackServer:
    """One server on a port and the next one.

    Args:
        scenario: Its road is the map under its town's name.
        rpc: Listening socket for calls.
        stream: Listening socket for sensor streams.
        painter: Paints what a camera sees.
        lag_seconds: Images are sent so much later than the tick is answered.
        release: The version it reports.
    """

    def __init__(
        self,
        scenario: Scenario,
        rpc: socket.socket,
        stream: socket.socket,
        painter: Painter,
        lag_seconds: float = 0.0,
        release: str = "0.9.16",
    ) -> None:
        self.scenario = scenario
        self.painter = painter
        self.lag_seconds = lag_seconds
        self.release = release
        self.streams = StreamServer(stream)
        self.rpc = RpcServer(rpc, self)
        self.world = World()
        self.settings = initial_settings()
        self.weather = [60.0, 0.0, 0.0, 10.0, -1.0, 45.0, 3.0, 0.75, 0.1, 0.0, 1.0, 0.03, 0.0331, 0.0]
        self.map = FIRST_MAP
        self.episode = 7
        self.managers: dict[int, str] = {}
        self._lock = threading.RLock()

    def run(self) -> None:
        """Serve for ever."""
        self.streams.start()
        self.rpc.start()
        while True:
            time.sleep(BEAT_SECONDS)
            with self._lock:
                if not self.settings[SYNCHRONOUS]:
                    self._tick(BEAT_SECONDS)

    # Ticks ----------------------------------------------------------------------------------------------------------

    def _tick(self, dt: float) -> int:
        collisions = self.world.advance(dt)
        stamp = Stamp(self.world.frame, self.world.seconds)
        for event in collisions:
            for sensor in self._sensors("sensor.other.collision"):
                if sensor.parent == event.actor:
                    one, other = self.world.actors[event.actor], self.world.actors[event.other]
                    payload = streams.collision(self._wire(one), self._wire(other), event.impulse)
                    self.streams.send(sensor.stream, streams.COLLISION, stamp, payload, one.place.values)
        for sensor in self._sensors("sensor.camera.rgb"):
            self._shoot(sensor, stamp)
        self._push_state()
        return stamp.frame

    def _sensors(self, name: str) -> list[Actor]:
        return [actor for actor in self.world.actors.values() if actor.name == name]

    def _shoot(self, camera: Actor, stamp: Stamp) -> None:
        if camera.parent not in self.world.actors:
            return
        width, height = int(camera.attributes["image_size_x"]), int(camera.attributes["image_size_y"])
        pixels = self.painter.paint(self.world, self.world.actors[camera.parent], width, height)
        payload = streams.image(width, height, float(camera.attributes["fov"]), pixels)
        send = (camera.stream, streams.CAMERA, stamp, payload, camera.place.values)
        if self.lag_seconds:
            threading.Timer(self.lag_seconds, self.streams.send, send).start()
        else:
            self.streams.send(*send)

    def _push_state(self) -> None:
        delta = self.settings[FIXED_DELTA][1] if self.settings[FIXED_DELTA][0] else BEAT_SECONDS
        message = streams.episode_header(self.episode, time.time(), delta)
        for actor in self.world.actors.values():
            extra = b""
            if actor.is_vehicle:
                extra = streams.vehicle_state(actor.throttle, actor.steer, actor.brake, SPEED_LIMIT_KMH)
            place = self._world_place(actor)
            message += streams.actor_state(actor.number, place.values, actor.velocity, extra)
        self.streams.send(EPISODE_STREAM, streams.EPISODE, Stamp(self.world.frame, self.world.seconds), message)

    def _world_place(self, actor: Actor) -> Place:
        return self.world.actors[actor.parent].place if actor.parent in self.world.actors else actor.place

    # The episode ----------------------------------------------------------------------------------------------------

    def rpc_version(self) -> str:
        return self.release

    def rpc_get_episode_info(self) -> Any:
        return [self.episode, [self.streams.token(EPISODE_STREAM)]]

    def rpc_get_available_maps(self) -> list[str]:
        return [f"/Game/Carla/Maps/{name}" for name in (FIRST_MAP, self.scenario.carla.map)]

    def rpc_load_new_episode(self, name: str, reset_settings: bool = True, layers: int = 0) -> Any:
        town = name.rsplit("/", 1)[-1]
        if town not in (FIRST_MAP, self.scenario.carla.map):
            raise RpcError(f"Map {name!r} not found")
        with self._lock:
            self.map, self.episode = town, self.episode + 1
            frame, self.world = self.world.frame, World()
            self.world.frame = frame + 1
            if reset_settings:
                self.settings = initial_settings()
            if not self.settings[SYNCHRONOUS]:  # as CARLA does, which sends nothing between two ticks
                self._push_state()
        return Void

    def rpc_get_episode_settings(self) -> Any:
        return self.settings

    def rpc_set_episode_settings(self, settings: list[Any]) -> int:
        with self._lock:
            self.settings = settings
            self._push_state()
            return self.world.frame

    def rpc_tick_cue(self) -> int:
        with self._lock:
            fixed = self.settings[FIXED_DELTA]
            return self._tick(fixed[1] if fixed[0] else BEAT_SECONDS)

    def rpc_get_map_info(self) -> Any:
        return [f"Carla/Maps/{self.map}", [[[0.0, 0.0, 0.5], [0.0, 0.0, 0.0]]]]

    def rpc_get_required_files(self, *_: Any) -> list[str]:
        return []

    def rpc_get_map_data(self) -> str:
        return opendrive(self.scenario)

    def rpc_get_weather_parameters(self) -> Any:
        return self.weather

    def rpc_set_weather_parameters(self, weather: list[Any]) -> Any:
        self.weather = weather
        return Void

    # Actors ---------------------------------------------------------------------------------------------------------

    def _wire(self, actor: Actor) -> list[Any]:
        token = self.streams.token(actor.stream) if actor.stream else b""
        return [actor.number, actor.parent, actor.description, self._box(actor), b"", token]

    def _box(self, actor: Actor) -> list[Any]:
        kind = actor.kind
        half = HALF_WALKER if actor.is_walker else HALF_HEIGHT
        extent = [kind.length / 2, kind.width / 2, half] if kind else [0.0, 0.0, 0.0]
        return [[0.0, 0.0, half], extent, [0.0, 0.0, 0.0], 0]

    def rpc_get_actor_definitions(self) -> list[Any]:
        return definitions()

    def rpc_get_sensor_token(self, stream: int) -> Any:
        return [self.streams.token(stream)]

    def rpc_spawn_actor(self, description: list[Any], transform: Any) -> list[Any]:
        with self._lock:
            return self._wire(self.world.spawn(description, Place.decode(transform)))

    def rpc_spawn_actor_with_parent(
        self, description: list[Any], transform: Any, parent: int, attachment: int = 0, bone: str = ""
    ) -> list[Any]:
        with self._lock:
            return self._wire(self.world.spawn(description, Place.decode(transform), parent))

    def rpc_get_actors_by_id(self, numbers: list[int]) -> list[Any]:
        with self._lock:
            return [self._wire(self.world.actors[n]) for n in numbers if n in self.world.actors]

    def rpc_get_actor_bounding_box(self, number: int) -> Any:
        return self._box(self._actor(number))

    def rpc_destroy_actor(self, number: int) -> bool:
        with self._lock:
            if not self.world.destroy(number):
                raise RpcError("unable to destroy actor: not found")
            return True

    def _actor(self, number: int) -> Actor:
        if number not in self.world.actors:
            raise RpcError(f"actor {number} not found")
        return self.world.actors[number]

    def rpc_apply_control_to_vehicle(self, number: int, control: list[Any]) -> Any:
        actor = self._actor(number)
        actor.throttle, actor.steer, actor.brake = control[:3]
        return Void

    def rpc_apply_control_to_walker(self, number: int, control: list[Any]) -> Any:
        actor = self._actor(number)
        if actor.died:
            raise RpcError("unable to apply control: walker is dead")
        direction, actor.wanted = control[:2]
        actor.direction = (direction[0], direction[1])
        return Void

    def rpc_set_actor_autopilot(self, number: int, enabled: bool) -> Any:
        self._actor(number).autopilot = enabled
        return Void

    def rpc_set_actor_simulate_physics(self, number: int, enabled: bool) -> Any:
        return Void

    def rpc_set_actor_transform(self, number: int, transform: Any) -> Any:
        self._actor(number).place = Place.decode(transform)
        return Void

    def rpc_apply_batch(self, commands: list[Any], do_tick: bool = False) -> Raw:
        with self._lock:
            answers = [self._command(command[0], 0) for command in commands]
            if do_tick:
                self.rpc_tick_cue()
        return Raw(answers)

    def _command(self, command: list[Any], spawned: int) -> Any:
        """One command of a batch; in what shall be done after a spawn, actor 0 is the spawned one."""
        kind, arguments = command
        try:
            if kind == 0:
                description, transform, parent, _attachment, _bone, after = arguments
                actor = self.world.spawn(description, Place.decode(transform), parent[1] if parent[0] else 0)
                for follower in after:
                    self._command(follower[0], actor.number)
                return reply(actor.number)
            call = COMMANDS.get(kind)
            number = arguments[0] or spawned
            if call:
                getattr(self, f"rpc_{call}")(number, *arguments[1:2])
            return reply(number)
        except RpcError as error:
            return refusal(str(error))

    # Traffic managers: they run in the client and only announce themselves here -------------------------------------

    def rpc_is_traffic_manager_running(self, port: int) -> bool:
        return port in self.managers

    def rpc_get_traffic_manager_running(self, port: int) -> Any:
        return [self.managers.get(port, ""), port if port in self.managers else 0]

    def rpc_add_traffic_manager_running(self, address: list[Any]) -> bool:
        self.managers[address[1]] = address[0]
        return True

    def rpc_destroy_traffic_manager(self, port: int) -> bool:
        return self.managers.pop(port, None) is not None

    def rpc_query_lights_state(self, *_: Any) -> list[Any]:
        return []

    def rpc_get_light_state(self, *_: Any) -> list[Any]:
        return []

    def rpc_get_vehicle_light_states(self) -> list[Any]:
        return []

    def rpc_reset_all_traffic_lights(self) -> Any:
        return Void


#: Commands of a batch by their number in CARLA's list; others are accepted and have no effect.
COMMANDS = {
    1: "destroy_actor",
    2: "apply_control_to_vehicle",
    4: "apply_control_to_walker",
    6: "set_actor_transform",
    16: "set_actor_autopilot",
}
