"""Whole runs on a disk that becomes full, and what goes on when there is room again."""

from __future__ import annotations

import csv
import errno
import logging
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from covr_lightning.agent import SACModule
from covr_lightning.data.datamodule import ExperienceData
from covr_lightning.saving.checkpoints import CheckpointFiles
from covr_lightning.stopping import RunStopped
from tests.saving.whole_runs import summary
from tests.short_runs import env_steps_saved


@pytest.mark.parametrize("on_save_error", ["warn", "stop"])
def test_a_full_disk(
    covr: Callable[..., int],
    tmp_path: Path,
    small_disk: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    on_save_error: str,
) -> None:
    checkpoints, filler = small_disk / "run" / "checkpoints", small_disk / "filler"
    store, seen = ExperienceData._store, {}

    def filling(data: ExperienceData, collected: Any) -> Any:
        if data.counters.env_steps == 1000:
            free = shutil.disk_usage(small_disk).free
            filler.write_bytes(bytes(free - 60_000))  # room for logs, not for a part
        if data.counters.env_steps == 1640:
            seen["last"] = env_steps_saved(checkpoints / "last.ckpt")
            seen["unfinished"] = [str(file) for file in small_disk.rglob("*.part")]
            filler.unlink()
        return store(data, collected)

    monkeypatch.setattr(ExperienceData, "_store", filling)
    warned: list[str] = []
    log = logging.getLogger("covr_lightning.callbacks.checkpoints")
    monkeypatch.setattr(log, "warning", lambda text, *values: warned.append(text % values))
    status = covr("fit", {"every_env_steps": 600, "on_save_error": on_save_error}, runs=small_disk)
    told = warned + [line for line in capsys.readouterr().err.splitlines() if "No space left on device" in line]
    assert len(told) == 1
    assert "At 1200 environment steps the run could not be saved" in told[0]
    assert "up to step 1000" in told[0]
    assert not list(small_disk.rglob("*.part"))
    if on_save_error == "warn":
        assert status == 0
        assert seen == {"last": 1000, "unfinished": []}
        assert summary(small_disk / "run")["env_steps"] == env_steps_saved(checkpoints / "last.ckpt") == 2000
    else:
        assert status == 3
        assert "stops (RunCheckpoint.on_save_error is 'stop'). What was saved before stays; --ckpt_path las" in told[0]
        assert env_steps_saved(checkpoints / "last.ckpt") == 1000
    monkeypatch.undo()
    filler.unlink(missing_ok=True)
    assert covr("fit", None, "--ckpt_path", "last", "--data.max_env_steps", "2400", runs=small_disk) == 0
    assert env_steps_saved(checkpoints / "last.ckpt") == 2400


@pytest.mark.parametrize("room", [0, 60_000])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_at_the_end(
    covr: Callable[..., int],
    small_disk: Path,
    room: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, filler, last = ExperienceData._store, small_disk / "filler", small_disk / "run" / "checkpoints" / "last.ckpt"

    def filling(data: ExperienceData, collected: Any) -> Any:
        if data.counters.env_steps == 1960:  # of 2000
            free = shutil.disk_usage(small_disk).free
            filler.write_bytes(bytes(free - room))
        return store(data, collected)

    monkeypatch.setattr(ExperienceData, "_store", filling)
    assert covr("fit", runs=small_disk) == 3
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "covr: The end of the run, at 2000 environment steps, could not be saved. What was saved before stays; "
        "--ckpt_path last goes on from there."
    )
    assert env_steps_saved(last) == 1000
    assert not (small_disk / "run" / "summary.json").exists()  # there may have been room for it
    filler.unlink()
    monkeypatch.undo()
    assert covr("fit", None, "--ckpt_path", "last", runs=small_disk) == 0
    assert env_steps_saved(last) == summary(small_disk / "run")["env_steps"] == 2000


def test_a_run_that_was_stopped_in_its_last_evaluation_and_finds_a_full_disk(
    covr: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last, step = tmp_path / "run" / "checkpoints" / "last.ckpt", SACModule.validation_step

    def stopped(module: SACModule, *args: Any) -> Any:
        if module.counters.env_steps == 2000:
            raise RunStopped(signal.SIGTERM)
        return step(module, *args)

    def full(self: CheckpointFiles, *args: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SACModule, "validation_step", stopped)
        assert covr("fit") == 128 + signal.SIGTERM
    assert env_steps_saved(last) == 2000  # the evaluation is still to come
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFiles, "save_checkpoint", full)
        assert covr("fit", None, "--ckpt_path", "last") == 3
    assert not (tmp_path / "run" / "summary.json").exists()
    assert covr("fit", None, "--ckpt_path", "last") == 0
    assert [point["env_steps"] for point in summary(tmp_path / "run")["curve"]] == [40, 1000, 2000]
    assert len(torch.load(last, weights_only=True)["callbacks"]["RunSummary"]["curve"]) == 3


def test_a_disk_that_is_full_in_an_evaluation(
    covr: Callable[..., int], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, filler, during = ExperienceData._store, small_disk / "filler", small_disk / "run" / "curve.csv"
    curves: list[str] = []

    def filling(data: ExperienceData, collected: Any) -> Any:
        if data.counters.env_steps == 960:  # the evaluation comes at 1000
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
        if data.counters.env_steps == 1640:
            curves.append(during.read_text())
            filler.unlink()
        return store(data, collected)

    monkeypatch.setattr(ExperienceData, "_store", filling)
    assert covr("fit", runs=small_disk) == 0
    assert [line.split(",")[0] for line in curves[0].splitlines()] == ["env_steps", "40"]  # the old one, whole
    assert [point["env_steps"] for point in summary(small_disk / "run")["curve"]] == [40, 1000, 2000]
    assert [line.split(",")[0] for line in during.read_text().splitlines()] == ["env_steps", "40", "1000", "2000"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_for_the_logs(
    covr: Callable[..., int], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, filler = ExperienceData._store, small_disk / "filler"

    def filling(data: ExperienceData, collected: Any) -> Any:
        if data.counters.env_steps == 1200:
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
        if data.counters.env_steps == 1640:
            filler.unlink()
        return store(data, collected)

    monkeypatch.setattr(ExperienceData, "_store", filling)
    loggers = [f"--trainer.logger+=covr_lightning.run_log.{kind}" for kind in ("RunCSVLogger", "RunTensorBoardLogger")]
    where = [f"--trainer.logger.save_dir={small_disk / 'logs'}"]
    csv_often, tensorboard_often = ["--trainer.logger.flush_logs_every_n_steps=1"], ["--trainer.logger.max_queue=1"]
    often = ["--trainer.log_every_n_steps=1"]
    arguments = [loggers[0], *where, *csv_often, loggers[1], *where, *tensorboard_often, *often]
    assert covr("fit", None, *arguments, runs=small_disk) == 0
    [path] = (small_disk / "logs").rglob("metrics.csv")
    with path.open(newline="") as file:
        updates = [int(row["step"]) for row in csv.DictReader(file) if row["train/critic_loss"]]
    assert updates == [*range(800, 2001, 40)]  # one from the warm-up's last step on


def test_a_disk_that_is_full_at_the_start(
    covr: Callable[..., int], small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096))
    assert covr("fit", runs=small_disk) == 3
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("covr: ")]
    assert "could not be written (No space left on device)" in said
    filler.unlink()
    shutil.rmtree(small_disk / "run", ignore_errors=True)
    assert covr("fit", None, "--data.max_env_steps", "1000", runs=small_disk) == 0


def test_a_disk_that_is_full_when_a_run_goes_on(
    covr: Callable[..., int], small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert covr("fit", None, "--data.max_env_steps", "1000", runs=small_disk) == 0
    config, filler = small_disk / "run" / "config.yaml", small_disk / "filler"
    before = config.read_bytes()
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    capsys.readouterr()
    go_on = ["--ckpt_path", "last", "--data.max_env_steps", "1400", "--model.gamma", "0.5"]
    assert covr("fit", None, *go_on, runs=small_disk) == 3
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("covr: ")] != []
    assert config.read_bytes() == before
    assert not list(config.parent.glob("config_until_*"))
    filler.unlink()
    assert covr("fit", None, *go_on, runs=small_disk) == 0
    assert (config.parent / "config_until_1000.yaml").read_bytes() == before
