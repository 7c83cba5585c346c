"""What the embedded VLM learns to read: pictures of ten scenes with named readings.

A scene knows how to place its bodies at random and how to read positions, angles and distances off its simulator.
Nothing here knows a task's goal, reward or control: no actuator is ever driven.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.random import Generator


class Stage(ABC):
    """An opened scene: places, pictures and readings of one simulator."""

    @abstractmethod
    def place(self, rng: Generator) -> None:
        """Put everything at random."""

    @abstractmethod
    def picture(self, size: int) -> np.ndarray:
        """The picture of the present placement, (size, size, 3) uint8."""

    @abstractmethod
    def read(self) -> np.ndarray:
        """All readings of the present placement, (R,) float32 in [-1, 1]."""

    @abstractmethod
    def close(self) -> None:
        """Free the simulator."""


class Scene(ABC):
    """One kind of picture as the embedded VLM sees it.

    Attributes:
        name: key used in reports and files.
        caption: what the picture shows; follows "The picture shows".
        system: the system text of the tasks with this picture.
        readings: names of the readings.
    """

    name: str
    caption: str
    system: str

    @property
    @abstractmethod
    def readings(self) -> Sequence[str]:
        """Names of the readings, in the order of `Stage.read`."""

    @abstractmethod
    def open(self, full_quality: bool) -> Stage:
        """Starts the simulator.

        Args:
            full_quality: the costlier look: dm_control's default shadows, reflections and multisampling; rain on the
                highway.
        """


def embedded_scenes() -> dict[str, Scene]:
    """The ten scenes by name."""
    from covr_lightning.vlm.embedded.road_scenes import road_scenes
    from covr_lightning.vlm.embedded.suite_scenes import suite_scenes

    return {scene.name: scene for scene in (*suite_scenes(), *road_scenes())}


#: Tasks whose scene has another name than the part of the task's name before the hyphen.
_SCENES_BY_TASK = {"ghost-pedestrian": "street"}


def scene_of(task: str, scenes: dict[str, Scene]) -> Scene:
    """The scene that a task's pictures show. "walker" serves both walk and run: their pictures are the same."""
    return scenes[_SCENES_BY_TASK.get(task, task.split("-")[0])]
