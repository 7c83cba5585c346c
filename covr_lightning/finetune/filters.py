"""Which rows of D_f the VLM is fine-tuned on."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from covr_lightning.errors import ConfigError
from covr_lightning.finetune.given import one_per_row


class Filter(ABC):
    """Chooses rows by their score."""

    @abstractmethod
    def keep(self, scores: Tensor, entropy: float) -> Tensor:
        """Choose rows.

        Args:
            scores: One score per row (N,), the return g_t by default.
            entropy: The policy's entropy ε per action dimension (nats).

        Returns:
            (N,) bool, on the CPU.
        """

    def kept(self, scores: Tensor, entropy: float) -> Tensor:
        """The rows (K,) int64 that are kept, ascending; arguments as those of :meth:`keep`.

        Raises:
            WrongResult: :meth:`keep` gave something else than it should.
        """
        part, mask = f"{type(self).__name__}.keep", self.keep(scores.clone(), entropy)
        return one_per_row(mask, len(scores), part, "filter", "bool tensor").nonzero().squeeze(-1)

    def threshold(self, scores: Tensor, entropy: float) -> float:
        """The score that a row must exceed, in the scores' own unit; NaN where there is none."""
        return math.nan

    def reseed(self, seed: int) -> None:  # noqa: B027 (most filters draw nothing)
        """Begin a round: what is drawn in it follows from `seed` alone, so that a resumed run draws the same."""


class EDDF(Filter):
    """Exploration-driven dynamic filter (Eq. 5): keep z > τ = Median(z) + Sigmoid(ε)·IQR(z), z the z-scores of g.

    Sign. Eq. 5 as printed makes τ rise with the entropy ε; the paper's prose says that high entropy lowers it.
    ``sign="prose"`` takes Sigmoid(−ε).

    Comparison. z against τ(z) keeps exactly the rows that g against τ(g) keeps, because median and IQR move with any
    affine change: z-scoring itself changes nothing. ``compare="unscaled"`` is g against τ(g), without any z-scores
    (ablation M5), so it keeps the same rows. ``compare="raw"`` compares the raw g with τ computed on z, another reading
    of the paper's sentence, which keeps others.

    Median and quartiles are NumPy's (linear interpolation). Where the median is the highest score already (saturated
    rewards, or all scores equal), no score could exceed a τ of its own scale; τ is that score then, and the rows with
    it are kept. Where it is not, τ can still lie above the highest score, and nothing is kept: of scores that bunch
    below their maximum, as returns do under a good policy, the more the longer its episodes are beside 1/(1 − γ). There
    `at_time_limit` ``"bootstrap"`` of ProgressiveFineTune helps, as g no longer falls towards an episode's end; with
    ``sign="prose"`` τ is lower while ε is above 0, but not always low enough.

    Args:
        sign: ``"printed"`` or ``"prose"``.
        compare: ``"z"``, ``"raw"`` or ``"unscaled"``.
    """

    def __init__(
        self, sign: Literal["printed", "prose"] = "printed", compare: Literal["z", "raw", "unscaled"] = "z"
    ) -> None:
        if sign not in ("printed", "prose"):
            raise ConfigError(f"filter.sign is {sign!r}; it can be 'printed' or 'prose'.")
        if compare not in ("z", "raw", "unscaled"):
            raise ConfigError(f"filter.compare is {compare!r}; it can be 'z', 'raw' or 'unscaled'.")
        self.sign = sign
        self.compare = compare

    def keep(self, scores: Tensor, entropy: float) -> Tensor:
        """Rows above τ. Shapes as in :meth:`Filter.keep`; an empty buffer keeps nothing."""
        g = _as_vector(scores)
        if g.numel() == 0:
            return torch.zeros(0, dtype=torch.bool)
        if self._saturated(g):
            return g == g.max()
        z = (g - g.mean()) / g.std(correction=0)
        return (z if self.compare == "z" else g) > self._tau(g if self.compare == "unscaled" else z, entropy)

    def threshold(self, scores: Tensor, entropy: float) -> float:
        """τ in the unit of the scores: z-scores are turned back."""
        g = _as_vector(scores)
        if g.numel() == 0:
            return math.nan
        if self._saturated(g):
            return float(g.max())
        if self.compare == "unscaled":
            return float(self._tau(g, entropy))
        spread = g.std(correction=0)
        tau = self._tau((g - g.mean()) / spread, entropy)
        return float(tau * spread + g.mean()) if self.compare == "z" else float(tau)

    def _saturated(self, g: Tensor) -> bool:
        """Whether the scores have a median that is the highest of them; compared raw, whether they have no spread."""
        return bool((g.min() if self.compare == "raw" else torch.quantile(g, 0.5)) == g.max())

    def _tau(self, scores: Tensor, entropy: float) -> Tensor:
        q1, median, q3 = torch.quantile(scores, torch.tensor([0.25, 0.5, 0.75], dtype=scores.dtype))
        signed = entropy if self.sign == "printed" else -entropy
        return median + torch.sigmoid(torch.tensor(signed, dtype=scores.dtype)) * (q3 - q1)


class TopFraction(Filter):
    """Keep a fixed fraction of the rows, the best ones (ablations M2–M4).

    Args:
        fraction: Share of rows kept, in (0, 1].
    """

    def __init__(self, fraction: float) -> None:
        if not 0 < fraction <= 1:
            raise ConfigError(f"filter.fraction is {fraction}; it must lie above 0 and at most at 1.")
        self.fraction = fraction

    def keep(self, scores: Tensor, entropy: float) -> Tensor:
        """The ⌈fraction·N⌉ highest scores; the earlier row wins a tie."""
        g = _as_vector(scores)
        count = math.ceil(round(self.fraction * len(g), 6))  # 0.55·100 is 55.000000000000007
        best = torch.argsort(g, descending=True, stable=True)[:count]
        mask = torch.zeros(len(g), dtype=torch.bool)
        mask[best] = True
        return mask


class RandomSubset(Filter):
    """Keep as many rows as another filter would, but at random (ablation M1).

    Args:
        like: The filter whose count is matched; EDDF by default.
        seed: Added to the round's seed.
    """

    def __init__(self, like: Filter | None = None, seed: int = 0) -> None:
        self.like = like or EDDF()
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def reseed(self, seed: int) -> None:
        """Begin a round."""
        self.like.reseed(seed)
        self.generator.manual_seed(self.seed + seed)

    def keep(self, scores: Tensor, entropy: float) -> Tensor:
        """As many random rows as `like` keeps."""
        count = int(self.like.keep(scores, entropy).sum())
        mask = torch.zeros(len(scores), dtype=torch.bool)
        mask[torch.randperm(len(scores), generator=self.generator)[:count]] = True
        return mask


class KeepAll(Filter):
    """Keep every row."""

    def keep(self, scores: Tensor, entropy: float) -> Tensor:
        """All rows."""
        return torch.ones(len(scores), dtype=torch.bool)


def _as_vector(scores: Tensor) -> Tensor:
    """Scores as float64 on the CPU: a return and its threshold may differ by little."""
    return torch.as_tensor(scores).detach().cpu().to(torch.float64).reshape(-1)
