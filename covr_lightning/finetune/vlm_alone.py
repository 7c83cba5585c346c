"""Episodes that the VLM played alone after a round, on disk: the VLM's rows of Tables 14 and 15, and Fig. 9."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from covr_lightning.evaluation import EpisodeResult
from covr_lightning.finetune.samples import FRAMES, reduced, write_tensors
from covr_lightning.vlm.answers import Answers


def save_episodes(path: Path, episodes: Sequence[EpisodeResult], round_: int | None, answers: Answers) -> None:
    """Write what the VLM did alone, complete or not at all.

    Columns: ``return`` (n,) and whatever else was measured of the n episodes, by name; of the first one ``actions`` (T,
    A), ``rewards`` (T,) and, reduced, some ``frames`` (k, 3, h, w) uint8 of the steps ``frame_steps`` (k,).

    Args:
        path: The file.
        episodes: The first one recorded.
        round_: The last round before them; 0 is the VLM as it was at first.
        answers: Counted in them.
    """
    columns: dict[str, Tensor] = {"return": torch.tensor([one.episode_return for one in episodes], dtype=torch.float64)}
    for name in episodes[0].metrics:
        columns[name] = torch.tensor([one.metrics[name] for one in episodes], dtype=torch.float64)
    first = episodes[0]
    if first.actions:
        steps = torch.linspace(0, len(first.actions) - 1, min(FRAMES, len(first.actions))).round().long()
        columns |= {
            "actions": torch.stack(first.actions), "rewards": torch.tensor(first.rewards), "frame_steps": steps,
            "frames": reduced(torch.stack([first.frames[step] for step in steps])),
        }  # fmt: skip
    facts = {"round": round_, **asdict(answers)}
    write_tensors(path, columns, {name: str(value) for name, value in facts.items()})
