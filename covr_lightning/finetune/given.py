"""What filters, weights and scores give, which may be of somebody's own classes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from covr_lightning.errors import WrongResult, described


def one_per_row(given: object, rows: int, part: str, slot: str, kind: Literal["tensor", "bool tensor"]) -> Tensor:
    """What a part gave, if it is a tensor with one value for each row.

    Args:
        given: What it gave.
        rows: How many there are.
        part: The part, as the message names it.
        slot: Its key in ProgressiveFineTune.
        kind: What it must be.

    Raises:
        WrongResult: It is something else.
    """
    of_kind = isinstance(given, Tensor) and (kind == "tensor" or given.dtype == torch.bool)
    if isinstance(given, Tensor) and of_kind and given.shape == (rows,):
        return given
    raise WrongResult(
        f"{part} ({slot} of ProgressiveFineTune) gave {described(given, Tensor)} for {rows} rows; it must give a "
        f"{kind} of shape ({rows},)."
    )
