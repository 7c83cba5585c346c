"""The driving environment: one scenario, any simulator, frames from the front camera."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import Any, Literal

import numpy as np

from covr_lightning.envs.base import EnvFactory, EnvSpec, PixelEnv
from covr_lightning.envs.driving.rules import Progress, advance, tick_reward
from covr_lightning.envs.driving.scenario import Scenario, load_scenario
from covr_lightning.envs.driving.simulator import DrivingSimulator, SimulatorLost, SimulatorTaken
from covr_lightning.errors import ConfigError
from covr_lightning.random_state import generator_state, set_generator_state

logger = logging.getLogger(__name__)

RepeatReward = Literal["sum", "mean"]
RepeatDistance = Literal["integrated", "last"]


class DrivingFactory(EnvFactory):
    """What the driving environments have in common.

    Args:
        scenario: Name of a shipped scenario, or path of a YAML file.
        action_repeat: Simulator ticks (environment steps) per agent step.
        frame_stack: Frames in one observation.
        repeat_reward: The reward of an agent step is the ``"sum"`` over its ticks, or their ``"mean"`` (what the
            authors' earlier code does).
        repeat_distance: The driving distance counts every tick (``"integrated"``), or only the last tick of an agent
            step (``"last"``, what the authors' earlier code does).
    """

    def __init__(
        self,
        scenario: str = "highway",
        action_repeat: int = 4,
        frame_stack: int = 3,
        repeat_reward: RepeatReward = "sum",
        repeat_distance: RepeatDistance = "integrated",
    ) -> None:
        for name, value in (("action_repeat", action_repeat), ("frame_stack", frame_stack)):
            if value < 1:
                raise ConfigError(f"data.env.{name} is {value}; it must be at least 1.")
        self.scenario = load_scenario(scenario)
        self.action_repeat = action_repeat
        self.frame_stack = frame_stack
        self.repeat_reward = repeat_reward
        self.repeat_distance = repeat_distance

    @property
    def spec(self) -> EnvSpec:
        """Shapes and units; known without a simulator."""
        return EnvSpec(
            task=self.scenario.task,
            frame_height=self.scenario.camera.size,
            frame_width=self.scenario.camera.size,
            frame_stack=self.frame_stack,
            action_dim=2,
            action_repeat=self.action_repeat,
            episode_env_steps=self.scenario.rules.max_env_steps,
        )

    @abstractmethod
    def simulator(self, seed: int) -> DrivingSimulator:
        """Build the simulator.

        Args:
            seed: Seed of everything random.
        """

    def make(self, seed: int) -> DrivingEnv:
        """Build the environment.

        Args:
            seed: Seed of traffic, pedestrians and starts.
        """
        return DrivingEnv(self.spec, self.simulator(seed), seed, self.repeat_reward, self.repeat_distance)


class DrivingEnv(PixelEnv):
    """A scenario as an environment. The action is [steer, throttle], both in [−1, 1].

    Args:
        spec: Shapes and units.
        simulator: Simulates the scenario.
        seed: Seed.
        repeat_reward: See :class:`DrivingFactory`.
        repeat_distance: See :class:`DrivingFactory`.
    """

    def __init__(
        self,
        spec: EnvSpec,
        simulator: DrivingSimulator,
        seed: int,
        repeat_reward: RepeatReward = "sum",
        repeat_distance: RepeatDistance = "integrated",
    ) -> None:
        self.simulator = simulator
        self.repeatable = simulator.repeatable
        self.scenario: Scenario = simulator.scenario
        self.repeat_reward = repeat_reward
        self.repeat_distance = repeat_distance
        self.progress = Progress()
        self._distance = self._collision = 0.0
        self._lane_invasions = 0
        self._frame = np.zeros((spec.frame_height, spec.frame_width, 3), np.uint8)
        super().__init__(spec, seed)

    def simulator_seed(self, seed: int) -> None:
        """Seed traffic, pedestrians and starts."""
        self.simulator.seed(seed)

    def random_state(self) -> dict[str, Any]:
        """The simulator's random numbers."""
        return generator_state(self.simulator.rng)

    def set_random_state(self, state: dict[str, Any]) -> None:
        """Set the simulator's random numbers."""
        set_generator_state(self.simulator.rng, state)

    def simulator_reset(self) -> np.ndarray:
        """Start an episode."""
        self.simulator.reset()
        self.progress = Progress()
        self._distance = self._collision = 0.0
        self._lane_invasions = 0
        self._frame = self._picture()
        return self._frame

    def simulator_step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        """Repeat [steer, throttle]; a simulator that is lost on the way truncates the episode."""
        steer, throttle = float(action[0]), float(action[1])
        dt = self.scenario.tick_seconds
        rewards: list[float] = []
        distance, self.step_lost = 0.0, False
        try:
            for _ in range(self.env_spec.action_repeat):
                tick = self.simulator.tick(steer, throttle)
                rewards.append(tick_reward(tick, steer, self.scenario.reward, dt))
                distance = tick.speed * dt + (distance if self.repeat_distance == "integrated" else 0.0)
                self._collision += tick.collision
                self._lane_invasions += tick.lane_invasions
                self.progress = advance(self.progress, tick, self.scenario.rules)
                if self.progress.ended:
                    break
            self._frame = self._picture()
        except SimulatorLost as error:
            self.step_lost = True
            if not isinstance(error, SimulatorTaken):
                self.lost_episodes += 1
                logger.warning(
                    "The simulator was lost (%s); the episode is cut. So far: %d.", error, self.lost_episodes
                )
            return self._frame, self._over_repeats(rewards), False, True
        finally:
            self._distance += distance
        return self._frame, self._over_repeats(rewards), self.progress.terminated, self.progress.truncated

    def _picture(self) -> np.ndarray:
        with self.times("render"):
            return self.simulator.frame()

    def _over_repeats(self, rewards: list[float]) -> float:
        if not rewards:
            return 0.0
        return sum(rewards) if self.repeat_reward == "sum" else sum(rewards) / len(rewards)

    def episode_metrics(self) -> dict[str, float]:
        """Of the running episode: driving distance DD (m), collision impulse (N·s), lane markings crossed."""
        return {
            "distance": self._distance,
            "collision": self._collision,
            "lane_invasions": float(self._lane_invasions),
        }

    def close(self, **kwargs: bool) -> None:
        """Close the simulator."""
        self.simulator.close()
        super().close(**kwargs)
