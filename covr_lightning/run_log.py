"""A run's metrics, one CSV and one TensorBoard run however often it was resumed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import cast

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from tensorboard.compat.proto.event_pb2 import Event, SessionLog


class RunCSVLogger(CSVLogger):
    """Lightning's CSVLogger, which continues the file that is there instead of deleting it."""

    @property
    @rank_zero_experiment
    def experiment(self) -> _ContinuedFile:
        """The writer."""
        if self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _ContinuedFile(log_dir=self.log_dir)
        return cast(_ContinuedFile, self._experiment)

    def rewind(self, step: int) -> None:
        """Drop the rows after a step: what a run did after the checkpoint that it is resumed from is done again.

        Args:
            step: Last step to keep.
        """
        self.experiment.rewind(step)


class _ContinuedFile(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Know the columns of a file that is there; the library's own would delete it."""
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])

    def rewind(self, step: int) -> None:
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        part = path.with_suffix(".part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
        part.replace(path)


class RunTensorBoardLogger(TensorBoardLogger):
    """Lightning's TensorBoardLogger, which can take back what a run logged after the checkpoint it is resumed from."""

    def rewind(self, step: int) -> None:
        """Hide the points after a step, by TensorBoard's own mark for a restart.

        Args:
            step: Last step to keep.
        """
        writer = self.experiment._get_file_writer()
        writer.add_event(Event(step=step + 1, file_version="brain.Event:2"))
        writer.add_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
