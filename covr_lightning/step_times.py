"""Where a run's time goes, part by part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class StepTimes:
    """Adds up the seconds of named parts, each without the parts inside it.

    Cheap enough to be left on: two readings of the clock and a few additions a part, some 2 µs. These are the host's
    seconds: a GPU's work is counted where the host waits for it.

    Attributes:
        seconds: Seconds of each part.
        counts: How often each part was entered.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self._inside = 0.0  # seconds of finished parts at the level that is open

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a part.

        Args:
            name: Its name; the same one adds up.
        """
        start, outside = time.perf_counter(), self._inside
        self._inside = 0.0
        try:
            yield
        finally:
            passed = time.perf_counter() - start
            self._add(name, passed - self._inside)
            self._inside = outside + passed

    def laps(self) -> Callable[[str], None]:
        """Time parts that follow each other: call what this returns at the end of each, with its name."""
        begun = [time.perf_counter(), self._inside]

        def lap(name: str) -> None:
            now = time.perf_counter()
            passed = now - begun[0] - (self._inside - begun[1])
            self._add(name, passed)
            self._inside += passed
            begun[:] = now, self._inside

        return lap

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.counts[name] = self.counts.get(name, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        """Seconds and counts."""
        return {"seconds": dict(self.seconds), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set what :meth:`state_dict` gave."""
        self.seconds, self.counts = dict(state["seconds"]), dict(state["counts"])
