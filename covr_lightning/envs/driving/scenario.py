"""What happens on the road: a scenario as data, read from a YAML file, the same for every simulator.

Places along the road are given as s, metres along its reference line, and d, metres to the *right* of that line; lane k
(1 is the leftmost of the driving direction) has its middle at d = (k − ½) · lane_width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Literal

from covr_lightning.errors import ConfigError

#: How far one segment of a road may turn: places along it are found by their angle, which comes again after a circle.
MAX_TURN = 2 * math.pi / 3


@dataclass(frozen=True)
class RoadShape:
    """The road's geometry, for simulators that build it themselves.

    Attributes:
        lanes: Lanes in the driving direction.
        opposite_lanes: Lanes in the other direction, left of the reference line.
        lane_width: Metres.
        shoulder: Width of the paved strip beyond the outer lanes, metres.
        sidewalk: Width of the raised sidewalk beyond the shoulder, metres; 0 for none.
        segments: ``[length in metres, curvature in 1/m]`` one after the other; a positive curvature bends left.
        surroundings: ``"country"`` (trees, guard rail, few houses) or ``"town"`` (houses in a row).
    """

    lanes: int
    lane_width: float
    segments: Sequence[tuple[float, float]]
    opposite_lanes: int = 0
    shoulder: float = 0.5
    sidewalk: float = 0.0
    surroundings: Literal["country", "town"] = "country"


@dataclass(frozen=True)
class CarlaPlace:
    """Where the road is in CARLA; lane k is CARLA's lane −k.

    Attributes:
        map: Name of the town.
        road_id: OpenDRIVE id of the road that s is measured on.
    """

    map: str
    road_id: int


@dataclass(frozen=True)
class Ego:
    """The driven car's start.

    Attributes:
        s: Range of its place along the road, metres.
        lanes: Lanes to draw from.
        vehicle: CARLA blueprint.
    """

    s: tuple[float, float]
    lanes: Sequence[int]
    vehicle: str = "vehicle.tesla.model3"


@dataclass(frozen=True)
class Traffic:
    """Moving vehicles ahead, in the driving direction.

    Attributes:
        vehicles: Range of their number, both ends included.
        s: Range of their places along the road, metres.
        lanes: Lanes to draw from.
        speed: Range of the speeds they like, m/s.
        min_gap: Smallest distance between two of them in one lane at the start, metres.
        lane_changes: Whether they may change lanes.
    """

    vehicles: tuple[int, int] = (0, 0)
    s: tuple[float, float] = (0.0, 0.0)
    lanes: Sequence[int] = (1,)
    speed: tuple[float, float] = (5.0, 10.0)
    min_gap: float = 10.0
    lane_changes: bool = False


@dataclass(frozen=True)
class Parked:
    """A standing vehicle.

    Attributes:
        s: Place of its middle along the road, metres.
        d: Place of its middle to the right of the reference line, metres.
        vehicle: CARLA blueprint; a name with ``van``, ``sprinter`` or ``truck`` in it is drawn tall.
    """

    s: float
    d: float
    vehicle: str = "vehicle.mercedes.sprinter"


@dataclass(frozen=True)
class Crossing:
    """A pedestrian who waits and, when the driven car comes near, crosses.

    Attributes:
        s: Place along the road, metres.
        start_d: Where they wait, metres to the right of the reference line.
        end_d: Where they stop.
        trigger_seconds: Range of the driven car's time to arrival (distance along the road over speed) at which they
            start. A time, so that driving faster does not outrun them.
        trigger_metres: They start no later than at this distance, however slow the car is.
        speed: Range of their speed, m/s.
    """

    s: float
    start_d: float
    end_d: float
    trigger_seconds: tuple[float, float]
    speed: tuple[float, float]
    trigger_metres: float = 8.0


@dataclass(frozen=True)
class Camera:
    """The front camera (paper, CARLA settings; place from the authors' earlier driving code).

    Attributes:
        size: Height and width of the frame, pixels.
        fov: Field of view, degrees.
        x: Metres in front of the car's middle.
        z: Metres above the ground.
        gamma: CARLA: gamma of the target display.
        iso: CARLA: sensitivity.
        exposure_min_bright: CARLA: lower bound of automatic exposure.
        exposure_max_bright: CARLA: upper bound of automatic exposure.
        motion_blur: CARLA: intensity of motion blur.
    """

    size: int = 128
    fov: float = 60.0
    x: float = 1.0
    z: float = 1.5
    gamma: float = 2.2
    iso: float = 100.0
    exposure_min_bright: float = 10.0
    exposure_max_bright: float = 12.0
    motion_blur: float = 0.45


@dataclass(frozen=True)
class RewardWeights:
    """Weights of Eqs. 7 and 8: r = v·dt − collision·I − lane_invasion·n − steer·|steer|.

    Attributes:
        collision: Per N·s of collision impulse.
        lane_invasion: Per corner of the car that crosses a lane marking.
        steer: Per unit of |steer|.
    """

    collision: float
    steer: float
    lane_invasion: float = 0.0


@dataclass(frozen=True)
class EpisodeRules:
    """When an episode ends. Counts are in simulator ticks (environment steps).

    Attributes:
        max_env_steps: Length at which it is truncated.
        colliding_env_steps: Consecutive colliding ticks that end it.
        stuck_speed: m/s below which the car counts as stuck …
        stuck_check_env_steps: … when this many ticks have passed, and at every multiple.
    """

    max_env_steps: int = 1000
    colliding_env_steps: int = 20
    stuck_speed: float = 0.02
    stuck_check_env_steps: int = 100


@dataclass(frozen=True)
class Scenario:
    """One scenario.

    Attributes:
        name: Its own name.
        task: What a checkpoint and the VLM's prompt are tied to; variants of one scenario share it.
        road: Geometry.
        carla: The place in CARLA.
        ego: The driven car's start.
        reward: Weights of the reward.
        traffic: Moving vehicles.
        parked: Standing vehicles.
        crossings: Pedestrians.
        weather: Name of a CARLA weather preset; one with ``Rain`` in it looks rainy in every simulator.
        camera: The front camera.
        rules: When an episode ends.
        tick_seconds: Simulated time of one environment step.
    """

    name: str
    task: str
    road: RoadShape
    carla: CarlaPlace
    ego: Ego
    reward: RewardWeights
    traffic: Traffic = field(default_factory=Traffic)
    parked: Sequence[Parked] = ()
    crossings: Sequence[Crossing] = ()
    weather: str = "CloudyNoon"
    camera: Camera = field(default_factory=Camera)
    rules: EpisodeRules = field(default_factory=EpisodeRules)
    tick_seconds: float = 0.05

    @property
    def raining(self) -> bool:
        """Whether it looks rainy."""
        return "rain" in self.weather.lower()

    def lane_middle(self, lane: int) -> float:
        """Middle of a lane: d, metres to the right of the reference line."""
        return (lane - 0.5) * self.road.lane_width


def shipped_scenarios() -> dict[str, Path]:
    """Names and files of the scenarios that come with the package."""
    folder = Path(str(files("covr_lightning.envs.driving") / "scenarios"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_scenario(name: str) -> Scenario:
    """Read a scenario.

    Args:
        name: Name of a shipped scenario, or path of a YAML file.

    Raises:
        ConfigError: No such scenario, or a file that is none.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    shipped = shipped_scenarios()
    path = Path(name)
    if name in shipped:
        path = shipped[name]
    elif not path.is_file():
        raise ConfigError(
            f"Unknown scenario {name!r} (YAML key data.env.scenario): it can be one of {', '.join(shipped)}, or the "
            "path of a YAML file of your own."
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Scenario)
    try:
        scenario = Scenario(**vars(parser.instantiate_classes(parser.parse_path(str(path)))))
    except (ArgumentError, TypeError) as error:
        raise ConfigError(f"The scenario {path} cannot be used: {error}") from error
    _check(scenario, path)
    return scenario


def _check(scenario: Scenario, path: Path) -> None:
    road, traffic, rules, camera = scenario.road, scenario.traffic, scenario.rules, scenario.camera
    if not scenario.ego.lanes:
        raise ConfigError(f"The scenario {path} has ego.lanes: []; it must name a lane to start in.")
    if not 0 < camera.fov < 180:
        raise ConfigError(f"The scenario {path} has camera.fov: {camera.fov:g}; it must lie between 0 and 180 degrees.")
    numbers = {"road.lane_width": road.lane_width, "tick_seconds": scenario.tick_seconds}
    for key, number in numbers.items():
        if not 0 < number < math.inf:
            raise ConfigError(f"The scenario {path} has {key}: {number:g}; it must be above 0, and a number.")
    for name in ("opposite_lanes", "shoulder", "sidewalk"):
        if not 0 <= (number := getattr(road, name)) < math.inf:
            raise ConfigError(f"The scenario {path} has road.{name}: {number:g}; it must be 0 or more.")
    wrong = sorted({*scenario.ego.lanes, *traffic.lanes} - set(range(1, road.lanes + 1)))
    if wrong:
        raise ConfigError(f"The scenario {path} names lane {wrong[0]}, but its road has lanes 1 to {road.lanes}.")
    length = sum(segment[0] for segment in road.segments)
    if not 0 <= scenario.ego.s[0] <= scenario.ego.s[1] < length:
        raise ConfigError(f"The scenario {path} starts at s = {scenario.ego.s}, but its road is {length:g} m long.")
    for long, curvature in road.segments:
        if long <= 0 or abs(long * curvature) > MAX_TURN:
            raise ConfigError(
                f"The scenario {path} has a road segment of {long:g} m and curvature {curvature:g}; it must be longer "
                f"than 0 and turn by {math.degrees(MAX_TURN):.0f}° at most: divide it."
            )
    places = [("parked", one.s) for one in scenario.parked] + [("crossings", one.s) for one in scenario.crossings]
    for kind, s in places:
        if not 0 <= s <= length:
            raise ConfigError(f"The scenario {path} has {kind} at s = {s:g}, but its road is {length:g} m long.")
    ranges: dict[str, Sequence[float]] = {
        "traffic.vehicles": traffic.vehicles, "traffic.s": traffic.s, "traffic.speed": traffic.speed,
    }  # fmt: skip
    for i, crossing in enumerate(scenario.crossings):
        ranges |= {f"crossings.{i}.trigger_seconds": crossing.trigger_seconds, f"crossings.{i}.speed": crossing.speed}
    for key, (low, high) in ranges.items():
        if not 0 <= low <= high:
            raise ConfigError(f"The scenario {path} has {key}: [{low:g}, {high:g}]; it must be a range from 0 or more.")
    least = {
        "rules.max_env_steps": rules.max_env_steps, "rules.colliding_env_steps": rules.colliding_env_steps,
        "rules.stuck_check_env_steps": rules.stuck_check_env_steps, "camera.size": camera.size,
    }  # fmt: skip
    for key, value in least.items():
        if value < 1:
            raise ConfigError(f"The scenario {path} has {key}: {value}; it must be at least 1.")
