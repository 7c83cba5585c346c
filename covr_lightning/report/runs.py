"""What a run's folder holds, read while the run goes on or after it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from covr_lightning.errors import ConfigError
from covr_lightning.sweep.differences import Configuration
from covr_lightning.sweep.runs import SET_ASIDE

State = Literal["finished", "running", "stopped"]
Columns = dict[str, np.ndarray]


@dataclass
class VLMAlone:
    """What the VLM did alone after a round.

    Attributes:
        columns: ``return`` (n,) and other measures of n episodes; of the first one ``actions`` (T, A), ``rewards``
            (T,), ``frames`` (k, 3, h, w), ``frame_steps`` (k,).
        facts: ``asked``, ``unparsable``, ``unanswered``.
    """

    columns: Columns
    facts: dict[str, float]


@dataclass
class Run:
    """One run's folder.

    Attributes:
        folder: The folder.
        configuration: Its ``config.yaml``.
        curve: Evaluations as in ``curve.csv``.
        metrics: Rows of ``logs/csv/metrics.csv``, their numbers only.
        rounds: Figures of the rounds, in order.
        samples: Round → the rows that the VLM was asked about before and after it.
        vlm: Round → what the VLM did alone after it; 0 is before the first.
        profile: ``profile.json``, if there is one.
        state: Whether it is finished, being written, or stopped.
    """

    folder: Path
    configuration: Configuration
    curve: list[dict[str, float]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[int, Columns] = field(default_factory=dict)
    vlm: dict[int, VLMAlone] = field(default_factory=dict)
    profile: dict[str, Any] | None = None
    state: State = "stopped"

    @property
    def seed(self) -> int:
        """Its seed: that of environment, exploration and replay."""
        return _whole(self.setting("data", "seed", default=self.configuration.get("seed_everything") or 0))

    @property
    def env(self) -> str:
        """Class name of its environment."""
        return class_name(self.setting("data", "env")) or "?"

    @property
    def task(self) -> str:
        """Its task or scenario; empty if its environment has but one."""
        return str(self.setting("data", "env", "task", default=self.setting("data", "env", "scenario", default="")))

    @property
    def length(self) -> int:
        """Environment steps that it is to have."""
        return _whole(self.setting("data", "max_env_steps", default=0))

    @property
    def env_steps(self) -> int:
        """Environment steps that are known of."""
        logged = [row["step"] for row in self.metrics[-1:] if "step" in row]
        rounds = [round_["env_steps"] for round_ in self.rounds[-1:]]
        return int(max([point["env_steps"] for point in self.curve[-1:]] + logged + rounds, default=0))

    @property
    def videos(self) -> list[Path]:
        """Its videos, the latest last."""
        found = (self.folder / "videos").glob("*.mp4")
        return sorted(found, key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)])

    def setting(self, *keys: str, default: Any = None) -> Any:
        """A setting by its keys; ``init_args`` on the way are passed through."""
        value: Any = self.configuration
        for key in keys:
            value = value.get("init_args", value) if isinstance(value, dict) else None
            value = value.get(key) if isinstance(value, dict) else None
        return default if value is None else value

    def fine_tuning(self) -> dict[str, Any] | None:
        """Arguments of its ProgressiveFineTune; None if it has none."""
        callbacks = self.setting("trainer", "callbacks", default=[])
        for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
            if class_name(callback) == "ProgressiveFineTune":
                return (callback.get("init_args") or {}) if isinstance(callback, dict) else {}
        return None

    @property
    def action_size(self) -> int | None:
        """A, if the run tells it: its rounds do, and what they recorded."""
        for round_ in self.rounds:
            if round_.get("action_dim"):
                return int(round_["action_dim"])
        for columns in self.samples.values():
            return columns["action"].shape[1]
        return next((one.columns["actions"].shape[1] for one in self.vlm.values() if "actions" in one.columns), None)


def _whole(setting: Any) -> int:
    """A setting that is a whole number; 0 if it is none, in a config.yaml that somebody has edited."""
    return int(setting) if isinstance(setting, int | float) and math.isfinite(setting) else 0


def figure_of(round_: Mapping[str, Any], name: str) -> float:
    """A round's figure; NaN where it has none."""
    value = round_.get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def class_name(part: Any) -> str:
    """Name of the class that a part of a configuration is of, without its module; empty for none."""
    path = part.get("class_path") if isinstance(part, dict) else part
    return str(path or "").rsplit(".", 1)[-1]


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run folders among paths: each is one, or holds some, as a sweep's folder does, or the folder of all runs.

    What a sweep has set aside there, as it was cut before its first checkpoint, is none of them.

    Raises:
        ConfigError: A path leads nowhere, or no run is there.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{path} is no folder; give the folder of a run, e.g. runs/quickstart.")
        inside = [path] if _is_run(path) else sorted(
            below for pattern in ("*", "*/*", "*/*/*") for below in path.glob(pattern)
            if below.is_dir() and below.suffix != SET_ASIDE and _is_run(below)
        )  # fmt: skip
        if not inside:
            raise ConfigError(f"{path} holds no run (a run's folder has a config.yaml, from its first moment on).")
        found += inside
    once: dict[Path, Path] = {}
    for run in found:
        once.setdefault(run.resolve(), run)
    return list(once.values())


def _is_run(folder: Path) -> bool:
    try:
        return (folder / "config.yaml").is_file()
    except PermissionError:
        return False
