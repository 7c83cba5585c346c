"""Logs of a resumed run: what came after the checkpoint is taken back."""

from __future__ import annotations

import csv
import errno
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from covr_lightning import run_log
from covr_lightning.run_log import RunCSVLogger, RunTensorBoardLogger


def resumed(kind: type[RunCSVLogger | RunTensorBoardLogger], folder: Path) -> None:
    """Steps 1 to 10, then a run resumed from step 5 that logs 6 and 7, and a new quantity with 7."""
    first = kind(folder, name="logs", version="v")
    for step in range(1, 11):
        first.log_metrics({"x": float(step)}, step=step)
    first.save()
    if kind is RunTensorBoardLogger:
        # Its files are read in the order of their names: by the second of their start, and within one by a number as
        # text, of which 10 comes before 9. No run is resumed that soon.
        time.sleep(1.1)
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


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "logs" / "v" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_under_way_is_seen_within_half_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(run_log.time, "monotonic", lambda: now[0])
    logger = RunCSVLogger(tmp_path, name="logs", version="v")
    seen = []
    for seconds in (0, 29, 1, 29, 1):
        now[0] += seconds
        logger.log_metrics({"x": now[0]}, step=4 * int(now[0]))  # never 99, 199, …, at which Lightning writes
        file = tmp_path / "logs" / "v" / "metrics.csv"
        seen.append(len(read(tmp_path)) if file.is_file() else 0)
    assert seen == [1, 1, 3, 3, 5]


@pytest.mark.parametrize("torn", ["3.5", "3.5,", "3.5,2.5,3\r\n", "3.5,2.5,,3\r\n"])
def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path, torn: str) -> None:
    first = RunCSVLogger(tmp_path, name="logs", version="v")
    first.log_metrics({"x": 1.5, "y": 2.5}, step=1)
    first.save()
    path = tmp_path / "logs" / "v" / "metrics.csv"
    path.write_bytes(path.read_bytes() + torn.encode())
    second = RunCSVLogger(tmp_path, name="logs", version="v")
    second.rewind(5)
    second.log_metrics({"x": 4.5, "y": 5.5}, step=2)
    second.save()
    assert [(row["step"], row["x"], row["y"]) for row in read(tmp_path)] == [("1", "1.5", "2.5"), ("2", "4.5", "5.5")]


def test_a_write_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = RunCSVLogger(tmp_path, name="logs", version="v")
    logger.log_metrics({"x": 1.0}, step=1)
    logger.save()
    original = Path.open

    class Full:
        """Half of what is written reaches the disk."""

        def __init__(self, path: Path) -> None:
            self.path = path

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def write(self, data: bytes) -> None:
            with original(self.path, "ab") as file:
                file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    def full(path: Path, mode: str = "r", **how: Any) -> Any:
        return Full(path) if mode == "ab" else original(path, mode, **how)

    logger.log_metrics({"x": 22.0}, step=2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(OSError, match="No space"):
            logger.save()
    assert [row["x"] for row in read(tmp_path)] == ["1.0"]
    logger.save()
    assert [row["x"] for row in read(tmp_path)] == ["1.0", "22.0"]


def test_a_csv_that_cannot_be_read_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "logs" / "v" / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"step,x\n1,\xff\xfe\n")
    logger = RunCSVLogger(tmp_path, name="logs", version="v")
    logger.rewind(5)
    logger.log_metrics({"x": 1.0}, step=2)
    logger.save()
    assert [(row["step"], row["x"]) for row in read(tmp_path)] == [("2", "1.0")]
    assert path.with_name("metrics.csv.damaged").read_bytes() == b"step,x\n1,\xff\xfe\n"
    assert "cannot be read; it is now metrics.csv.damaged" in caplog.text


def test_a_csv_that_is_not_there_yet_can_be_rewound(tmp_path: Path) -> None:
    logger = RunCSVLogger(tmp_path, name="logs", version="v")
    logger.rewind(5)
    logger.log_metrics({"x": 1.0}, step=6)
    logger.save()
    with (tmp_path / "logs" / "v" / "metrics.csv").open(newline="") as file:
        assert [row["x"] for row in csv.DictReader(file)] == ["1.0"]


def test_a_csv_that_cannot_be_written_warns_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = RunCSVLogger(tmp_path, name="logs", version="v", flush_logs_every_n_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr("covr_lightning.run_log.write_atomically", no_space)
        for step in range(4):
            logger.log_metrics({"x": float(step)}, step=step)
        logger.finalize("success")
        with pytest.raises(OSError, match="No space"):
            logger.save()  # a checkpoint is not complete without it
    # At the first row, twice after two, and at the end.
    assert caplog.text.count("could not be written (No space left on device)") == 4
    logger.finalize("success")
    assert [row["x"] for row in read(tmp_path)] == ["0.0", "1.0", "2.0", "3.0"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_goes_on_after_a_write_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = RunTensorBoardLogger(tmp_path, name="logs", version="v", max_queue=1, flush_secs=1)
    logger.log_metrics({"x": 1.0}, step=1)
    logger.save()
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", no_space)
        for step in range(2, 9):
            logger.log_metrics({"x": float(step)}, step=step)
            time.sleep(0.1)
        logger.save()  # a new writer fails, too
        logger.log_metrics({"x": 9.0}, step=9)
        logger.finalize("success")
    assert caplog.text.count("could not be written (No space left on device)") == 1
    logger.log_metrics({"x": 10.0}, step=10)  # only at a moment to save it is tried again
    time.sleep(1.1)  # its files are read in the order of the second of their start
    logger.save()
    logger.log_metrics({"x": 11.0}, step=11)
    logger.finalize("success")
    shown = EventAccumulator(str(tmp_path / "logs" / "v"))
    shown.Reload()
    assert [event.step for event in shown.Scalars("x")] == [1, 11]


def no_space(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
