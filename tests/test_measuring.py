"""Time and memory of calls whose cost is known."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from covr_lightning.measuring import Measured, measure, weights_megabytes, working_megabytes

CPU = torch.device("cpu")


def test_calls_are_numbered_and_timed() -> None:
    numbers: list[int] = []

    def call(number: int) -> None:
        numbers.append(number)
        time.sleep(0.02)

    measured = measure(call, 3, CPU)
    assert numbers == [0, 0, 0, 1, 2]
    assert len(measured.seconds) == 3
    assert all(0.02 <= each < 1 for each in measured.seconds)


def test_median_and_deviation_by_hand() -> None:
    # Mean of 1, 2, 6 is 3; squares of the deviations 4 + 1 + 9 = 14, over n − 1 = 2: √7.
    measured = Measured((1.0, 2.0, 6.0), 0.0)
    assert measured.median == 2.0
    assert measured.deviation == pytest.approx(7**0.5)
    assert Measured((1.0,), 0.0).deviation == 0.0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a call's own peak")
def test_working_memory_of_a_known_allocation_even_if_it_was_freed_before() -> None:
    def call() -> None:
        torch.ones(50_000_000 // 4)

    for _ in range(3):
        assert working_megabytes(call, CPU) == pytest.approx(50, abs=5)
    held = torch.ones(50_000_000 // 4)
    assert working_megabytes(lambda: held.sum(), CPU) < 5  # taken before


class Cycle:
    """Holds memory until the garbage is collected."""

    def __init__(self) -> None:
        self.block = torch.ones(50_000_000 // 4)
        self.itself = self


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a call's own peak")
def test_garbage_that_is_collected_during_the_call_does_not_hide_it() -> None:
    def call() -> None:
        gc.collect()
        torch.ones(50_000_000 // 4)

    Cycle()
    assert working_megabytes(call, CPU) == pytest.approx(50, abs=5)


@pytest.mark.gpu
def test_working_memory_on_a_gpu() -> None:
    gpu = torch.device("cuda")
    held = torch.ones(10_000_000, device=gpu)
    assert working_megabytes(lambda: held + 1, gpu) == pytest.approx(40, abs=2)


def test_tied_weights_count_once() -> None:
    first, second = nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)
    assert weights_megabytes(nn.Sequential(first, second)) == pytest.approx(2 * 400 / 1e6)
    second.weight = first.weight
    assert weights_megabytes(nn.Sequential(first, second)) == pytest.approx(400 / 1e6)
