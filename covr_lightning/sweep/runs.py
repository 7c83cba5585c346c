"""The runs of a sweep: where each is written, how far it is, and the command that starts it or goes on."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from covr_lightning.errors import ConfigError
from covr_lightning.sweep.differences import Configuration, differences, read_configuration, seed_arguments

#: ``new`` has nothing to go on from, ``cut`` has a last checkpoint, ``finished`` has its summary.
State = Literal["new", "cut", "finished"]

#: What the folder of a run that was cut before its first checkpoint ends in, once it is set aside.
SET_ASIDE = ".cut"


@dataclass
class SweepRun:
    """One config with one seed.

    Attributes:
        config: The config's name, as ``--config`` takes it.
        name: Its name in the table.
        seed: The seed.
        root: Folder of the config's runs; this one is ``root/seed_N``.
        overrides: Arguments behind the config, the same for all runs of a sweep.
        configuration: The full configuration that it has to have.
    """

    config: str
    name: str
    seed: int
    root: Path
    overrides: Sequence[str]
    configuration: Configuration

    def __str__(self) -> str:
        """Its name for people."""
        return f"{self.name} seed {self.seed}"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.root / f"seed_{self.seed}"

    @property
    def log(self) -> Path:
        """What the run prints; whoever writes the run holds a lock on it."""
        return self.root / f"seed_{self.seed}.log"

    @property
    def last_checkpoint(self) -> Path:
        """What a cut run goes on from."""
        return self.folder / "checkpoints" / "last.ckpt"

    def arguments(self, state: State) -> list[str]:
        """Command line of ``covr``, to start it or to go on."""
        resume = ["--ckpt_path", str(self.last_checkpoint)] if state == "cut" else []
        return [
            "fit", "--config", self.config, "--trainer.enable_progress_bar", "false", *self.overrides,
            *seed_arguments(self.seed), "--runs_dir", str(self.root), "--name", self.folder.name, *resume,
        ]  # fmt: skip

    def state(self) -> State:
        """How far the run is.

        Raises:
            ConfigError: What is in its folder belongs to another configuration.
        """
        summary = self.folder / "summary.json"
        if not summary.is_file() and not self.last_checkpoint.is_file():
            return "new"
        other = differences(read_configuration(self.folder / "config.yaml"), self.configuration)
        if other:
            more = f" and {len(other) - 2} keys more" if len(other) > 2 else ""
            raise ConfigError(
                f"{self.folder} holds a run of another configuration ({'; '.join(other[:2])}{more}); give the sweep "
                "another --name or --runs_dir, or remove that folder."
            )
        length = self.configuration["data"]["init_args"]["max_env_steps"]
        if summary.is_file() and env_steps_of(summary) >= length:
            return "finished"
        return "cut" if self.last_checkpoint.is_file() else "new"

    def lock(self) -> BinaryIO | None:
        """Take hold of the run; None if a process that an earlier sweep started still writes it.

        The lock is the open file's, so a process that inherits it holds it as well, for as long as it lives.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = self.log.open("ab")
        except OSError as error:
            raise ConfigError(f"{self.log} cannot be written ({error.strerror}); give another --runs_dir.") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
        return file

    def set_aside(self) -> Path | None:
        """Move what a new run would find in its folder to ``seed_N.cut``: it was cut before its first checkpoint.

        Returns:
            Where it is now; None if there was nothing.

        Raises:
            ConfigError: It cannot be moved.
        """
        if not self.folder.exists():
            return None
        aside = self.folder.with_name(self.folder.name + SET_ASIDE)
        shutil.rmtree(aside, ignore_errors=True)
        try:
            self.folder.rename(aside)
        except OSError as error:
            raise ConfigError(f"{self.folder} cannot be moved to {aside.name} ({error.strerror}).") from error
        return aside

    def curve(self) -> list[dict[str, float]]:
        """The run's evaluations, as in its ``curve.csv``.

        Raises:
            ConfigError: The file is missing, or has a line that is not whole, or none.
        """
        path = self.folder / "curve.csv"
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        except (OSError, ValueError, TypeError, csv.Error) as error:
            raise ConfigError(f"{path} cannot be read ({error}); remove {self.folder} to run it again.") from error
        if not rows:
            raise ConfigError(f"{path} has no evaluation in it; remove {self.folder} to run it again.")
        return rows


def env_steps_of(summary: Path, task: str | None = None) -> float:
    """Environment steps of a run by its ``summary.json``; −∞ if there is none that can be read.

    Args:
        summary: The file.
        task: The run's task; −∞ if it is another one's.
    """
    try:
        figures = json.loads(summary.read_text(encoding="utf-8"))
        return float(figures["env_steps"]) if task is None or task == figures["task"] else -math.inf
    except (OSError, ValueError, KeyError, TypeError):
        return -math.inf
