"""What the loopback server's cameras show."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from covr_lightning.envs.driving.road.bodies import VAN
from covr_lightning.envs.driving.scenario import Scenario
from covr_lightning.rendering import choose_backend
from tests.envs.carla.loopback.world import Actor, World


class Painter(Protocol):
    """Paints camera pictures."""

    def paint(self, world: World, ego: Actor, width: int, height: int) -> bytes:
        """Paint what `ego` sees, BGRA."""


class PlainPainter:
    """A picture that costs nothing: the frame's number in the first pixel, the rest moves with the car."""

    def paint(self, world: World, ego: Actor, width: int, height: int) -> bytes:
        """Paint stripes, BGRA."""
        picture = np.full((height, width, 4), 255, np.uint8)
        columns = np.arange(width) + int(20 * (ego.place.x + ego.place.y))
        picture[..., :3] = (columns % 256).astype(np.uint8)[None, :, None]
        picture[0, 0, :3] = [world.frame & 255, world.frame >> 8 & 255, world.frame >> 16 & 255]
        return picture.tobytes()


class RoadPainter:
    """The built-in road's picture of the same world. OpenGL stays in one thread.

    Args:
        scenario: The road, its looks, and the camera.
        seed: Of the scenery.
    """

    def __init__(self, scenario: Scenario, seed: int = 0) -> None:
        choose_backend()
        from covr_lightning.envs.driving.road.scene import RoadScene

        self._thread = ThreadPoolExecutor(1)
        self._scene = self._thread.submit(RoadScene, scenario, seed).result()

    def paint(self, world: World, ego: Actor, width: int, height: int) -> bytes:
        """Paint the road; a camera of another size than the scenario's gets grey."""
        others = [actor for actor in world.actors.values() if actor is not ego]
        vehicles = [("van" if a.kind is VAN else "car", a.place.pose) for a in others if a.is_vehicle]
        pedestrians = [actor.place.pose for actor in others if actor.is_walker]
        rgb = self._thread.submit(self._scene.render, ego.place.pose, vehicles, pedestrians).result()
        picture = np.full((height, width, 4), 128, np.uint8)
        if rgb.shape[:2] == (height, width):
            picture[..., :3] = rgb[..., ::-1]
        return picture.tobytes()
