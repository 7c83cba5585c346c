"""A run's metrics, one CSV and one TensorBoard run however often it was resumed."""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import DummyExperiment, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch import Tensor

from covr_lightning.errors import RunFailed
from covr_lightning.saving.files import or_warn, reason, write_atomically

log = logging.getLogger(__name__)

#: What a run has logged is written as soon as something is logged and the last time is this long ago.
WRITE_EVERY_S = 30.0


class RunCSVLogger(CSVLogger):
    """Lightning's CSVLogger, which continues the file that is there instead of deleting it.

    Lightning's writes at steps that a number divides, which environment steps may never be; this one writes after
    :data:`WRITE_EVERY_S` seconds, too, and the first row at once, so that one sees how a run under way is doing.
    """

    _written_at = -math.inf

    @property
    @rank_zero_experiment
    def experiment(self) -> _ContinuedFile:
        """The writer."""
        if self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _ContinuedFile(log_dir=self.log_dir)
        return cast(_ContinuedFile, self._experiment)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Tensor | float], step: int | None = None) -> None:  # type: ignore[override]
        """Log; what cannot be written now is the next time, and a run goes on meanwhile."""
        now = time.monotonic()
        with or_warn(Path(self.log_dir)):
            super().log_metrics(metrics, step)
            if now - self._written_at >= WRITE_EVERY_S:
                self._written_at = now
                self.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the rest, or warn."""
        with or_warn(Path(self.log_dir)):
            super().finalize(status)

    def rewind(self, step: int) -> None:
        """Drop the rows after a step: what a run did after the checkpoint that it is resumed from is done again.

        Args:
            step: Last step to keep.
        """
        try:
            self.experiment.rewind(step)
        except OSError as error:
            raise RunFailed(f"{self.log_dir} could not be written ({reason(error)})") from error


class _ContinuedFile(ExperimentWriter):
    """Appends whole lines or nothing, and keeps the old file until a new one, with other columns, is complete."""

    def _check_log_dir_exists(self) -> None:
        """Know the columns of a file that is there; the library's own would delete it."""
        self._path = Path(self.metrics_file_path)
        self._columns: list[str] = []  # of the file
        if self._path.is_file():
            try:
                with self._path.open(newline="") as file:
                    self._columns = list(csv.DictReader(file).fieldnames or [])
                    file.read()
            except (ValueError, csv.Error):
                aside = self._path.with_name(f"{self._path.name}.damaged")
                self._path.replace(aside)
                log.warning("%s cannot be read; it is now %s, and a new one begins.", self._path, aside.name)
        self.metrics_keys = list(self._columns)

    def save(self) -> None:
        """Write what was logged since the last time; if that fails, the file stays as it was and nothing is lost."""
        if not self.metrics:
            return
        self._record_new_keys()
        if self.metrics_keys != self._columns:
            self._write_anew([*self._rows(), *self.metrics])
        else:
            size = self._path.stat().st_size
            try:
                with self._path.open("ab") as file:
                    file.write(_as_csv(self._columns, self.metrics))
            except OSError:
                os.truncate(self._path, size)
                raise
        self.metrics = []

    def rewind(self, step: int) -> None:
        if self._path.is_file():
            self._write_anew([row for row in self._rows() if int(row["step"]) <= step])

    def _rows(self) -> list[dict[str, str]]:
        """Of the file; a line that a kill or a full disk has cut off, or run into another, is left out."""
        if not self._path.is_file():
            return []
        with self._path.open(newline="") as file:
            lines = [line for line in file if line.endswith("\n")]
        rows = csv.DictReader(lines, fieldnames=self._columns)
        return [row for row in rows if None not in row and None not in row.values() and row["step"].isdecimal()]

    def _write_anew(self, rows: list[dict[str, Any]]) -> None:
        header = dict(zip(self.metrics_keys, self.metrics_keys, strict=True))
        write_atomically(self._path, [_as_csv(self.metrics_keys, [header, *rows])])
        self._columns = list(self.metrics_keys)


def _as_csv(columns: list[str], rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue().encode()


class RunTensorBoardLogger(TensorBoardLogger):
    """Lightning's TensorBoardLogger, which can take back what a run logged after the checkpoint it is resumed from.

    TensorBoard's writer never writes again once it could not. Then a run goes on without it, with a warning, and from
    the next moment to save with a new writer, hence a new file.
    """

    _is_broken = _is_writing = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer; one that writes nothing where none can be opened, on a full disk, say."""
        try:
            return super().experiment
        except OSError as error:
            if self._is_writing:  # :meth:`_or_break` notes it
                raise
            self._note(error)
            return DummyExperiment()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log, unless the writer has failed."""
        if not self._is_broken:
            self._or_break(lambda: super(RunTensorBoardLogger, self).log_metrics(metrics, step))

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged; with a new writer if the last one has failed."""
        self._or_break(super().save)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the rest."""
        if not self._is_broken:
            self._or_break(lambda: super(RunTensorBoardLogger, self).finalize(status))

    def _or_break(self, write: Callable[[], None]) -> None:
        self._is_writing = True
        try:
            write()
        except (OSError, ValueError) as error:  # Lightning makes the latter of whatever the writer raises
            self._note(error)
        else:
            self._is_broken = False
        finally:
            self._is_writing = False

    def _note(self, error: OSError | ValueError) -> None:
        self._experiment = None
        if not self._is_broken:
            cause = error if isinstance(error, OSError) else error.__cause__ or error
            log.warning("TensorBoard's log in %s could not be written (%s).", self.log_dir, reason(cause))
        self._is_broken = True

    def rewind(self, step: int) -> None:
        """Hide the points after a step, by TensorBoard's own mark for a restart.

        Args:
            step: Last step to keep.
        """

        def mark() -> None:
            writer = self.experiment._get_file_writer()
            writer.add_event(Event(step=step + 1, file_version="brain.Event:2"))
            writer.add_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

        self._or_break(mark)
