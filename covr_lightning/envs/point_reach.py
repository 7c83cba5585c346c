"""Reaching a goal with a point, seen from above: a task of 32×32 pixels that plain SAC learns in a minute on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from covr_lightning.envs.base import EnvFactory, EnvSpec, PixelEnv
from covr_lightning.errors import ConfigError
from covr_lightning.random_state import generator_state, set_generator_state

#: Where point and goal begin, at most this far from the middle of the square [−1, 1]² along each axis.
START = 0.8
#: How far a full action moves the point along an axis in one environment step.
SPEED = 0.4
#: Radii in the square's units.
POINT_RADIUS, GOAL_RADIUS = 0.15, 0.25
#: RGB.
BACKGROUND, POINT_COLOUR, GOAL_COLOUR = (20, 20, 40), (255, 255, 255), (220, 40, 40)


class PointReach(EnvFactory):
    """A white point that must go to a red goal: the quickest check of a new method.

    Point and goal begin at random places of the square [−1, 1]², other ones in each episode, and only the pixels tell
    where. The two actions are the point's velocity, x to the right and y up: a full action moves it by 0.4 per
    environment step; it stops at the square's edge. The reward after each environment step is 1 − d, with d the
    distance of point and goal. Nothing terminates; the time limit truncates.

    Drawn by NumPy alone. It says whether a method learns at all, and nothing about how methods compare.

    Args:
        size: Height and width of a frame in pixels.
        action_repeat: Environment steps per agent step; the rewards of the repeats are summed.
        frame_stack: Frames in one observation. One would do: nothing moves by itself.
        episode_env_steps: Length of an episode.

    Raises:
        ConfigError: A size, repeat, stack or length below 1.
    """

    def __init__(
        self, size: int = 32, action_repeat: int = 1, frame_stack: int = 3, episode_env_steps: int = 10
    ) -> None:
        sizes = {"size": size, "frame_stack": frame_stack, "action_repeat": action_repeat}
        for name, value in (sizes | {"episode_env_steps": episode_env_steps}).items():
            if value < 1:
                raise ConfigError(f"data.env.{name} is {value}; it must be at least 1.")
        self.size = size
        self.action_repeat = action_repeat
        self.frame_stack = frame_stack
        self.episode_env_steps = episode_env_steps

    @property
    def spec(self) -> EnvSpec:
        """Shapes and units."""
        return EnvSpec(
            task="point-reach",
            frame_height=self.size,
            frame_width=self.size,
            frame_stack=self.frame_stack,
            action_dim=2,
            action_repeat=self.action_repeat,
            episode_env_steps=self.episode_env_steps,
        )

    def make(self, seed: int) -> PointReachEnv:
        """Build the environment.

        Args:
            seed: Seed of the places of point and goal.
        """
        return PointReachEnv(self.spec, seed)


class PointReachEnv(PixelEnv):
    """The environment behind :class:`PointReach`.

    Attributes:
        point: Where the point is, (2,): x to the right, y up, both in [−1, 1].
        goal: Where the goal is, (2,).
    """

    def __init__(self, spec: EnvSpec, seed: int) -> None:
        self.point, self.goal = np.zeros(2), np.zeros(2)
        self._env_steps = 0
        # Centres of the pixels: columns from left to right, rows from the top down.
        self._x = (np.arange(spec.frame_width) + 0.5) / spec.frame_width * 2 - 1
        self._y = 1 - (np.arange(spec.frame_height) + 0.5) / spec.frame_height * 2
        super().__init__(spec, seed)

    def simulator_seed(self, seed: int) -> None:
        """Seed the places of point and goal."""
        self._rng = np.random.default_rng(seed)

    def random_state(self) -> dict[str, Any]:
        """The state of the random numbers."""
        return generator_state(self._rng)

    def set_random_state(self, state: dict[str, Any]) -> None:
        """Set the state of the random numbers."""
        set_generator_state(self._rng, state)

    def simulator_reset(self) -> np.ndarray:
        """Draw new places of point and goal."""
        self.point, self.goal = self._rng.uniform(-START, START, (2, 2))
        self._env_steps = 0
        return self._render()

    def simulator_step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        """Move, sum the rewards, draw once."""
        reward, truncated = 0.0, False
        for _ in range(self.env_spec.action_repeat):
            self.point = np.clip(self.point + SPEED * action, -1.0, 1.0)
            reward += 1.0 - float(np.linalg.norm(self.goal - self.point))
            self._env_steps += 1
            truncated = self._env_steps >= self.env_spec.episode_env_steps
            if truncated:
                break
        return self._render(), reward, False, truncated

    def _render(self) -> np.ndarray:
        frame = np.tile(np.array(BACKGROUND, np.float64), (len(self._y), len(self._x), 1))
        for place, radius, colour in (
            (self.goal, GOAL_RADIUS, GOAL_COLOUR),
            (self.point, POINT_RADIUS, POINT_COLOUR),
        ):
            distance = np.hypot(self._x[None, :] - place[0], self._y[:, None] - place[1])
            # Smooth over one pixel, so that a move of less than a pixel shows.
            inside = np.clip((radius - distance) * len(self._x) / 2 + 0.5, 0.0, 1.0)[..., None]
            frame += inside * (np.array(colour) - frame)
        return frame.round().astype(np.uint8)
