"""The operations of an update, as the benchmark's floor counts them."""

from __future__ import annotations

from benchmarks.update import flops_of, ours


def test_the_convolutions_operations_by_hand() -> None:
    # 84 → 41 → 39 → 37 → 35, 3×3, 32 filters, over 9 channels and then 32; two operations a product.
    first, *others = (2 * side**2 * 32 * 9 * channels for side, channels in ((41, 9), (39, 32), (37, 32), (35, 32)))
    # A pair of updates: o' by both encoders and o, twice; o once more for the actor. Backward twice; nothing flows into
    # the images.
    forward, backward = first + sum(others), first + 2 * sum(others)
    assert flops_of(ours(batch=2)[1])["convolution"] == 2 * (7 * forward + 2 * backward) / 2
