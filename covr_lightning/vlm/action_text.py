"""Actions as text and back: `action:[0.02, -0.98]`."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MAX_DIGITS = 12
DECIMALS = 2

_NUMBER = rf"-?(?=\.?[0-9])[0-9]{{0,{MAX_DIGITS}}}(?:\.[0-9]{{0,{MAX_DIGITS}}})?"
_LIST_OF_NUMBERS = re.compile(rf"action:[ ]*\[[ ]*({_NUMBER}(?:[ ]*,[ ]*{_NUMBER})*)[ ]*\]")

Bounds = float | Sequence[float] | np.ndarray | Tensor


class ActionText:
    """Codec between one action vector and the answer format of the method.

    Text carries two decimals, so a round trip is exact to 0.005 per dimension. Parsing is strict: anything but the
    full format with exactly `size` plain decimal numbers is invalid, which lets a caller mask the row instead of
    guessing an action.

    Args:
        low: lower bound per dimension, shape (A,); a float means one dimension.
        high: upper bound per dimension, shape (A,).

    Raises:
        ValueError: if the bounds differ in length, are empty, not finite, or low is above high.
    """

    def __init__(self, low: Bounds, high: Bounds) -> None:
        self.low = torch.as_tensor(low, dtype=torch.float32).detach().cpu().reshape(-1).clone()
        self.high = torch.as_tensor(high, dtype=torch.float32).detach().cpu().reshape(-1).clone()
        if self.low.numel() == 0 or self.low.shape != self.high.shape:
            raise ValueError(
                f"action bounds need the same length of at least 1, got {self.low.numel()} low and "
                f"{self.high.numel()} high values"
            )
        if not bool(torch.isfinite(self.low).all() and torch.isfinite(self.high).all()):
            raise ValueError(f"action bounds must be finite, got {self.low.tolist()} and {self.high.tolist()}")
        if bool((self.low > self.high).any()):
            raise ValueError(f"action bounds need low <= high, got {self.low.tolist()} and {self.high.tolist()}")

    @property
    def size(self) -> int:
        """Number of action dimensions A."""
        return self.low.numel()

    def along_bounds(self, count: int) -> Tensor:
        """Actions (count, A) at even steps from the lower to the upper bounds."""
        return self.low + torch.linspace(0.0, 1.0, count)[:, None] * (self.high - self.low)

    def encode(self, action: float | Sequence[float] | np.ndarray | Tensor) -> str:
        """Writes one action.

        Args:
            action: shape (A,); clipped to the bounds and rounded to two decimals, never "-0.00".

        Raises:
            ValueError: if the action has another size or is not finite.
        """
        values = torch.as_tensor(action, dtype=torch.float32).detach().cpu().reshape(-1)
        if values.numel() != self.size:
            raise ValueError(f"action has {values.numel()} values, expected {self.size}")
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"action must be finite, got {values.tolist()}")
        clipped = torch.maximum(torch.minimum(values, self.high), self.low)
        return "action:[" + ", ".join(_two_decimals(value) for value in clipped.tolist()) + "]"

    def decode(self, text: str) -> tuple[Tensor, bool]:
        """Reads one action.

        Args:
            text: the VLM's answer; surrounding whitespace is ignored.

        Returns:
            The action clipped to the bounds, shape (A,) float32, and True; or zeros clipped to the bounds and
            False when the text is not exactly in the format. Never raises for any string.
        """
        match = _LIST_OF_NUMBERS.fullmatch(text.strip())
        if match is not None:
            numbers = match.group(1).split(",")
            if len(numbers) == self.size:
                values = torch.tensor([float(number) for number in numbers], dtype=torch.float32)
                return torch.maximum(torch.minimum(values, self.high), self.low), True
        zeros = torch.zeros(self.size)
        return torch.maximum(torch.minimum(zeros, self.high), self.low), False


def _two_decimals(value: float) -> str:
    text = f"{value:.{DECIMALS}f}"
    return text.removeprefix("-") if float(text) == 0.0 else text


def answer_format(names: Sequence[str]) -> str:
    """The format placeholder that prompts show, e.g. `action:[shoulder, wrist]`."""
    return "action:[" + ", ".join(names) + "]"
