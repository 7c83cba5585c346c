"""The VLM's actions for transitions in the replay, asked for in batches after they were collected."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from covr_lightning.data.frame_storage import FrameStackStorage
from covr_lightning.errors import ConfigError
from covr_lightning.progress import bar
from covr_lightning.vlm.answers import Answers
from covr_lightning.vlm.pictures import side_by_side
from covr_lightning.vlm.vlm import Proposals

#: What becomes of answers that an earlier round's VLM gave.
StalePriors = Literal["keep", "mask", "relabel"]


class Labeller(Protocol):
    """What proposes actions for frames: a VLM."""

    #: Fine-tune round of the weights that answer.
    round: int
    #: How many of an observation's newest frames it is shown, n.
    frames: int

    def ask(self, frames: Tensor) -> Proposals:
        """Actions (B, A), which of them can be parsed and which came at all, of frames side by side, uint8."""


class LabelQueue:
    """Asks for a_v at every n-th agent step, in batches, and writes the answers into the replay.

    a_v never acts, so asking later changes nothing but the cost: the answers are those of the same VLM on the same
    frames. Rows in between, rows that still wait, rows whose answer cannot be parsed, and rows that got none because
    the service that gives them is away are masked (``a_v_valid`` is False). Each answer keeps the round of the VLM that
    gave it (``vlm_round``; −1 without one).

    With `hold`, rows in between take the answer to the last asked row of their episode; those before an episode's first
    asked row stay masked.

    Args:
        storage: The replay's storage.
        labeller: What proposes the actions.
        every_agent_steps: Distance n between two asked rows.
        batch_size: Rows asked for at once.
        stale: What :meth:`vlm_changed` does with the answers so far: ``"keep"`` leaves them, ``"mask"`` masks them,
            ``"relabel"`` asks the new VLM about the same rows.
        relabel_batch_size: Rows asked for at once when relabelling.
        hold: Whether rows in between take the last answer.

    Raises:
        ConfigError: `stale` is none of the above, or ``"relabel"`` together with `hold`: a row that holds an answer
            does not know whose it is.
    """

    def __init__(
        self,
        storage: FrameStackStorage,
        labeller: Labeller,
        every_agent_steps: int = 10,
        batch_size: int = 16,
        stale: StalePriors = "keep",
        relabel_batch_size: int = 128,
        hold: bool = False,
    ) -> None:
        if stale not in ("keep", "mask", "relabel"):
            raise ConfigError(f"data.stale_priors is {stale!r}; it can be 'keep', 'mask' or 'relabel'.")
        if hold and stale == "relabel":
            raise ConfigError("data.stale_priors is 'relabel'; with data.hold_answers it can be 'keep' or 'mask'.")
        self.storage = storage
        self.labeller = labeller
        self.every_agent_steps = every_agent_steps
        self.batch_size = batch_size
        self.stale = stale
        self.relabel_batch_size = relabel_batch_size
        #: Of the frames that were asked about.
        self.answers = Answers()
        self._waiting: list[int] = []
        self.hold = hold
        self._newest_asked: dict[int, int] = {}  # in each environment's running episode
        self._holding: list[tuple[int, int]] = []  # rows that wait for another's answer, and that other row

    def offer(self, row_id: int, agent_step: int, env: int = 0) -> None:
        """Queue a row if its agent step is due, and label the queue when a batch is full.

        Args:
            row_id: Running number of the row.
            agent_step: The row's agent step in its environment, counted from 0.
            env: Number of the environment.
        """
        if agent_step % self.every_agent_steps:
            if self.hold and env in self._newest_asked:
                self._holding.append((row_id, self._newest_asked[env]))
            return
        self._waiting.append(row_id)
        self._newest_asked[env] = row_id
        if len(self._waiting) >= self.batch_size:
            self.flush()

    def end_episode(self, env: int) -> None:
        """An environment's episode is over: its last answer is held no longer."""
        self._newest_asked.pop(env, None)

    def flush(self) -> None:
        """Label every waiting row that the replay still holds; stopped in between, all of it waits still."""
        counted = Answers()
        if self._waiting:
            position, alive = self.storage.position_of(torch.tensor(self._waiting))
            for part in position[alive].split(self.batch_size):
                self._label(part, counted)
        self._hand_on()
        self._waiting = []
        self.answers += counted

    def _hand_on(self) -> None:
        """Write answers to the rows that hold them."""
        if not self._holding:
            return
        rows = torch.tensor(self._holding)  # (N, 2)
        position, alive = self.storage.position_of(rows)
        to, of = position[alive.all(1)].unbind(1)
        for key in ("a_v", "a_v_valid", "vlm_round"):
            self.storage.write_column(key, to, self.storage.column(key)[of])
        self._holding = []

    def vlm_changed(self, show_progress: bool = False) -> int:
        """Treat the answers of the VLM as it was before a round as `stale` says.

        Args:
            show_progress: Show a bar while relabelling.

        Returns:
            Rows masked or labelled anew.
        """
        if self.stale == "keep" or not len(self.storage):
            return 0
        # Counted once all is done: a run that is stopped in between does it again.
        counted = Answers()
        told = self.storage.column("vlm_round").reshape(-1) >= 0
        if self.stale == "mask":
            told &= self.storage.column("a_v_valid").reshape(-1)
        labelled = told.nonzero().squeeze(-1)
        if self.stale == "mask":
            self.storage.write_column("a_v_valid", labelled, torch.zeros(len(labelled), 1, dtype=torch.bool))
        else:
            with bar(len(labelled), "relabelling", "row", show_progress) as progress:
                for part in labelled.split(self.relabel_batch_size):
                    self._label(part, counted)
                    progress.update(len(part))
            self.answers += counted
        return len(labelled)

    def _label(self, position: Tensor, counted: Answers) -> None:
        """Ask about rows, write the answers and count them."""
        if not len(position):
            return
        shown = self.labeller.frames
        pictures = side_by_side(self.storage.newest_frames(position, shown), shown)
        actions, valid, answered = self.labeller.ask(pictures)
        self.storage.write_column("a_v_valid", position, valid[:, None])
        # A row without an answer keeps what an earlier round said, masked, so that it is relabelled with the others.
        told, count = position[answered], int(answered.sum())
        if count:
            self.storage.write_column("a_v", told, actions[answered])
            self.storage.write_column("vlm_round", told, torch.full((count, 1), self.labeller.round))
        counted.count(valid, answered)

    def state_dict(self) -> dict[str, Any]:
        """Waiting rows and counts."""
        return {
            "waiting": list(self._waiting),
            "holding": [list(pair) for pair in self._holding],
            "newest_asked": [list(pair) for pair in self._newest_asked.items()],
            **asdict(self.answers),
        }

    def add_counts(self, state: dict[str, Any]) -> None:
        """Count what another queue had counted when :meth:`state_dict` was taken."""
        self.answers += _counted(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set what :meth:`state_dict` gave."""
        self._waiting = [int(i) for i in state["waiting"]]
        self._holding = [(row, source) for row, source in state.get("holding", [])]
        self._newest_asked = dict(state.get("newest_asked", []))
        self.answers = _counted(state)


def _counted(state: dict[str, Any]) -> Answers:
    """The answers of a queue's state; one that was saved before there were services has none unanswered."""
    return Answers(state["asked"], state["unparsable"], state.get("unanswered", 0))
