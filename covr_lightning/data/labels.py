"""The VLM's actions for transitions in the replay, asked for in batches after they were collected."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from covr_lightning.data.frame_storage import FrameStackStorage


class Labeller(Protocol):
    """What proposes actions for frames: a VLM."""

    round: int

    def propose(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (B, A) and which of them are valid (B,) bool, of frames (B, 3, H, W) uint8."""


class LabelQueue:
    """Asks for a_v at every n-th agent step, in batches, and writes the answers into the replay.

    a_v never acts, so asking later changes nothing but the cost: the answers are those of the same VLM on the same
    frames. Rows in between, rows that still wait, and rows whose answer cannot be parsed are masked
    (``a_v_valid`` is False). Each answer keeps the round of the VLM that gave it (``vlm_round``; −1 without one).

    Args:
        storage: The replay's storage.
        labeller: What proposes the actions.
        every_agent_steps: Distance n between two asked rows.
        batch_size: Rows asked for at once.
    """

    def __init__(
        self, storage: FrameStackStorage, labeller: Labeller, every_agent_steps: int = 10, batch_size: int = 16
    ) -> None:
        self.storage = storage
        self.labeller = labeller
        self.every_agent_steps = every_agent_steps
        self.batch_size = batch_size
        self.asked = 0
        self.unparsable = 0
        self._waiting: list[int] = []

    def offer(self, row_id: int, agent_step: int) -> None:
        """Queue a row if its agent step is due, and label the queue when a batch is full.

        Args:
            row_id: Running number of the row.
            agent_step: The row's agent step, counted from 0.
        """
        if agent_step % self.every_agent_steps:
            return
        self._waiting.append(row_id)
        if len(self._waiting) >= self.batch_size:
            self.flush()

    def flush(self) -> None:
        """Label every waiting row that the replay still holds."""
        if not self._waiting:
            return
        position, alive = self.storage.position_of(torch.tensor(self._waiting))
        self._waiting = []
        for part in position[alive].split(self.batch_size):
            actions, valid = self.labeller.propose(self.storage.newest_frames(part))
            self.storage.write_column("a_v", part, actions)
            self.storage.write_column("a_v_valid", part, valid[:, None])
            self.storage.write_column("vlm_round", part, torch.full((len(part), 1), self.labeller.round))
            self.asked += len(part)
            self.unparsable += int((~valid).sum())

    def state_dict(self) -> dict[str, list[int] | int]:
        """Waiting rows and counts."""
        return {"waiting": list(self._waiting), "asked": self.asked, "unparsable": self.unparsable}

    def load_state_dict(self, state: dict[str, list[int] | int]) -> None:
        """Set what :meth:`state_dict` gave."""
        self._waiting = [int(i) for i in state["waiting"]]  # type: ignore[union-attr]
        self.asked, self.unparsable = int(state["asked"]), int(state["unparsable"])  # type: ignore[arg-type]
