"""Time and memory of a call, measured alike on the CPU and on a GPU."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from covr_lightning.memory import PeakMemory


@dataclass(frozen=True)
class Measured:
    """What repeated calls took.

    Attributes:
        seconds: Wall time of each call after the warm-up.
        working_mb: Peak memory of a call above what was taken before it, 10⁶ bytes; NaN where it cannot be measured.
    """

    seconds: tuple[float, ...]
    working_mb: float

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def deviation(self) -> float:
        """Standard deviation of the seconds; 0 for a single call."""
        return statistics.stdev(self.seconds) if len(self.seconds) > 1 else 0.0


def measure(call: Callable[[int], object], repeats: int, device: torch.device) -> Measured:
    """Call twice to warm up and to see the memory, then `repeats` times against the clock.

    Args:
        call: Gets its own number, 0 to `repeats` − 1; the two calls before get 0.
        repeats: At least 1.
        device: What the call computes on.
    """
    call(0)
    working = working_megabytes(lambda: call(0), device)
    return Measured(tuple(seconds(lambda n=n: call(n), device) for n in range(repeats)), working)  # type: ignore[misc]


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call; a GPU's queue is empty before and after."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for a GPU's queue; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def working_megabytes(call: Callable[[], object], device: torch.device) -> float:
    """Peak memory of one call above what was taken before it, 10⁶ bytes.

    On a GPU it is what PyTorch's allocator handed out. On the CPU it is the process's resident memory, whose mark Linux
    lets a process reset; other systems give NaN. Freed memory is given back before, but by glibc for the main thread
    only, so the call gets one thread. Python's garbage is collected before, or it might be while the call runs.
    """
    gc.collect()
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    synchronize(device)
    peak = PeakMemory(device)
    before = peak.megabytes()
    call()
    synchronize(device)
    torch.set_num_threads(threads)
    return peak.megabytes() - before


def weights_megabytes(model: torch.nn.Module) -> float:
    """Size of a module's parameters and buffers, 10⁶ bytes; tied weights count once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / 1e6
