"""Two scenes of the built-in road: a highway and a street with a pedestrian, from the driver's seat.

Only what one still picture shows is read: the car's place in its lane or on the road, where it points, distances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from covr_lightning.envs.driving.scenario import Scenario, load_scenario
from covr_lightning.rendering import choose_backend
from covr_lightning.vlm.driving_prompts import DRIVING_SYSTEM
from covr_lightning.vlm.embedded.scenes import Scene, Stage

if TYPE_CHECKING:
    from covr_lightning.envs.driving.road.track import Pose

#: Largest drawn offset from the street's lane's middle (m), and heading error (rad) on both.
STREET_OFFSET, HEADING_ERROR = 1.4, 0.3
FURTHEST_CAR, FURTHEST_PEDESTRIAN = 40.0, 20.0
CARS, VANS = 6, 2

#: Poses of the driven car, of vehicles and of pedestrians, and the readings.
Placement = tuple["Pose", list[tuple[str, "Pose"]], list["Pose"], list[float]]


class RoadStage(Stage):
    """The opened road.

    Args:
        scenario: road and weather.
        draw: draws a placement.
    """

    def __init__(self, scenario: Scenario, draw: Callable[[Any, Generator], tuple[float, Placement]]) -> None:
        choose_backend()
        from covr_lightning.envs.driving.road.scene import RoadScene

        self._scene = RoadScene(scenario, seed=0, cars=CARS, vans=VANS, pedestrians=1)
        self._draw = draw

    def place(self, rng: Generator) -> None:
        """Draws a place on the road, others on it, and scenery."""
        s, self._placement = self._draw(self._scene.track, rng)
        self._scene.reset(rng, s)

    def picture(self, size: int) -> np.ndarray:
        """The front camera's picture, made smaller if need be."""
        frame = self._scene.render(*self._placement[:3])
        if frame.shape[0] == size:
            return frame
        return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BOX))

    def read(self) -> np.ndarray:
        """All readings of the placement."""
        return np.clip(np.asarray(self._placement[3], np.float32), -1.0, 1.0)

    def close(self) -> None:
        """Frees the renderer."""
        self._scene.close()


class RoadScenery(Scene):
    """A scene of the built-in road.

    Args:
        name: key used in reports.
        caption: what the picture shows.
        scenario: a shipped scenario.
        readings: their names.
        draw: draws a placement.
    """

    system = DRIVING_SYSTEM

    def __init__(
        self, name: str, caption: str, scenario: str, readings: Sequence[str], draw: Callable[..., Any]
    ) -> None:
        self.name = name
        self.caption = caption
        self._scenario = scenario
        self._readings = tuple(readings)
        self._draw = draw

    @property
    def readings(self) -> Sequence[str]:
        """Their names."""
        return self._readings

    def open(self, full_quality: bool) -> Stage:
        """Builds the road; `full_quality` lets it rain on the highway."""
        scenario = load_scenario(self._scenario)
        if full_quality and self.name == "highway":
            scenario = replace(scenario, weather="HardRainNoon")
        return RoadStage(scenario, self._draw)


def _turned(pose: Pose, right: float) -> Pose:
    return pose._replace(heading=pose.heading - right)


def _draw_highway(track: Any, rng: Generator) -> tuple[float, Placement]:
    width, lanes = track.shape.lane_width, track.shape.lanes
    s = float(rng.uniform(60, track.length - 150))
    d, error = float(rng.uniform(0.3, lanes * width - 0.3)), float(rng.uniform(-1, 1)) * HEADING_ERROR
    # The nearest car is in a lane that the picture shows at its distance; all others are further away.
    distance = float(rng.uniform(4, FURTHEST_CAR))
    middles = [(k + 0.5) * width for k in range(lanes)]
    near = [m for m in middles if abs(m - d + error * distance) < 0.45 * distance] or [
        min(middles, key=lambda m: abs(m - d))
    ]
    at = float(rng.choice(near))
    cars = [("car", track.pose(s + distance + 2.3, at))]
    for _ in range(int(rng.integers(0, CARS))):
        cars.append(("car", track.pose(s + distance + rng.uniform(12, 90), float(rng.choice(middles)))))
    readings = [
        2 * d / (lanes * width) - 1,
        error / HEADING_ERROR,
        2 * distance / FURTHEST_CAR - 1,
        (at - d) / (lanes * width),
    ]
    return s, (_turned(track.pose(s, d), error), cars, [], readings)


def _draw_street(track: Any, rng: Generator) -> tuple[float, Placement]:
    s, middle = float(rng.uniform(5, track.length - 100)), 0.5 * track.shape.lane_width
    offset, error = float(rng.uniform(-1, 1)) * STREET_OFFSET, float(rng.uniform(-1, 1)) * HEADING_ERROR
    distance, side = float(rng.uniform(5, FURTHEST_PEDESTRIAN)), float(rng.uniform(-1, 1))
    # Wider apart the further away, so that they stay in the picture; vans stand where they hide nobody.
    reach = min(5.5, 0.3 * distance + 1)
    walker = track.pose(s + distance + 2.3, middle + side * reach)
    facing = walker._replace(heading=walker.heading + math.copysign(math.pi / 2, rng.uniform(-1, 1)))
    vans = []
    for d in (4.9, -4.6):
        beyond = distance + rng.uniform(3, 40)
        same_side = (d > 0) == (side > 0)
        place = beyond if same_side else rng.uniform(8, 50)
        if rng.random() < 0.7:
            vans.append(("van", track.pose(s + place, d)))
    readings = [
        offset / STREET_OFFSET,
        error / HEADING_ERROR,
        2 * distance / FURTHEST_PEDESTRIAN - 1,
        side * reach / 5.5,
    ]
    return s, (_turned(track.pose(s, middle + offset), error), vans, [facing], readings)


def road_scenes() -> tuple[Scene, ...]:
    """The highway and the street."""
    return (
        RoadScenery(
            "highway",
            "a highway from the front camera of a car",
            "highway",
            ("road_position", "heading_error", "car_distance", "car_side"),
            _draw_highway,
        ),
        RoadScenery(
            "street",
            "a street from the front camera of a car",
            "ghost_pedestrian",
            ("lane_offset", "heading_error", "pedestrian_distance", "pedestrian_side"),
            _draw_street,
        ),
    )
