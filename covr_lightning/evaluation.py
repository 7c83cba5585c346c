"""Playing whole episodes, and what is measured of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tensordict import TensorDict
from torch import Tensor
from torchmetrics import Metric

from covr_lightning.envs.base import PixelEnv

#: Deterministic actions (B, A) of observations (B, C, H, W) uint8.
DeterministicPolicy = Callable[..., Tensor]


@dataclass
class EpisodeResult:
    """One played episode.

    Attributes:
        episode_return: Undiscounted sum of rewards.
        agent_steps: Its length in agent steps.
        frames: Newest frame after each step, (3, H, W) uint8, if recorded.
    """

    episode_return: float
    agent_steps: int
    frames: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def play_episode(policy: DeterministicPolicy, env: PixelEnv, seed: int, record: bool = False) -> EpisodeResult:
    """Play one episode with a deterministic policy.

    Args:
        policy: ``policy(pixels (1, C, H, W) uint8, deterministic=True)`` → actions (1, A).
        env: The environment; seeded and reset here.
        seed: The episode's seed.
        record: Keep the frames.
    """
    env.simulator_seed(seed)
    state = env.reset()
    frames = [state["pixels"][-3:].clone()] if record else []
    total, steps = 0.0, 0
    while True:
        action = policy(state["pixels"][None], deterministic=True)[0].cpu()
        state = env.step(TensorDict({"pixels": state["pixels"], "action": action}))["next"]
        total += float(state["reward"])
        steps += 1
        if record:
            frames.append(state["pixels"][-3:].clone())
        if bool(state["done"]):
            return EpisodeResult(total, steps, frames)


class EpisodeReturns(Metric):
    """Mean, standard deviation (over episodes, population) and number of episode returns."""

    full_state_update = False
    returns: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("returns", default=[], dist_reduce_fx="cat")

    def update(self, episode_return: Tensor) -> None:
        """Add one episode's return."""
        assert isinstance(self.returns, list), "a list until processes are reduced"
        self.returns.append(episode_return.reshape(1).double())

    def compute(self) -> dict[str, Tensor]:
        """``return`` (mean), ``return_std`` and ``episodes``; NaN without episodes."""
        returns = self.returns
        if isinstance(returns, list):
            returns = torch.cat(returns) if returns else torch.zeros(0, dtype=torch.float64)
        return {
            "return": returns.mean(),
            "return_std": returns.std(correction=0),
            "episodes": torch.tensor(returns.numel()),
        }
