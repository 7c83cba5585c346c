"""Signals that stop a run, without a run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from covr_lightning import processes
from covr_lightning.stopping import RunStopped, StopSignals


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    signals = StopSignals()
    signals.install()
    yield signals
    signals.uninstall()


def test_a_signal_ends_a_wait(signals: StopSignals) -> None:
    timer, began = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)), time.monotonic()
    timer.start()
    signals.sleep(60)
    signals.sleep(60)  # nor does it wait again
    assert time.monotonic() - began < 30
    timer.join()
    assert signals.requested == signal.SIGTERM


def test_a_signal_that_comes_while_the_others_are_waited_for_counts_the_next_time(
    signals: StopSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def largest(value: int) -> int:
        if not value:
            os.kill(os.getpid(), signal.SIGUSR1)
        return value  # the others have had none

    monkeypatch.setattr(processes, "largest", largest)
    signals.check_together()  # they go on, and so must this one
    with pytest.raises(RunStopped) as stopped:
        signals.check_together()
    assert stopped.value.signum == signal.SIGUSR1


def test_another_processs_signal_stops_this_one(signals: StopSignals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "largest", lambda value: max(value, signal.SIGTERM))
    with pytest.raises(RunStopped):
        signals.check_together()
    assert signals.requested == signal.SIGTERM
