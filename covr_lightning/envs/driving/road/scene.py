"""Pictures of the road: bodies where they are, scenery drawn from a seed, seen from the driven car."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mujoco
import numpy as np

from covr_lightning.envs.driving.road.camera import Camera
from covr_lightning.envs.driving.road.model import AWAY, HOUSES, POSTS, SIDEWALK_HEIGHT, TREES, build_model
from covr_lightning.envs.driving.road.track import Pose, Track
from covr_lightning.envs.driving.scenario import Scenario

PAINTS = np.array(
    [[0.75, 0.10, 0.10], [0.10, 0.20, 0.60], [0.85, 0.85, 0.86], [0.13, 0.13, 0.14], [0.80, 0.60, 0.10],
     [0.10, 0.45, 0.25], [0.55, 0.57, 0.60], [0.45, 0.25, 0.12]]
)  # fmt: skip
WALLS = np.array([[1.0, 0.95, 0.88], [0.95, 0.80, 0.66], [0.85, 0.55, 0.45], [0.80, 0.84, 0.88], [0.93, 0.90, 0.72]])
#: Scenery is kept from this far behind the driven car to this far ahead, metres.
BEHIND, AHEAD = 30.0, 380.0


class RoadScene:
    """Renders a scenario's road.

    Args:
        scenario: Road, weather and camera.
        seed: Of the first scenery and paints; :meth:`reset` draws new ones.
        cars: Cars that can be shown at once; by default as many as the scenario has.
        vans: Vans that can be shown at once.
        pedestrians: Pedestrians that can be shown at once.
    """

    def __init__(
        self,
        scenario: Scenario,
        seed: int,
        cars: int | None = None,
        vans: int | None = None,
        pedestrians: int | None = None,
    ) -> None:
        self.scenario = scenario
        self.track = Track(scenario.road)
        parked = len(scenario.parked)
        self._stock = {
            "car": scenario.traffic.vehicles[1] + parked if cars is None else cars,
            "van": parked if vans is None else vans,
            "pedestrian": len(scenario.crossings) if pedestrians is None else pedestrians,
        }
        self.model = build_model(
            scenario, self.track, self._stock["car"], self._stock["van"], self._stock["pedestrian"]
        )
        self.data = mujoco.MjData(self.model)
        self._camera = Camera(self.model, "front", scenario.camera.size)
        self._mocap = {
            self.model.body(i).name: int(self.model.body_mocapid[i])
            for i in range(self.model.nbody)
            if self.model.body_mocapid[i] >= 0
        }
        self.reset(np.random.default_rng(seed))

    def reset(self, rng: np.random.Generator, s: float = 0.0) -> None:
        """Draw new paints and new scenery.

        Args:
            rng: The source.
            s: Where the driven car starts, metres.
        """
        self._rng = np.random.default_rng(rng.integers(2**63))
        for i in range(self._stock["car"]):
            geoms = self.model.body(f"car{i}").geomadr[0]
            paint = PAINTS[self._rng.integers(len(PAINTS))]
            self.model.geom_rgba[geoms, :3] = self.model.geom_rgba[geoms + 2, :3] = paint
        self._scenery: list[tuple[float, str]] = []
        for name, count in (("house", HOUSES), ("tree", TREES), ("post", POSTS)):
            for i in range(count):
                self._place(f"{name}{i}", s - BEHIND + (AHEAD + BEHIND) * i / count, i)

    def render(
        self, ego: Pose, vehicles: Sequence[tuple[str, Pose]] = (), pedestrians: Sequence[Pose] = ()
    ) -> np.ndarray:
        """The front camera's picture.

        Args:
            ego: The driven car.
            vehicles: ``("car" | "van", pose)`` of the others; those beyond the stock are not shown.
            pedestrians: Poses.

        Returns:
            (size, size, 3) uint8.
        """
        shown = {"car": 0, "van": 0, "pedestrian": 0}
        for kind, pose in [*vehicles, *(("pedestrian", p) for p in pedestrians)]:
            if shown[kind] < self._stock[kind]:
                self._put(f"{kind}{shown[kind]}", pose)
                shown[kind] += 1
        for kind, count in shown.items():
            for i in range(count, self._stock[kind]):
                self.data.mocap_pos[self._mocap[f"{kind}{i}"]] = AWAY
        self._put("ego", ego)
        self._move_scenery_on(self.track.project(ego.x, ego.y)[0])
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)
        frame = self._camera.picture(self.data)
        return _rain(frame, self._rng) if self.scenario.raining else frame

    def close(self) -> None:
        """Free the OpenGL context."""
        self._camera.close()

    def _put(self, name: str, pose: Pose, z: float = 0.0) -> None:
        i = self._mocap[name]
        self.data.mocap_pos[i] = (pose.x, pose.y, z)
        self.data.mocap_quat[i] = (math.cos(pose.heading / 2), 0, 0, math.sin(pose.heading / 2))

    def _move_scenery_on(self, s: float) -> None:
        """What has fallen behind comes again far ahead, with new looks."""
        for i, (place, name) in enumerate(self._scenery):
            if place < s - BEHIND:
                self._scenery[i] = (place + AHEAD + BEHIND, name)
                self._draw(name, place + AHEAD + BEHIND, i)

    def _place(self, name: str, s: float, index: int) -> None:
        self._scenery.append((s, name))
        self._draw(name, s, index)

    def _draw(self, name: str, s: float, index: int) -> None:
        """One piece of scenery near s, on the left or right in turns."""
        rng, road = self._rng, self.scenario.road
        town = road.surroundings == "town"
        side = 1 if index % 2 else -1
        left, right = self.track.bounds
        edge = (right if side > 0 else left) + side * road.sidewalk
        geom = self.model.body(name).geomadr[0]
        if name.startswith("house"):
            depth, width, height = (
                rng.uniform(4, 7),
                rng.uniform(8, 13) if town else rng.uniform(5, 9),
                rng.uniform(5, 15),
            )
            self.model.geom_size[geom] = (width, depth, height / 2)
            self.model.geom_rgba[geom, :3] = rng.uniform(0.55, 0.9) * WALLS[rng.integers(len(WALLS))]
            away = depth + (rng.uniform(0.5, 2) if town else rng.uniform(10, 24))
            self._put(name, self.track.pose(s + rng.uniform(-3, 3), edge + side * away), height / 2 - 0.5)
        elif name.startswith("tree"):
            self.model.geom_rgba[geom + 1, :3] = rng.uniform((0.10, 0.30, 0.08), (0.28, 0.48, 0.20))
            if town:
                place, z = self.track.pose(s, edge - side * 0.8), SIDEWALK_HEIGHT
            else:
                place, z = self.track.pose(s + rng.uniform(-4, 4), edge + side * rng.uniform(2.5, 9)), 0.0
            self._put(name, place, z + rng.uniform(-0.8, 0.2))
        elif town:
            place = self.track.pose(s, edge - side * (road.sidewalk - 0.4))
            self._put(name, Pose(place.x, place.y, place.heading + side * math.pi / 2), SIDEWALK_HEIGHT)
        else:
            self._put(name, self.track.pose(s, edge + side * 0.6))


def _rain(frame: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw falling drops: short bright streaks, a new set in every picture."""
    height, width = frame.shape[:2]
    wet = frame.astype(np.int16)
    n, length = width * height // 220, max(3, height // 20)
    y, x = rng.integers(0, height - length, n), rng.integers(0, width - 1, n)
    for k in range(length):
        wet[y + k, x + (k > length // 2)] += 28
    return wet.clip(0, 255).astype(np.uint8)
