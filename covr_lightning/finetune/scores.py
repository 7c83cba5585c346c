"""What rows of D_f are judged by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import Tensor

from covr_lightning.errors import WrongResult
from covr_lightning.finetune.given import one_per_row

#: min(Q₁, Q₂) of stacked frames (B, 3·k, H, W) uint8 and actions (B, A), as (B,).
QFunction = Callable[[Tensor, Tensor], Tensor]


class Score(ABC):
    """Scores finished rows of D_f.

    Attributes:
        needs_stack: Whether rows must hold the stacked observation (``pixels``) and not only the newest frame.
    """

    needs_stack: bool = False

    @abstractmethod
    def __call__(self, rows: TensorDictBase, q: QFunction) -> Tensor:
        """Scores (N,) of rows (N,) with ``g``, ``reward``, ``action`` and the frames."""

    def of(self, rows: TensorDictBase, q: QFunction) -> Tensor:
        """The scores (N,) on the CPU; arguments as those of a call.

        Raises:
            WrongResult: They are not what they should be.
        """
        scores = one_per_row(self(rows, q), len(rows), type(self).__name__, "score", "tensor")
        if not torch.isfinite(scores).all():
            raise WrongResult(
                f"{type(self).__name__} (score of ProgressiveFineTune) gave scores that are not finite for {len(rows)} "
                "rows; it must give finite numbers."
            )
        return scores.cpu()


class ReturnScore(Score):
    """The discounted return g_t (COVR)."""

    def __call__(self, rows: TensorDictBase, q: QFunction) -> Tensor:
        """Each row's g."""
        return rows["g"].reshape(-1)


class RewardScore(Score):
    """The reward after the action (ablation M6)."""

    def __call__(self, rows: TensorDictBase, q: QFunction) -> Tensor:
        """Each row's reward."""
        return rows["reward"].reshape(-1)


class QScore(Score):
    """min(Q₁, Q₂)(s, a) of the critics at the time of the round (ablation M7)."""

    needs_stack = True

    def __call__(self, rows: TensorDictBase, q: QFunction) -> Tensor:
        """Each row's Q."""
        parts = [q(part["pixels"], part["action"]).cpu() for part in rows.split(256)]
        return torch.cat(parts) if parts else torch.zeros(0)
