"""How much each kept row counts in the fine-tuning loss."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from covr_lightning.errors import ConfigError, WrongResult
from covr_lightning.finetune.given import one_per_row
from covr_lightning.random_state import check_seed


class Weight(ABC):
    """Turns the scores of the kept rows into weights."""

    @abstractmethod
    def __call__(self, scores: Tensor) -> Tensor:
        """Weights (N,) ≥ 0 of scores (N,)."""

    def of(self, scores: Tensor) -> Tensor:
        """The weights (N,) float32 of scores (N,).

        Raises:
            WrongResult: They are not what they should be.
        """
        weights = one_per_row(self(scores), len(scores), type(self).__name__, "weight", "tensor")
        wrong = weights[~(torch.isfinite(weights) & (weights >= 0))]
        if len(wrong):
            raise WrongResult(
                f"{type(self).__name__} (weight of ProgressiveFineTune) gave a row the weight {wrong[0].item():g}; "
                "weights are numbers of 0 or more."
            )
        return weights.float()

    def reseed(self, seed: int) -> None:  # noqa: B027 (most weights draw nothing)
        """Begin a round: what is drawn in it follows from `seed` alone, so that a resumed run draws the same."""


class RALW(Weight):
    """Return-aware loss weight (Eq. 6): w = max(ḡ, 0), ḡ the kept returns mapped to [−1, 1] by their extremes.

    So the row with the highest return weighs 1, and every row below the middle of the kept range weighs 0: it is not
    trained on. If all returns are equal, each row weighs 1. A few very high returns leave few rows a weight; with
    `lowest` 0 only the lowest row weighs 0.

    Args:
        lowest: What the lowest return is mapped to, in [−1, 1). Paper: −1.

    Raises:
        ConfigError: `lowest` lies elsewhere.
    """

    def __init__(self, lowest: float = -1.0) -> None:
        if not -1 <= lowest < 1:
            raise ConfigError(f"RALW's lowest is {lowest}; it must lie in -1 to 1, 1 excluded.")
        self.lowest = lowest

    def __call__(self, scores: Tensor) -> Tensor:
        """Weights (N,) in [0, 1] of returns (N,)."""
        g = torch.as_tensor(scores).to(torch.float64).reshape(-1)
        if g.numel() == 0 or bool((g == g[0]).all()):
            return torch.ones(g.numel())
        g_bar = (1 - self.lowest) * (g - g.min()) / (g.max() - g.min()) + self.lowest
        return g_bar.clamp(min=0).to(torch.float32)


class UniformWeight(Weight):
    """Every row weighs 1 (ablation M8)."""

    def __call__(self, scores: Tensor) -> Tensor:
        """Ones (N,)."""
        return torch.ones(len(scores))


class RandomWeight(Weight):
    """Weights drawn from U(0, 1) (ablation M9).

    Args:
        seed: Added to the round's seed.

    Raises:
        ConfigError: `seed` is none.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = check_seed("weight.seed", seed)
        self.generator = torch.Generator().manual_seed(seed)

    def reseed(self, seed: int) -> None:
        """Begin a round."""
        self.generator.manual_seed(self.seed + seed)

    def __call__(self, scores: Tensor) -> Tensor:
        """Random weights (N,)."""
        return torch.rand(len(scores), generator=self.generator)


class ScoreAsWeight(Weight):
    """The scores are the weights, for rows that were weighed before they were written."""

    def __call__(self, scores: Tensor) -> Tensor:
        """The scores (N,).

        Raises:
            ConfigError: One is negative, or no number.
        """
        weights = torch.as_tensor(scores).to(torch.float32)
        if len(weights) and not bool((weights >= 0).all()):
            raise ConfigError(
                f"ScoreAsWeight (YAML key weight) got the score {float(weights.min()):g}; as weights, scores must be "
                "0 or more. RALW makes weights of any."
            )
        return weights
