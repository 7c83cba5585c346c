"""What filters, weights and scores give, which may be of somebody's own classes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from covr_lightning.errors import ConfigError


def one_per_row(given: object, rows: int, part: str, slot: str, kind: Literal["tensor", "bool tensor"]) -> Tensor:
    """What a part gave, if it is a tensor with one value for each row.

    Args:
        given: What it gave.
        rows: How many there are.
        part: The part, as the message names it.
        slot: Its key in ProgressiveFineTune.
        kind: What it must be.

    Raises:
        ConfigError: It is something else.
    """
    of_kind = isinstance(given, Tensor) and (kind == "tensor" or given.dtype == torch.bool)
    if isinstance(given, Tensor) and of_kind and given.shape == (rows,):
        return given
    was = f"a {type(given).__name__}"
    if isinstance(given, Tensor):
        was = f"{str(given.dtype).removeprefix('torch.')} of shape {tuple(given.shape)}"
    raise ConfigError(
        f"{part} ({slot} of ProgressiveFineTune) gave {was} for {rows} rows; it must give a {kind} of shape ({rows},)."
    )
