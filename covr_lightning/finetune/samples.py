"""Rows of D_f that the VLM is asked about before and after a round: what the paper's Fig. 6 and Fig. 9 look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn import functional as F

from covr_lightning.envs.base import EnvSpec
from covr_lightning.saving.files import in_place_of
from covr_lightning.vlm.vlm import Proposals

#: Frames kept of a round's samples, half of each kind, and their shorter side (the longer one is that of several frames
#: side by side): 8 · 3 · 64 · 64 bytes are 98 kB.
FRAMES, SHORTER_SIDE = 8, 64


@dataclass
class RoundSamples:
    """Some high-return and some low-return rows of one round's D_f, and the VLM's answers to them.

    High: kept rows that were held out of training, which the round asks about anyway, and whose score is at least the
    median of D_f (not every filter keeps by the score). Low: rows that the filter did not keep and whose score is at
    most the median; they cost ``count / 2`` answers before and after the round.

    Attributes:
        count: Rows at most, half of them high. 0 takes none and asks nothing.
        high: Rows of D_f (n,), indices.
        low: Rows of D_f (m,), indices.
        before: Answers to the high rows, then to the low ones, before the round.
        after: The same after it; None where nothing was trained.
    """

    count: int
    high: Tensor | None = None
    low: Tensor | None = None
    before: Proposals | None = None
    after: Proposals | None = None
    _of_held_out: Tensor | None = None  # where the high rows are among those held out

    def choose(self, scores: Tensor, kept: Tensor, held_out: Tensor, seed: int) -> None:
        """Choose the rows, without touching anyone's random state.

        Args:
            scores: (N,).
            kept: Indices of the kept rows.
            held_out: Indices of those held out of training, in random order.
            seed: Of the choice among the low rows.
        """
        half, median = self.count // 2, scores.double().median()
        self._of_held_out = (scores[held_out] >= median).nonzero().squeeze(-1)[:half]
        low = scores <= median
        low[kept] = False
        candidates = low.nonzero().squeeze(-1)
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
        self.high, self.low = held_out[self._of_held_out], candidates[order[:half]]

    def join(self, held_out: Proposals | None, low: Proposals | None) -> Proposals | None:
        """The answers to the chosen rows, of those to all held-out rows and to the low ones; None if none is chosen."""
        assert self._of_held_out is not None, "chosen before it is asked"
        of_high = None
        if held_out is not None and len(self._of_held_out):
            of_high = Proposals(*(column[self._of_held_out.to(column.device)] for column in held_out))
        parts = [part for part in (of_high, low) if part is not None]
        return Proposals(*(torch.cat(columns).cpu() for columns in zip(*parts, strict=True))) if parts else None

    def save(self, path: Path, rows: TensorDictBase, scores: Tensor, spec: EnvSpec) -> None:
        """Write them, complete or not at all; nothing if nothing was asked.

        Columns of the n + m rows: ``high`` bool, ``score``, ``action`` (A,), ``reward`` where D_f has it, ``before``
        (A,), ``before_valid`` and ``before_answered`` bool and, where something was trained, the same of ``after``;
        beside them ``frames`` (k, 3, h, w) uint8, reduced, of the rows ``frame_rows`` (k,), and the bounds
        ``action_low``, ``action_high`` (A,).

        Args:
            path: The file.
            rows: D_f.
            scores: Its scores (N,).
            spec: The environment.
        """
        if self.before is None or self.high is None or self.low is None:
            return
        index = torch.cat([self.high, self.low])
        n, m = len(self.high), len(self.low)
        shown = torch.cat([torch.arange(min(n, FRAMES // 2)), n + torch.arange(min(m, FRAMES // 2))])
        columns = {
            "high": torch.arange(n + m) < n, "score": scores[index], "action": rows["action"][index],
            "before": self.before.actions, "before_valid": self.before.valid, "before_answered": self.before.answered,
            "frame_rows": shown, "frames": reduced(rows["frame"][index[shown]]),
            "action_low": torch.tensor(spec.action_low), "action_high": torch.tensor(spec.action_high),
        }  # fmt: skip
        if "reward" in rows.keys():  # noqa: SIM118 (a TensorDict)
            columns["reward"] = rows["reward"][index].reshape(-1)
        if self.after is not None:
            columns |= {
                "after": self.after.actions, "after_valid": self.after.valid, "after_answered": self.after.answered,
            }  # fmt: skip
        write_tensors(path, columns)


def reduced(frames: Tensor) -> Tensor:
    """Frames (k, 3, H, W) uint8 with the shorter side brought down to :data:`SHORTER_SIDE`, by area."""
    shorter = min(frames.shape[-2:])
    if not len(frames) or shorter <= SHORTER_SIDE:
        return frames
    size = [round(side * SHORTER_SIDE / shorter) for side in frames.shape[-2:]]
    return F.interpolate(frames.float(), size=size, mode="area").round().to(torch.uint8)


def write_tensors(path: Path, columns: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, complete or not at all; the folder is made."""
    with in_place_of(path) as part:
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in columns.items()}, part, metadata=metadata)
