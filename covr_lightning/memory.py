"""The highest memory use of a part of a run."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import torch

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """Highest memory use from now on.

    On a GPU: what PyTorch's allocator had given out at once on it. Neither the CUDA context (some 0.5 GB) nor what a
    paged optimizer holds is in it, for these are not PyTorch's. Elsewhere: the whole process's resident memory, which
    Linux alone can reset and tell. What the process has freed and kept
    (:func:`~covr_lightning.allocator.keep_freed_memory`) is first given back, or an earlier peak would count again;
    glibc does that for what the main thread has freed.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_known = True
        if device.type == "cuda":
            torch.cuda.init()  # before it, there is nothing that could be reset
            torch.cuda.reset_peak_memory_stats(device)
            return
        _give_back_freed_memory()
        try:
            _CLEAR_REFS.write_text("5")  # sets the peak back to what is resident now
        except OSError:
            self._is_known = False

    def megabytes(self) -> float:
        """The peak so far in MB (10⁶ bytes); NaN without a GPU where /proc/self/clear_refs cannot be written."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 1e6
        if not self._is_known:
            return math.nan
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6


def _give_back_freed_memory() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        return
