"""What the VLM is shown of an observation: its newest frames, side by side in one picture."""

from __future__ import annotations

from torch import Tensor


def side_by_side(pixels: Tensor, frames: int) -> Tensor:
    """The newest frames of stacked observations as one picture each, the oldest on the left.

    Args:
        pixels: (…, 3·k, H, W), the oldest frame first.
        frames: How many of the k, n.

    Returns:
        (…, 3, H, n·W); where n is 1, a view of the newest frame.
    """
    newest = pixels.unflatten(-3, (-1, 3)).narrow(-4, -frames, frames)  # (…, n, 3, H, W)
    return newest.movedim(-4, -2).flatten(-2)
