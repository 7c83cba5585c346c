"""What a run's folder holds, read while the run goes on or after it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from covr_lightning.errors import ConfigError
from covr_lightning.sweep.differences import Configuration
from covr_lightning.sweep.runs import SET_ASIDE

State = Literal["finished", "running", "stopped"]
Columns = dict[str, np.ndarray]


class Score(NamedTuple):
    """What a round judges rows of D_f by, in words: of one row, of several, and with its symbol."""

    one: str
    many: str
    symbol: str


RETURN = Score("return", "returns", "return g")
#: Of what a user's own class gives, and of configurations that have not one score.
ANY_SCORE = Score("score", "scores", "score")
_SCORES = {
    "": RETURN, "ReturnScore": RETURN, "RewardScore": Score("reward", "rewards", "reward r"),
    "QScore": Score("min Q(s, a)", "values of min Q(s, a)", "min Q(s, a)"),
}  # fmt: skip


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
    def score(self) -> Score:
        """What its rounds judge rows by."""
        return _SCORES.get(class_name((self.fine_tuning() or {}).get("score")), ANY_SCORE)

    @property
    def eval_episodes(self) -> int | None:
        """Episodes of an evaluation, if its configuration tells."""
        return _whole(self.setting("data", "eval_episodes", default=0)) or None

    def round_at(self, n: int) -> float:
        """Environment steps of a round; infinity before it has come, NaN where its file is missing among others'."""
        at = {r["round"]: r["env_steps"] for r in self.rounds}
        return at.get(n, math.nan if n < max(at, default=0) else math.inf) if n else 0

    @property
    def missing_rounds(self) -> list[int]:
        """Rounds before its last one of which nothing can be read."""
        return [n for n in range(1, max((r["round"] for r in self.rounds), default=0)) if math.isnan(self.round_at(n))]

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


def init_args(part: Any) -> dict[str, Any]:
    """Arguments of a part of a configuration; none of one that is only named."""
    given = part.get("init_args") if isinstance(part, dict) else None
    return given if isinstance(given, dict) else {}


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
