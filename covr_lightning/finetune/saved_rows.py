"""D_f on disk: a round's rows, written by ProgressiveFineTune and read by a fine-tuning that stands alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from covr_lightning.envs.base import EnvSpec
from covr_lightning.errors import ConfigError
from covr_lightning.finetune.episodes import joined
from covr_lightning.finetune.filters import EDDF, Filter
from covr_lightning.finetune.scores import Score
from covr_lightning.finetune.weights import RALW, Weight
from covr_lightning.saving.files import in_place_of

PATTERN = "round_*_rows.safetensors"
_FACTS = "covr"  # the key in safetensors' metadata


@dataclass
class RowsOfRound:
    """Finished rows of D_f, and what a round must know beside them.

    Attributes:
        rows: (N,) with ``frame`` (3, H, W) uint8 and ``action`` (A,).
        scores: (N,), what the rows were judged by.
        entropy: ε per action dimension.
        round: The round's number.
        env_steps: Environment steps at which it was due.
        spec: The environment.
    """

    rows: TensorDictBase
    scores: Tensor
    entropy: float
    round: int
    env_steps: int
    spec: EnvSpec


def save_rows(path: Path, saved: RowsOfRound) -> None:
    """Write rows as safetensors, complete or not at all; the folder is made.

    Args:
        path: The file.
        saved: What it shall hold; scores as the column ``score``, the rest as metadata.
    """
    facts = {
        "entropy": saved.entropy, "round": saved.round, "env_steps": saved.env_steps, "spec": saved.spec.as_dict(),
    }  # fmt: skip
    columns = {name: value.contiguous().cpu() for name, value in saved.rows.items()}
    columns["score"] = saved.scores.cpu().clone()  # it may share its memory with g, which safetensors refuses
    with in_place_of(path) as part:
        save_file(columns, part, metadata={_FACTS: json.dumps(facts)})


def load_rows(path: Path) -> RowsOfRound:
    """Read what :func:`save_rows` wrote.

    Raises:
        ConfigError: It is not such a file, or it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = (file.metadata() or {}).get(_FACTS)
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"data.rows is {str(path)!r}, which cannot be read as safetensors: {error}.") from error
    try:
        known = json.loads(facts)  # type: ignore[arg-type]
        spec = EnvSpec(**known["spec"])
        entropy, round_, env_steps = float(known["entropy"]), int(known["round"]), int(known["env_steps"])
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"data.rows is {str(path)!r}, which lacks the round's ε, number and environment; it must be a file that "
            "ProgressiveFineTune wrote (YAML key save_rows)."
        ) from error
    _check(path, columns, spec)
    scores = columns.pop("score")
    return RowsOfRound(TensorDict(columns, [len(scores)]), scores, entropy, round_, env_steps, spec)


def _check(path: Path, columns: dict[str, Tensor], spec: EnvSpec) -> None:
    lacking = [name for name in ("frame", "action", "score") if name not in columns]
    if lacking:
        raise ConfigError(f"data.rows is {str(path)!r}, which lacks the columns {', '.join(lacking)}.")
    n = len(columns["score"]) if columns["score"].ndim else 0
    frame, action = columns["frame"], columns["action"]
    if (
        n == 0 or columns["score"].shape != (n,) or not bool(torch.isfinite(columns["score"]).all())
        or frame.dtype != torch.uint8 or frame.ndim != 4 or frame.shape[:2] != (n, 3)
        or action.shape != (n, spec.action_dim) or not bool(torch.isfinite(action).all())
        or any(len(column) != n for column in columns.values())
    ):  # fmt: skip
        shapes = ", ".join(f"{name} {tuple(column.shape)} {column.dtype}" for name, column in columns.items())
        raise ConfigError(
            f"data.rows is {str(path)!r} with {shapes}; it must hold finite scores (N,), frame (N, 3, H, W) "
            f"torch.uint8 and finite actions (N, {spec.action_dim}), N at least 1."
        )


class SavedRows(L.LightningDataModule):
    """Saved rows of D_f as the data of a fine-tuning that stands alone (``covr fit --config vlm_sft.yaml``).

    Args:
        rows: A file ``rounds/round_NNN_rows.safetensors``, a folder of such files, or a list of either. Of several,
            all rows are taken together, and round, environment steps and ε are those of the latest round; a file that
            is named twice counts once.
        score: What rows are judged by; by default the scores that were saved.
        filter: Which rows are kept; EDDF by default.
        weight: How much they count; RALW by default.
        entropy: ε per action dimension, if not the saved one.

    Raises:
        ConfigError: `score` needs the agent's critics.
    """

    def __init__(
        self,
        rows: str | list[str],
        score: Score | None = None,
        filter: Filter | None = None,
        weight: Weight | None = None,
        entropy: float | None = None,
    ) -> None:
        super().__init__()
        if score is not None and score.needs_stack:
            raise ConfigError(
                f"data.score is {type(score).__name__}, which asks the agent's critics; a fine-tuning that stands "
                "alone has none: leave the key out to take the scores as they were saved."
            )
        self.rows = [rows] if isinstance(rows, str) else rows
        self.score = score
        self.filter = filter or EDDF()
        self.weight = weight or RALW()
        self.entropy = entropy

    def load(self) -> RowsOfRound:
        """Read all rows.

        Raises:
            ConfigError: A path leads nowhere, a file cannot be used, or the files are of different environments.
        """
        parts = sorted(map(load_rows, self._files()), key=lambda part: part.round)
        last = parts[-1]
        for part in parts:
            if part.spec != last.spec or _columns(part) != _columns(last):
                raise ConfigError(
                    f"data.rows holds rounds {part.round} and {last.round} of different environments or columns "
                    f"({part.spec.task}, {last.spec.task}); they must be of one run's kind."
                )
            sizes = [tuple(one.rows["frame"].shape[1:]) for one in (part, last)]
            if sizes[0] != sizes[1]:
                raise ConfigError(
                    f"data.rows holds rounds {part.round} and {last.round} with frames of {sizes[0]} and {sizes[1]}; "
                    "they must be of runs with the same vlm.frames."
                )
        rows = joined([part.rows for part in parts])
        scores = torch.cat([part.scores for part in parts])
        if self.score is not None:
            try:
                scores = self.score.of(rows, _no_critics)
            except KeyError as error:
                raise ConfigError(
                    f"data.score is {type(self.score).__name__}, but the rows in data.rows lack what it needs "
                    f"({error}); leave the key out to take the scores as they were saved."
                ) from error
        entropy = last.entropy if self.entropy is None else self.entropy
        if math.isnan(entropy):
            raise ConfigError("The saved ε is NaN; give one (YAML key data.entropy).")
        return RowsOfRound(rows, scores, entropy, last.round, last.env_steps, last.spec)

    def _files(self) -> list[Path]:
        files: list[Path] = []
        for path in map(Path, self.rows):
            found = sorted(path.glob(PATTERN)) if path.is_dir() else [path] if path.is_file() else []
            if not found:
                raise ConfigError(
                    f"data.rows is {str(path)!r}, which is neither a file nor a folder with {PATTERN}, "
                    "which ProgressiveFineTune writes with save_rows: true."
                )
            files += found
        if not files:
            raise ConfigError("data.rows is an empty list; it must name a file or a folder of rows.")
        return list({path.resolve(): path for path in files}.values())


def _columns(part: RowsOfRound) -> set[str]:
    return {*map(str, part.rows.keys())} - {"episode"}


def _no_critics(pixels: Tensor, actions: Tensor) -> Tensor:
    raise AssertionError("refused when the score was given")
