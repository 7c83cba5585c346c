"""What the rounds of a run write into its folder ``rounds``: names, and what of it goes when a run goes back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"round_(\d+)[_.]")


@dataclass(frozen=True)
class RoundFiles:
    """Where one round's files are.

    Attributes:
        rounds: The run's folder ``rounds``.
        round: The round; 0 for what was before the first.
    """

    rounds: Path
    round: int

    def _path(self, end: str) -> Path:
        return self.rounds / f"round_{self.round:03d}{end}"

    @property
    def report(self) -> Path:
        """Its figures."""
        return self._path(".json")

    @property
    def adapter(self) -> Path:
        """The folder of the adapter that it trained."""
        return self._path("_adapter")

    @property
    def rows(self) -> Path:
        """Its rows of D_f."""
        return self._path("_rows.safetensors")

    @property
    def samples(self) -> Path:
        """Rows that the VLM was asked about before and after it."""
        return self._path("_samples.safetensors")

    @property
    def episodes(self) -> Path:
        """What the VLM did alone after it."""
        return self._path("_vlm.safetensors")


def round_of(path: Path) -> int | None:
    """The round that a file or folder of a run's ``rounds`` is of, by its name; None if it is none."""
    match = _NAME.match(path.name)
    return int(match[1]) if match else None


def rounds_in(rounds: Path) -> list[int]:
    """The rounds that a run's folder ``rounds`` holds anything of, in order."""
    return sorted({number for path in rounds.glob("round_*") if (number := round_of(path)) is not None})


def take_back(rounds: Path, last: int) -> None:
    """Remove what rounds after a run's last one have recorded: the run goes on from a moment before them.

    Their adapters stay: other checkpoints may name them.

    Args:
        rounds: The run's folder ``rounds``.
        last: The last round that the run has done.
    """
    for number in rounds_in(rounds):
        if number > last:
            own = RoundFiles(rounds, number)
            for path in (own.report, own.rows, own.samples, own.episodes):
                path.unlink(missing_ok=True)
