"""Which kept rows measure the VLM and are not trained on."""

from __future__ import annotations

import torch
from torch import Tensor

#: Agent steps beside a held-out stretch of an episode that are neither trained on nor measured.
GAP = 8


def hold_out(kept: Tensor, share: float, episode: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Divide kept rows, by torch's global generator.

    Rows that follow each other show nearly the same and have like actions: a VLM that remembers the one answers the
    other. So whole episodes are held out, in random order, and of the last one as long a stretch as is lacking; rows
    within :data:`GAP` agent steps of that stretch are left out, unless less than half of the others would remain.

    Args:
        kept: Rows of D_f (K,) int64, ascending, K ≥ 1.
        share: Of the kept rows to hold out, in [0, 1); at least one row then if it is above 0, and never all.
        episode: Which episode each row of D_f is of (N,), rows of one in the order of time; unknown by default, which
            holds out rows one by one.

    Returns:
        Rows that measure, and rows to train on, both in random order.
    """
    n = min(max(1, round(share * len(kept))), len(kept) - 1) if share else 0
    if episode is None or not n:
        order = _shuffled(kept)
        return order[:n], order[n:]
    of_kept = episode[kept]
    parts: list[Tensor] = []
    for number in _shuffled(of_kept.unique()):
        rows, lacking = kept[of_kept == number], n - sum(map(len, parts))
        begin = int(torch.randint(0, max(1, len(rows) - lacking + 1), ()))
        parts.append(rows[begin : begin + lacking])
        if len(rows) >= lacking:
            break
    held_out, last = torch.cat(parts), parts[-1]
    others = kept[~torch.isin(kept, held_out)]
    beside = (episode[others] == episode[last[0]]) & (others >= last[0] - GAP) & (others <= last[-1] + GAP)
    training = others[~beside] if 2 * int((~beside).sum()) >= len(others) else others
    return _shuffled(held_out), _shuffled(training)


def _shuffled(values: Tensor) -> Tensor:
    return values[torch.randperm(len(values))]
