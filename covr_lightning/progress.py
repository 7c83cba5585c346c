"""Bars that show how far a part of a run has come which may take long: asking the VLM, fine-tuning it."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from covr_lightning import processes

#: Seconds between two lines where there is no terminal, and before the first one.
SECONDS_IN_A_LOG = 10.0


def bar(total: int, what: str, unit: str, shown: bool = True) -> tqdm[Any]:
    """A bar below the run's own, gone when it is closed; in a log only of what takes long.

    Args:
        total: Units to come.
        what: What is done.
        unit: What is counted.
        shown: Whether to show it at all; of several processes the first one does.
    """
    between, before = (0.1, 0.0) if sys.stderr.isatty() else (SECONDS_IN_A_LOG, SECONDS_IN_A_LOG)
    return tqdm(
        total=total, desc=what, unit=unit, leave=False, disable=not shown or processes.number() > 0,
        dynamic_ncols=True, miniters=1, mininterval=between, delay=before,
    )  # fmt: skip
