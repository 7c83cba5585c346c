"""Whole runs that a signal or something else ends before their time."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from covr_lightning.callbacks import RunCheckpoint

from covr_lightning.data.datamodule import ExperienceData
from tests.saving.whole_runs import summary
from tests.short_runs import env_steps_saved


def test_a_run_that_something_else_ends_is_saved(
    covr: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ExperienceData._store

    def ending(data: ExperienceData, collected: Any) -> Any:
        data.trainer.should_stop = data.counters.env_steps == 1480  # type: ignore[union-attr]
        return store(data, collected)

    monkeypatch.setattr(ExperienceData, "_store", ending)
    assert covr("fit") == 0
    assert env_steps_saved(tmp_path / "run" / "checkpoints" / "last.ckpt") == 1520


def test_a_finished_run_that_goes_on_is_not_finished_any_more(
    covr: Callable[..., int], tmp_path: Path, signal_at: Callable[[int, signal.Signals], Any]
) -> None:
    options, run = {"save_top_k": -1}, tmp_path / "run"
    assert covr("fit", options) == 0
    with signal_at(1480, signal.SIGTERM):
        again = covr("fit", options, "--ckpt_path", str(run / "checkpoints" / "best-env1000.ckpt"))
    assert again == 128 + signal.SIGTERM
    assert env_steps_saved(run / "checkpoints" / "last.ckpt") == 1520
    assert not (run / "summary.json").exists()
    assert covr("fit", options, "--ckpt_path", "last") == 0
    assert summary(run)["env_steps"] == env_steps_saved(run / "checkpoints" / "last.ckpt") == 2000


def test_a_second_signal_does_not_keep_a_run_from_being_saved(
    covr: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signal_at: Callable[[int, signal.Signals], Any],
) -> None:
    save, before = RunCheckpoint._save_last_checkpoint, signal.getsignal(signal.SIGUSR1)

    def signalled(checkpoint: RunCheckpoint, *arguments: Any) -> None:
        if checkpoint._saved_env_steps == 1000:
            os.kill(os.getpid(), signal.SIGUSR1)
        save(checkpoint, *arguments)

    monkeypatch.setattr(RunCheckpoint, "_save_last_checkpoint", signalled)
    seen: list[int] = []
    ignored = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))  # by default it would end us
    try:
        with signal_at(1480, signal.SIGUSR1):
            assert covr("fit") == 128 + signal.SIGUSR1
        assert env_steps_saved(tmp_path / "run" / "checkpoints" / "last.ckpt") == 1520
        assert not seen
        os.kill(os.getpid(), signal.SIGUSR1)  # the signals are given back
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, ignored)
    assert signal.getsignal(signal.SIGUSR1) == before
