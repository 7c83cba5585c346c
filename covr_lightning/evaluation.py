"""Playing whole episodes, and what is measured of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tensordict import TensorDict
from torch import Tensor
from torchmetrics import Metric

from covr_lightning import processes
from covr_lightning.envs.base import PixelEnv
from covr_lightning.errors import EnvironmentLost, WrongResult

#: Deterministic actions (B, A) of observations (B, C, H, W) uint8 and of the actions before them.
DeterministicPolicy = Callable[..., Tensor]

#: Names that an evaluation has itself.
_TAKEN = ("return", "episodes", "env_steps")


@dataclass
class EpisodeResult:
    """One played episode.

    Attributes:
        episode_return: Undiscounted sum of rewards.
        agent_steps: Its length in agent steps.
        metrics: What else the environment measures of it, by name.
        frames: Newest frame before each step and at the end, (3, H, W) uint8, if recorded.
        actions: Action of each step (A,), if recorded.
        rewards: Reward of each step, if recorded.
    """

    episode_return: float
    agent_steps: int
    metrics: dict[str, float] = field(default_factory=dict)
    frames: list[Tensor] = field(default_factory=list)
    actions: list[Tensor] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


#: How often an evaluation episode is played again because its simulator was lost.
REPLAYS = 3


def play_episode(policy: DeterministicPolicy, env: PixelEnv, seed: int, record: bool = False) -> EpisodeResult:
    """Play one episode with a deterministic policy; one that its simulator cut is played again.

    Args:
        policy: ``policy(pixels (1, C, H, W) uint8, deterministic=True, previous_action=…)`` → actions (1, A); the
            previous action is what it gave at the step before (1, A), None at the episode's first step.
        env: The environment; seeded and reset here.
        seed: The episode's seed.
        record: Keep frames, actions and rewards.

    Raises:
        EnvironmentLost: The simulator was lost again and again.
    """
    for _ in range(1 + REPLAYS):
        lost = env.lost_episodes
        result = _play(policy, env, seed, record)
        if env.lost_episodes == lost:
            return result
    raise EnvironmentLost(f"The simulator was lost in {1 + REPLAYS} evaluation episodes in a row")


@torch.no_grad()
def _play(policy: DeterministicPolicy, env: PixelEnv, seed: int, record: bool) -> EpisodeResult:
    env.simulator_seed(seed)
    state = env.reset()
    result = EpisodeResult(0.0, 0, frames=[state["pixels"][-3:].clone()] if record else [])
    action: Tensor | None = None
    while True:
        action = policy(state["pixels"][None], deterministic=True, previous_action=action).cpu()
        state = env.step(TensorDict({"pixels": state["pixels"], "action": action[0]}))["next"]
        result.episode_return += float(state["reward"])
        result.agent_steps += 1
        if record:
            result.frames.append(state["pixels"][-3:].clone())
            result.actions.append(action[0].clone())
            result.rewards.append(float(state["reward"]))
        if bool(state["done"]):
            result.metrics = env.episode_metrics()
            return result


class EpisodeStatistics(Metric):
    """Mean and standard deviation (over episodes, population) of returns and of what else is measured of an episode.

    Of a run's processes each plays every n-th episode; the figures are those of all episodes in their order, however
    many processes there are, and whether or not each has played one.
    """

    full_state_update = False
    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)  # torchmetrics would wait for processes without an episode
        self.names: list[str] = ["return"]
        self.add_state("values", default=[], dist_reduce_fx=None)

    def update(self, episode: EpisodeResult) -> None:
        """Add one episode.

        Raises:
            WrongResult: An environment of somebody's own measured something that it cannot.
        """
        for name, value in episode.metrics.items():
            if name in _TAKEN or name.endswith("_std") or not isinstance(value, float | int):
                raise WrongResult(
                    f"The environment's episode_metrics gave {name!r}: {value!r}; a name can be any but "
                    f"{', '.join(_TAKEN)} and what ends with _std, and a value is a number."
                )
        measured = {"return": episode.episode_return, **episode.metrics}
        if not self.values:
            self.names = list(measured)
        elif set(measured) != set(self.names):
            raise WrongResult(
                f"The environment's episode_metrics gave {', '.join(episode.metrics) or 'nothing'} after an episode "
                f"with {', '.join(self.names[1:]) or 'nothing'}; the names must stay the same."
            )
        self.values.append(torch.tensor([[measured[name] for name in self.names]], dtype=torch.float64))

    def compute(self) -> dict[str, Tensor]:
        """``return`` (mean), ``return_std``, the same for every other name, and ``episodes``; NaN without episodes."""
        everyone = processes.gather((self.names, self.values))
        names = max((names for names, _ in everyone), key=len)
        in_turn = itertools.chain(*itertools.zip_longest(*(own for _, own in everyone)))
        episodes = [episode for episode in in_turn if episode is not None]
        values = torch.cat(episodes) if episodes else torch.zeros(0, len(names), dtype=torch.float64)
        mean, std = values.mean(0), values.std(0, correction=0)
        result = {"episodes": torch.tensor(len(values))}
        for i, name in enumerate(names):
            result |= {name: mean[i], f"{name}_std": std[i]}
        return result
