"""CarRacing from above: gymnasium's CarRacing-v3 with three continuous actions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from covr_lightning.envs.base import EnvFactory, EnvSpec, PixelEnv
from covr_lightning.errors import ConfigError
from covr_lightning.random_state import generator_state, set_generator_state

EPISODE_ENV_STEPS = 1000
#: Height and width of gymnasium's own observation.
NATIVE_SIZE = 96


class CarRacing(EnvFactory):
    """A racing car on a new track each episode, seen from above.

    Actions are steer (−1 left, 1 right), gas and brake, each in [−1, 1] as the paper has them; gymnasium's gas and
    brake are (a + 1) / 2, so −1 is none and 1 is full. The reward is gymnasium's: 1000/N for each of the N tiles of the
    track when it is first touched, −0.1 an environment step, −100 for leaving the playfield. A finished lap and a left
    playfield terminate; the time limit truncates.

    gymnasium draws one picture of 1000×800 and scales it to 96×96, whatever its proportions. Another `size` is scaled
    from the same picture by the same function. Only an agent step's last picture is drawn, after its reward was
    counted, so the score in the picture's corner is not gymnasium's, which lags by the −0.1 of one step.

    Args:
        size: Height and width of a frame in pixels. The paper gives none for this environment; 96 is gymnasium's own,
            128 the paper's on CARLA.
        action_repeat: Environment steps (of 1/50 s) per agent step; the rewards of the repeats are summed.
        frame_stack: Frames in one observation.

    Raises:
        ConfigError: A size, repeat or stack below 1.
    """

    def __init__(self, size: int = NATIVE_SIZE, action_repeat: int = 4, frame_stack: int = 3) -> None:
        for name, value in (("size", size), ("frame_stack", frame_stack), ("action_repeat", action_repeat)):
            if value < 1:
                raise ConfigError(f"data.env.{name} is {value}; it must be at least 1.")
        self.size = size
        self.action_repeat = action_repeat
        self.frame_stack = frame_stack

    @property
    def spec(self) -> EnvSpec:
        """Shapes and units; known without starting the simulator."""
        return EnvSpec(
            task="carracing",
            frame_height=self.size,
            frame_width=self.size,
            frame_stack=self.frame_stack,
            action_dim=3,
            action_repeat=self.action_repeat,
            episode_env_steps=EPISODE_ENV_STEPS,
        )

    @property
    def idle_action(self) -> tuple[float, ...]:
        """Straight on, without gas or brake, both of which 0 would half press."""
        return (0.0, -1.0, -1.0)

    def make(self, seed: int) -> CarRacingEnv:
        """Build the environment.

        Args:
            seed: Seed of the tracks.

        Raises:
            ConfigError: gymnasium or Box2D is not installed.
        """
        return CarRacingEnv(self.spec, seed)


class CarRacingEnv(PixelEnv):
    """The environment behind :class:`CarRacing`."""

    def __init__(self, spec: EnvSpec, seed: int) -> None:
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame reads it when it is imported; no window is opened
        try:
            import Box2D  # noqa: F401
            import gymnasium
            import pygame
        except ImportError as error:
            raise ConfigError(
                f'CarRacing needs gymnasium with Box2D: pip install "covr_lightning[carracing]" ({error}).'
            ) from error
        self._pygame = pygame
        self._env: Any = gymnasium.make(
            "CarRacing-v3",
            max_episode_steps=spec.episode_env_steps,
            render_mode="state_pixels",
            disable_env_checker=True,
        )
        self._next_seed: int | None = seed
        super().__init__(spec, seed)

    def simulator_seed(self, seed: int) -> None:
        """Let the next reset seed the tracks; those after it continue gymnasium's own random numbers."""
        self._next_seed = seed

    def random_state(self) -> dict[str, Any]:
        """The next reset's seed if it has one, else gymnasium's own random numbers."""
        if self._next_seed is not None:
            return {"seed": self._next_seed}
        return {"generator": generator_state(self._env.unwrapped.np_random)}

    def set_random_state(self, state: dict[str, Any]) -> None:
        """Set what the next reset draws its track from."""
        self._next_seed = state.get("seed")
        if self._next_seed is None:
            set_generator_state(self._env.unwrapped.np_random, state["generator"])

    def simulator_reset(self) -> np.ndarray:
        """Make a track and draw the car on its start."""
        with _undrawn(self._env.unwrapped):
            self._env.reset(seed=self._next_seed)
        self._next_seed = None
        return self._render()

    def simulator_step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        """Repeat the action, sum the rewards, draw once."""
        steer, gas, brake = action
        command = np.array([steer, (gas + 1) / 2, (brake + 1) / 2])
        reward, terminated, truncated = 0.0, False, False
        with _undrawn(self._env.unwrapped):
            for _ in range(self.env_spec.action_repeat):
                _, r, terminated, truncated, _ = self._env.step(command)
                reward += float(r)
                if terminated or truncated:
                    break
        return self._render(), reward, terminated, truncated

    def _render(self) -> np.ndarray:
        with self.times("render"):
            frame = self._env.render()
        if self.env_spec.frame_height == NATIVE_SIZE:
            return frame
        size = (self.env_spec.frame_width, self.env_spec.frame_height)
        scaled = self._pygame.transform.smoothscale(self._env.unwrapped.surf, size)
        return self._pygame.surfarray.array3d(scaled).transpose(1, 0, 2)


@contextmanager
def _undrawn(simulator: Any) -> Iterator[None]:
    """Step gymnasium's simulator without drawing, which is 99 % of a step's time and does not touch the physics."""
    simulator._render = lambda mode: None
    try:
        yield
    finally:
        del simulator._render
