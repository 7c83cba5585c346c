"""A replay that goes on in another number of processes or environments."""

from __future__ import annotations

from typing import Any

import torch

from covr_lightning.data.frame_storage import FrameStackStorage
from covr_lightning.data.replay_parts import ReplayParts

#: Rows that are read and written at once.
_ROWS = 256


def deal_out(
    parts: ReplayParts, manifests: list[dict[str, Any]], storage: FrameStackStorage, number: int, count: int
) -> None:
    """Fill one process's storage with its share of the episodes that saved replays hold.

    Open episodes are cut (truncated). Episode by episode, in the order of their beginnings, goes to the process that
    has the fewest rows so far; so all have nearly as many, and no episode is torn apart. If a share is larger than the
    storage, its oldest rows are left out.

    Args:
        parts: Where the replays' files are looked for.
        manifests: What :meth:`ReplayParts.save` gave in each of the processes before.
        storage: Empty; filled with rows (``env`` is that of the episode's old run).
        number: This process's number.
        count: Processes now.

    Raises:
        ReplayPartError: A part is missing or damaged.
    """
    held = [0] * count
    for manifest in manifests:
        old = FrameStackStorage(manifest["max_size"], storage.frame_stack)
        parts.restore(old, manifest)
        if not len(old):
            continue
        old.cut_episodes()
        owner = _owners(old, held)
        mine = (owner == number).nonzero().squeeze(-1) + old.oldest_row
        for row_ids in mine.split(_ROWS):
            rows = old.get(row_ids % old.max_size).exclude("frames", "row_id")
            for start in range(0, len(rows), storage.max_size):
                piece = rows[start : start + storage.max_size]
                cursor = (torch.arange(len(piece)) + storage.last_row_id + 1) % storage.max_size
                storage.set(cursor, piece)
    parts.forget()


def _owners(old: FrameStackStorage, held: list[int]) -> torch.Tensor:
    """Which process gets each row, oldest first (N,); `held` counts on."""
    position = torch.arange(old.oldest_row, old.last_row_id + 1) % old.max_size
    envs, ends = old.column("env")[position].tolist(), old.column(("next", "done"))[position].flatten().tolist()
    lengths: list[int] = []  # of episodes, in the order of their beginnings
    running: dict[int, int] = {}
    episodes = []
    for env, end in zip(envs, ends, strict=True):
        if env not in running:
            running[env] = len(lengths)
            lengths.append(0)
        episode = running.pop(env) if end else running[env]
        lengths[episode] += 1
        episodes.append(episode)
    owners = []
    for length in lengths:
        owner = held.index(min(held))
        held[owner] += length
        owners.append(owner)
    return torch.tensor(owners)[torch.tensor(episodes)]
