"""A driving scenario in CARLA, behind the same protocol as the built-in road."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import numpy as np

from covr_lightning.envs.driving.carla.cast import Cast, Casting, Walker
from covr_lightning.envs.driving.carla.client import weather
from covr_lightning.envs.driving.carla.connection import CarlaConnection
from covr_lightning.envs.driving.carla.places import on_road
from covr_lightning.envs.driving.carla.view import look
from covr_lightning.envs.driving.simulator import DrivingSimulator, RoadView, SimulatorLost, SimulatorTaken, Tick

logger = logging.getLogger(__name__)

#: Ticks after a spawn in which bodies come to rest on their wheels and the camera's exposure adapts.
SETTLE_TICKS = 10
#: How long a tick of these waits for a first picture before the next.
LISTEN_SECONDS = 0.1
#: There is road ahead if there is a waypoint this far on, metres.
ROAD_AHEAD = 2.0
#: A pedestrian who is behind their plan is asked to walk faster, by this many m/s for each metre, up to this many times
#: their speed.
CATCH_UP, FASTEST = 3.0, 2.0


class CarlaSimulator(DrivingSimulator):
    """One scenario on a CARLA server.

    A reset destroys what the last episode spawned and spawns anew; the town is loaded once, on connecting. The picture
    is always that of the newest tick. A server that dies or hangs raises :class:`SimulatorLost`; the next reset
    connects again. Several simulators may share a connection: a reset of one ends the episode of the other, whose next
    tick raises :class:`SimulatorTaken`.

    What :class:`Tick` says here: `speed` is the velocity along the nearest driving lane, in the scenario's own
    direction also where that lane is the oncoming one, and in a junction, where lanes cross, the way the car points;
    `off_road` means that the car's middle is on no driving, bidirectional, parking, stop, entry, exit, ramp or shoulder
    lane (sidewalks, medians and grass are off the road); `collision` has of each body that was hit the first impulse of
    the tick, as CARLA reports no more.

    Args:
        connection: The server; opened here and closed by :meth:`close`.
        seed: Of starts, traffic, pedestrians and looks. The same seed draws the same start; CARLA's physics and traffic
            are not repeatable to the last digit.
        reconnects: How often a reset tries to get a lost server back, with waits of 1, 2, 4 … seconds.

    Raises:
        ConfigError: There is no server, or the scenario does not fit it.
    """

    repeatable = False

    def __init__(self, connection: CarlaConnection, seed: int, reconnects: int = 5) -> None:
        super().__init__(connection.scenario, seed)
        self.connection = connection
        self.reconnects = reconnects
        self._weather = weather(self.scenario.weather)
        self._cast: Cast | None = None
        size = self.scenario.camera.size
        self._picture = np.zeros((size, size, 3), np.uint8)
        #: Whether it has been closed.
        self.closed = False
        connection.open()

    # Episodes ---------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Start an episode, on a server that is connected to again if need be.

        Raises:
            ConfigError: It did not come back, or the scenario does not fit it.
        """
        # What is drawn must not depend on how often the server was lost on the way.
        seed = int(self.rng.integers(2**63))
        self._end_episode()
        self.connection.lend(self, self._end_episode)
        for _ in self.connection.reopen(self.reconnects):
            try:
                self._begin_episode(np.random.default_rng(seed))
                return
            except SimulatorLost as error:
                logger.warning("CARLA at %s was lost while an episode began: %s.", self.connection.address, error)

    def _begin_episode(self, rng: np.random.Generator) -> None:
        connection, cast = self.connection, Cast()
        self._cast = cast
        try:
            Casting(connection, rng, cast).spawn()
            with connection.guard():
                connection.world.set_weather(self._weather)
                self._settle(cast)
                connection.drive(cast.speeds, int(rng.integers(2**31)), self.scenario.traffic.lane_changes)
                self._sense(cast, connection.tick())
        except BaseException:
            self._end_episode()
            raise

    def _settle(self, cast: Cast) -> None:
        """Let everybody stand still for some ticks, and until the camera's pictures come.

        The client subscribes to the camera in the background. On a busy machine ten ticks may pass before the server
        knows of it, and the pictures of these ticks are never sent.

        Raises:
            SimulatorLost: No picture came in time.
        """
        assert cast.camera
        command, control = self.connection.carla.command, self.connection.carla.VehicleControl
        stand = [command.ApplyVehicleControl(cast.ego.id, control(brake=1.0))]
        stand += [command.ApplyVehicleControl(parked, control(hand_brake=True)) for parked in cast.parked]
        for _ in range(SETTLE_TICKS - 1):  # the first take long where textures are still being loaded
            self.connection.send(stand)
            self.connection.tick_bare()
        seconds = self.connection.timeout_seconds
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.connection.send(stand)
            self.connection.tick_bare()
            if cast.camera.wait(LISTEN_SECONDS):
                return
        raise SimulatorLost(f"the camera has sent nothing in {seconds:g} s")

    def _end_episode(self) -> None:
        """Destroy what was spawned; on a lost server there is nothing to destroy.

        The sensors of a lost server are left as they are, and so keep their client, some ten files and two or three
        threads, for as long as the process lives. Stopped, they let the client go, which may abort the process: five of
        seven with five losses each, none of four without (CARLA 0.9.16).
        """
        cast, self._cast = self._cast, None
        if cast is None or not self.connection.alive:
            return
        try:
            with self.connection.guard():
                cast.stop_sensors()
                self.connection.rest()
                self.connection.destroy(reversed(cast.actors))
        except SimulatorLost as error:
            logger.warning("CARLA at %s was lost while an episode ended: %s.", self.connection.address, error)

    # Ticks ------------------------------------------------------------------------------------------------------------

    def tick(self, steer: float, throttle: float) -> Tick:
        """Drive for one tick and wait for its picture."""
        cast = self._playing()
        command, control = self.connection.carla.command, self.connection.carla.VehicleControl
        drive = control(
            steer=float(np.clip(steer, -1, 1)),
            throttle=float(np.clip(throttle, 0, 1)),
            brake=float(np.clip(-throttle, 0, 1)),
        )
        with self.connection.guard():
            commands = [command.ApplyVehicleControl(cast.ego.id, drive)]
            commands += [self._walk(cast, walker) for walker in cast.walkers if walker.actor.is_alive]
            self.connection.send(commands)
            collision, crossed = self._sense(cast, self.connection.tick())
            return self._report(cast, collision, crossed)

    def _playing(self) -> Cast:
        if self.connection.tenant is not self:
            raise SimulatorTaken("another environment of this process took the shared CARLA server over")
        if self._cast is None or not self.connection.alive:
            raise SimulatorLost(f"there is no connection to CARLA at {self.connection.address}")
        return self._cast

    def _sense(self, cast: Cast, frame: int) -> tuple[float, int]:
        """Wait for all that belongs to the frame: collision impulse, crossed markings; the picture is kept."""
        assert cast.camera
        assert cast.collisions
        assert cast.lanes
        seconds = self.connection.timeout_seconds
        crossed = cast.lanes.crossed(frame, seconds)
        self._picture = cast.camera.picture(frame, seconds)
        collision, hit = cast.collisions.impulse(frame)
        for walker in cast.walkers:
            walker.hit = walker.hit or walker.actor.id in hit
        return collision, crossed

    def _report(self, cast: Cast, collision: float, crossed: int) -> Tick:
        carla_map, place = self.connection.map, cast.ego.get_transform().location
        velocity = cast.ego.get_velocity()
        nearest = carla_map.get_waypoint(place)
        frame = cast.ego.get_transform() if nearest.is_junction else nearest.transform
        forward = frame.get_forward_vector()
        speed = velocity.x * forward.x + velocity.y * forward.y
        if self._oncoming(nearest):
            speed = -speed
        return Tick(
            speed=speed,
            velocity=math.hypot(velocity.x, velocity.y),
            collision=collision,
            lane_invasions=crossed,
            off_road=not on_road(self.connection.carla, carla_map, place),
            end_of_road=not nearest.next(ROAD_AHEAD),
        )

    def _oncoming(self, waypoint: Any) -> bool:
        """Whether a lane leads against the scenario's direction: its own lanes have negative numbers."""
        return waypoint.road_id == self.scenario.carla.road_id and waypoint.lane_id > 0

    # Pedestrians ------------------------------------------------------------------------------------------------------

    def _walk(self, cast: Cast, walker: Walker) -> Any:
        """The pedestrian's next step: waits, walks, has arrived, or was hit.

        CARLA's walkers take up speed over some two seconds (its controller scales their acceleration as it does their
        speed), so whoever falls behind walks faster for a while.
        """
        carla = self.connection.carla
        ahead, velocity = self._distance_to(cast, walker), cast.ego.get_velocity()
        near = max(walker.crossing.trigger_metres, walker.trigger_seconds * math.hypot(velocity.x, velocity.y))
        walker.walking = walker.walking or 0 < ahead <= near
        place = walker.actor.get_transform().location
        gone = float((np.array([place.x, place.y]) - walker.origin) @ walker.direction)
        goes = walker.walking and not walker.hit and gone < walker.distance
        speed = 0.0
        if goes:
            behind = max(0.0, walker.planned - gone)
            speed = min(walker.speed + CATCH_UP * behind, FASTEST * walker.speed)
            walker.planned += walker.speed * self.scenario.tick_seconds
        direction = carla.Vector3D(float(walker.direction[0]), float(walker.direction[1]), 0.0)
        return carla.command.ApplyWalkerControl(walker.actor.id, carla.WalkerControl(direction, speed, False))

    def _distance_to(self, cast: Cast, walker: Walker) -> float:
        """Metres along the road from the driven car to the crossing; as the crow flies from other roads."""
        place = cast.ego.get_transform().location
        waypoint = self.connection.map.get_waypoint(place)
        if waypoint.road_id == self.scenario.carla.road_id:
            return float(walker.crossing.s - waypoint.s)
        return float(np.hypot(place.x - walker.origin[0], place.y - walker.origin[1]))

    # What can be seen -------------------------------------------------------------------------------------------------

    def frame(self) -> np.ndarray:
        """The camera's picture of the newest tick."""
        return self._picture

    def view(self) -> RoadView:
        """Where the car is; others are sought up to 80 m ahead along its lane."""
        cast = self._playing()
        with self.connection.guard():
            others = self.connection.world.get_actors(cast.actors)
            return look(self.connection.map, cast.ego, others, self._oncoming)

    def close(self) -> None:
        """Destroy everything of ours; the last user of a server also puts its settings back. Safe to call twice."""
        if self.closed:
            return
        self.closed = True
        self._end_episode()
        self.connection.close()
