"""Everybody on the road: draws their places from the scenario and spawns them."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from covr_lightning.envs.driving.carla.connection import CarlaConnection
from covr_lightning.envs.driving.carla.sensors import (
    CollisionSensor,
    FrontCamera,
    LaneInvasionSensor,
    camera_attributes,
)
from covr_lightning.envs.driving.scenario import Crossing
from covr_lightning.errors import ConfigError

logger = logging.getLogger(__name__)

#: How often a place is drawn anew when something stands there.
TRIES = 20
#: Spawned this far above the road, so that wheels and feet do not stick in it, metres.
VEHICLE_LIFT, WALKER_LIFT = 0.3, 1.0
#: Where somebody with a fixed place is put if something stands there: metres along the road and to its right.
NEARBY = ((0.0, 0.0), (0.5, 0.0), (-0.5, 0.0), (0.0, 0.3), (0.0, -0.3), (1.5, 0.0), (-1.5, 0.0))


@dataclass
class Walker:
    """A pedestrian who waits and then crosses.

    Attributes:
        actor: The walker.
        crossing: The scenario's entry.
        trigger_seconds: The driven car's time to arrival at which they start.
        speed: While walking, m/s.
        origin: Where they wait, (x, y) in CARLA's frame.
        direction: Unit vector of their way.
        distance: Length of their way, metres.
        walking: Whether they have started.
        hit: Whether the driven car ran into them; they walk no more.
        planned: How far they should have come, metres.
    """

    actor: Any
    crossing: Crossing
    trigger_seconds: float
    speed: float
    origin: np.ndarray
    direction: np.ndarray
    distance: float
    walking: bool = False
    hit: bool = False
    planned: float = 0.0


@dataclass
class Cast:
    """Everything that was spawned for an episode.

    Attributes:
        actors: Ids of all of it, in order.
        ego: The driven car.
        parked: Ids of the standing vehicles.
        speeds: Speed (m/s) that each moving vehicle likes, by id.
        walkers: The pedestrians.
        camera: The driven car's camera.
        collisions: Its collision sensor.
        lanes: Its lane-invasion sensor.
    """

    actors: list[int] = field(default_factory=list)
    ego: Any = None
    parked: list[int] = field(default_factory=list)
    speeds: dict[int, float] = field(default_factory=dict)
    walkers: list[Walker] = field(default_factory=list)
    camera: FrontCamera | None = None
    collisions: CollisionSensor | None = None
    lanes: LaneInvasionSensor | None = None

    def stop_sensors(self) -> None:
        """Sensors report no more."""
        if self.lanes:
            self.lanes.stop()
        for sensor in (self.camera, self.collisions, self.lanes):
            if sensor:
                sensor.actor.stop()


class Casting:
    """Spawns a cast.

    Args:
        connection: The server.
        rng: What is drawn comes from it.
        cast: Filled as actors come to life, so that a start that breaks off can be cleaned up.
    """

    def __init__(self, connection: CarlaConnection, rng: np.random.Generator, cast: Cast) -> None:
        self.connection = connection
        self.carla = connection.carla
        self.scenario = connection.scenario
        self.rng = rng
        self.cast = cast
        with connection.guard():
            self.library = connection.world.get_blueprint_library()
        self._taken: dict[int, list[float]] = {}

    def spawn(self) -> None:
        """Spawn parked vehicles, the driven car with its sensors, moving vehicles and pedestrians.

        Raises:
            SimulatorLost: The server does not answer.
            ConfigError: The scenario does not fit the server.
        """
        for parked in self.scenario.parked:
            vehicle, _ = self._try_near(self._blueprint(parked.vehicle, still=True), parked.s, parked.d, VEHICLE_LIFT)
            if vehicle is None:
                logger.warning("Something stands where %s is to be parked, at s = %g m.", parked.vehicle, parked.s)
            else:
                self.cast.parked.append(vehicle.id)
        self._spawn_ego()
        self._spawn_sensors()
        self._spawn_traffic()
        for crossing in self.scenario.crossings:
            self._spawn_walker(crossing)

    # Places -----------------------------------------------------------------------------------------------------------

    def waypoint(self, s: float, lane: int) -> Any:
        """The waypoint in the middle of lane k (1 is the leftmost) at s.

        Raises:
            ConfigError: The road has no such place.
        """
        place = self.scenario.carla
        waypoint = self.connection.map.get_waypoint_xodr(place.road_id, -lane, float(s))
        if waypoint is None:
            raise ConfigError(
                f"Road {place.road_id} of {place.map} has no lane {-lane} at s = {s:g} m, where the scenario "
                f"{self.scenario.name} (data.env.scenario) puts somebody."
            )
        return waypoint

    def place(self, s: float, d: float, lift: float, turn: float = 0.0) -> Any:
        """The transform at (s, d), d metres right of the reference line; `turn` degrees to the right of the road."""
        waypoint = self.waypoint(s, 1)
        frame = waypoint.transform
        aside = d - waypoint.lane_width / 2
        right = frame.get_right_vector()
        location = self.carla.Location(
            frame.location.x + aside * right.x, frame.location.y + aside * right.y, frame.location.z + lift
        )
        return self.carla.Transform(location, self.carla.Rotation(yaw=frame.rotation.yaw + turn))

    def _in_lane(self, s: float, lane: int) -> Any:
        place = self.waypoint(s, lane).transform
        place.location.z += VEHICLE_LIFT
        return place

    # Actors -----------------------------------------------------------------------------------------------------------

    def _blueprint(self, name: str, still: bool = False) -> Any:
        """A blueprint of ours by its name."""
        try:
            blueprint = self.library.find(name)
        except IndexError:
            raise ConfigError(f"The CARLA server has no {name} for the scenario {self.scenario.name}.") from None
        self._mark(blueprint)
        color = None if still else self._color(blueprint)
        if color:
            blueprint.set_attribute("color", color)
        return blueprint

    def _mark(self, blueprint: Any) -> None:
        if blueprint.has_attribute("role_name"):
            blueprint.set_attribute("role_name", self.connection.tag)

    def _color(self, blueprint: Any) -> str | None:
        if not blueprint.has_attribute("color"):
            return None
        return str(self.rng.choice(blueprint.get_attribute("color").recommended_values))

    def _try(self, blueprint: Any, place: Any, parent: Any = None) -> Any:
        """Spawn, or None where something stands."""
        with self.connection.guard():
            try:
                actor = self.connection.world.spawn_actor(blueprint, place, attach_to=parent)
            except RuntimeError as error:
                if "collision" in str(error).lower():
                    return None
                raise
        self.cast.actors.append(actor.id)
        return actor

    def _try_near(self, blueprint: Any, s: float, d: float, lift: float, turn: float = 0.0) -> tuple[Any, Any]:
        """Spawn at a place or, where something stands, close by; the actor, or None, and the place."""
        for along, aside in NEARBY:
            place = self.place(s + along, d + aside, lift, turn)
            actor = self._try(blueprint, place)
            if actor is not None:
                break
        return actor, place

    def _spawn_ego(self) -> None:
        start = self.scenario.ego
        blueprint = self._blueprint(start.vehicle, still=True)
        for _ in range(TRIES):
            s, lane = float(self.rng.uniform(*start.s)), int(self.rng.choice(start.lanes))
            ego = self._try(blueprint, self._in_lane(s, lane))
            if ego is not None:
                self.cast.ego = ego
                self._taken.setdefault(lane, []).append(s)
                return
        raise ConfigError(
            f"Found no free place for the driven car on road {self.scenario.carla.road_id} of "
            f"{self.scenario.carla.map} in {TRIES} tries: somebody else's actors stand there; restart the CARLA server."
        )

    def _spawn_sensors(self) -> None:
        camera = self.scenario.camera
        blueprint = self._blueprint("sensor.camera.rgb")
        for name, value in camera_attributes(camera).items():
            if blueprint.has_attribute(name):
                blueprint.set_attribute(name, value)
        spot = self.carla.Transform(self.carla.Location(x=camera.x, z=camera.z))
        ego, here = self.cast.ego, self.carla.Transform()
        self.cast.camera = FrontCamera(self._sensor(blueprint, spot, ego))
        collisions = self._sensor(self._blueprint("sensor.other.collision"), here, ego)
        self.cast.collisions = CollisionSensor(collisions)
        lanes = self._sensor(self._blueprint("sensor.other.lane_invasion"), here, ego)
        self.cast.lanes = LaneInvasionSensor(lanes, self.connection.world)

    def _sensor(self, blueprint: Any, place: Any, parent: Any) -> Any:
        actor = self._try(blueprint, place, parent)
        assert actor is not None, "sensors have no body"
        return actor

    def _spawn_traffic(self) -> None:
        traffic = self.scenario.traffic
        wanted = int(self.rng.integers(traffic.vehicles[0], traffic.vehicles[1] + 1))
        if not wanted:
            return
        cars = sorted(b.id for b in self.library.filter("vehicle.*") if _is_car(b))
        for _ in range(TRIES * wanted):
            if len(self.cast.speeds) == wanted:
                return
            lane, s = int(self.rng.choice(traffic.lanes)), float(self.rng.uniform(*traffic.s))
            if any(abs(s - other) < traffic.min_gap for other in self._taken.get(lane, [])):
                continue
            car = self._try(self._blueprint(str(self.rng.choice(cars))), self._in_lane(s, lane))
            if car is not None:
                self._taken.setdefault(lane, []).append(s)
                self.cast.speeds[car.id] = float(self.rng.uniform(*traffic.speed))
        logger.warning("Found places for %d of %d vehicles only.", len(self.cast.speeds), wanted)

    def _spawn_walker(self, crossing: Crossing) -> None:
        people = sorted(b.id for b in self.library.filter("walker.pedestrian.*"))
        blueprint = self._blueprint(str(self.rng.choice(people)))
        # By default they are invincible, and then a car that runs over them has no collision (carla issues 4536, 7025).
        blueprint.set_attribute("is_invincible", "false")
        seconds, speed = float(self.rng.uniform(*crossing.trigger_seconds)), float(self.rng.uniform(*crossing.speed))
        way = crossing.end_d - crossing.start_d
        turn = math.copysign(90.0, way)
        actor, start = self._try_near(blueprint, crossing.s, crossing.start_d, WALKER_LIFT, turn)
        if actor is None:
            logger.warning("Something stands where a pedestrian is to wait, at s = %g m.", crossing.s)
            return
        right = self.waypoint(crossing.s, 1).transform.get_right_vector()
        self.cast.walkers.append(
            Walker(
                actor, crossing, seconds, speed,
                origin=np.array([start.location.x, start.location.y]),
                direction=math.copysign(1.0, way) * np.array([right.x, right.y]),
                distance=abs(way),
            )
        )  # fmt: skip


def _is_car(blueprint: Any) -> bool:
    if not blueprint.has_attribute("number_of_wheels") or int(blueprint.get_attribute("number_of_wheels")) != 4:
        return False
    return not blueprint.has_attribute("base_type") or str(blueprint.get_attribute("base_type").as_str()) == "car"
