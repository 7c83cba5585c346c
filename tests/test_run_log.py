"""Logs of a resumed run: what came after the checkpoint is taken back."""

from __future__ import annotations

import csv
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from covr_lightning.run_log import RunCSVLogger, RunTensorBoardLogger


def resumed(kind: type[RunCSVLogger | RunTensorBoardLogger], folder: Path) -> None:
    """Steps 1 to 10, then a run resumed from step 5 that logs 6 and 7, and a new quantity with 7."""
    first = kind(folder, name="logs", version="v")
    for step in range(1, 11):
        first.log_metrics({"x": float(step)}, step=step)
    first.save()
    second = kind(folder, name="logs", version="v")
    second.rewind(5)
    second.log_metrics({"x": 60.0}, step=6)
    second.log_metrics({"x": 70.0, "y": 1.5}, step=7)
    second.save()
    second.finalize("success")


def test_the_csv_is_one_file_without_what_was_taken_back(tmp_path: Path) -> None:
    resumed(RunCSVLogger, tmp_path)
    with (tmp_path / "logs" / "v" / "metrics.csv").open(newline="") as file:
        rows = [(int(row["step"]), float(row["x"]), row["y"]) for row in csv.DictReader(file)]
    assert rows == [*((step, float(step), "") for step in range(1, 6)), (6, 60.0, ""), (7, 70.0, "1.5")]


def test_tensorboard_shows_one_run_without_what_was_taken_back(tmp_path: Path) -> None:
    resumed(RunTensorBoardLogger, tmp_path)
    shown = EventAccumulator(str(tmp_path / "logs" / "v"))
    shown.Reload()
    points = [(event.step, event.value) for event in shown.Scalars("x")]
    assert points == [*((step, float(step)) for step in range(1, 6)), (6, 60.0), (7, 70.0)]


def test_a_csv_that_is_not_there_yet_can_be_rewound(tmp_path: Path) -> None:
    logger = RunCSVLogger(tmp_path, name="logs", version="v")
    logger.rewind(5)
    logger.log_metrics({"x": 1.0}, step=6)
    logger.save()
    with (tmp_path / "logs" / "v" / "metrics.csv").open(newline="") as file:
        assert [row["x"] for row in csv.DictReader(file)] == ["1.0"]
