"""A benchmark's process as `covr` makes its own."""

from __future__ import annotations

import argparse
import os
import sys

from covr_lightning.allocator import keep_freed_memory
from covr_lightning.cli import WAIT_POLICY


def as_covr_runs() -> None:
    """Have OpenMP's threads soon sleep, where the user has not said otherwise, and keep freed memory.

    How threads wait is read when PyTorch is imported, so the process begins anew if it has not been said.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.update(WAIT_POLICY | os.environ)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    keep_freed_memory()


def at_least(least: int) -> type:
    """The type of a command line's whole numbers that are not below one."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"it is {value} and must be {least} or more")
        return value

    return number  # type: ignore[return-value]
