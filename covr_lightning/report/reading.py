"""Reading a run's folder, of which any file may be missing, half written or damaged."""

from __future__ import annotations

import csv
import fcntl
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from covr_lightning.report.runs import Columns, Run, VLMAlone
from covr_lightning.saving.lock import LOCK_FILE
from covr_lightning.saving.round_files import RoundFiles, rounds_in
from covr_lightning.sweep.differences import read_configuration
from covr_lightning.sweep.runs import env_steps_of

#: Columns that a round's samples have in any case.
_OF_SAMPLES = {"high", "score", "action", "before", "before_valid", "frames", "frame_rows", "action_low", "action_high"}
#: What is there of the first episode of the VLM alone: all of it or nothing.
_OF_FIRST_EPISODE = {"actions", "rewards", "frames", "frame_steps"}
#: Counts that each round has.
_COUNTS = ("rows", "kept", "trained", "held_out")


def read_run(folder: Path) -> Run:
    """Read a run's folder; what is missing, only half written yet, or not as the run wrote it is left out."""
    run = Run(folder, read_configuration(folder / "config.yaml"))
    run.curve = [row for row in _numbers(folder / "curve.csv") if _are_finite(row, "env_steps", "return")]
    if run.setting("data", "eval_episodes") == 1:  # which has no spread
        run.curve = [{k: math.nan if k.endswith("_std") else v for k, v in row.items()} for row in run.curve]
    run.metrics = [row for row in _numbers(folder / "logs" / "csv" / "metrics.csv") if _are_finite(row, "step")]
    rounds = folder / "rounds"
    for n in rounds_in(rounds):
        files = RoundFiles(rounds, n)
        if figures := _round(_json(files.report)):
            run.rounds.append(figures)
        if samples := _samples(files.samples):
            run.samples[n] = samples
        if alone := _alone(files.episodes):
            run.vlm[n] = alone
    run.profile = _profile(_json(folder / "profile.json"))
    if env_steps_of(folder / "summary.json") >= run.length:
        run.state = "finished"
    elif _is_held(folder / LOCK_FILE):
        run.state = "running"
    return run


def _round(figures: dict[str, Any] | None) -> dict[str, Any] | None:
    """A round's figures, without those that are none; None if it does not say which round it was, and when."""
    if figures is None or not _are_finite(figures, "round", "env_steps"):
        return None
    numbers: dict[str, Any] = {name: figures[name] for name in figures if _are_finite(figures, name)}
    kept = dict.fromkeys(_COUNTS, 0) | numbers | {"note": str(figures.get("note") or "")}
    for name in ("round", "env_steps", *_COUNTS):
        kept[name] = int(kept[name])
    if "kept_top95" not in kept:
        kept.pop("tau_top95", None)
    if _is_histogram(figures.get("histogram")):
        kept["histogram"] = figures["histogram"]
    return kept


def _is_histogram(value: Any) -> bool:
    columns = [value.get(name) for name in ("edges", "all", "kept")] if isinstance(value, dict) else []
    lengths = [
        len(column)
        for column in columns
        if isinstance(column, list) and all(isinstance(x, int | float) and math.isfinite(x) for x in column)
    ]
    return len(lengths) == 3 and lengths[0] - 1 == lengths[1] == lengths[2] > 0


def _samples(path: Path) -> Columns:
    columns, _ = _tensors(path)
    if not columns.keys() >= _OF_SAMPLES or ("after" in columns) != ("after_valid" in columns):
        return {}
    return columns


def _alone(path: Path) -> VLMAlone | None:
    columns, facts = _tensors(path)
    if "return" not in columns:
        return None
    if not columns.keys() >= _OF_FIRST_EPISODE:
        columns = {name: column for name, column in columns.items() if name not in _OF_FIRST_EPISODE}
    numbers = {name: value for name, text in facts.items() if (value := _number(text)) is not None}
    return VLMAlone(columns, numbers)


def _profile(profile: dict[str, Any] | None) -> dict[str, Any] | None:
    """Seconds and counts of a run's parts, as far as they are numbers."""
    if profile is None:
        return None
    parts: dict[str, Any] = {}
    for name in ("seconds", "counts"):
        given = profile.get(name)
        parts[name] = {k: given[k] for k in given if _are_finite(given, k)} if isinstance(given, dict) else {}
    if _are_finite(profile, "total_seconds"):
        parts["total_seconds"] = profile["total_seconds"]
    return parts


def _are_finite(values: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(values.get(name), int | float) and math.isfinite(values[name]) for name in names)


def _numbers(path: Path) -> list[dict[str, float]]:
    """Rows of a CSV, without what is no number, as empty cells are, and without a last line that is not whole yet."""
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.DictReader(line for line in file if line.endswith(("\n", "\r"))))
    except (OSError, csv.Error):
        return []
    return [{name: value for name, text in row.items() if (value := _number(text)) is not None} for row in rows]


def _number(text: Any) -> float | None:
    """A number, or NaN; None of anything else, and of infinity, which no sum or figure has room for."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return None if math.isinf(value) else value


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _tensors(path: Path) -> tuple[Columns, Mapping[str, str]]:
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError):
        return {}, {}


def _is_held(lock: Path) -> bool:
    """Whether a process writes the run; asked without keeping one from it."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False
