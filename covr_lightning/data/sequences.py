"""Consecutive transitions out of the replay, for objectives that look several steps ahead."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from covr_lightning import processes
from covr_lightning.agent.objectives import Objective
from covr_lightning.data.frame_storage import FrameStackStorage
from covr_lightning.envs.base import EnvSpec
from covr_lightning.errors import ConfigError

#: Added to a seed, so that what draws transitions with it draws other numbers.
SEED_OFFSET = 20_000


class SequenceSampler:
    """Draws windows of L consecutive transitions of one episode, each that the replay holds as likely as another.

    A window never reaches across the end of an episode, into another environment's rows, or over the seam of the ring;
    its last transition may be its episode's last. Draws are with replacement and come from a generator of its own, so
    that the transitions of the critics are the same with and without sequences.

    Args:
        storage: The replay's storage.
        length: Transitions of a window, L.
        count: Windows of a draw, S.
        seed: Seed of the draws.
    """

    def __init__(self, storage: FrameStackStorage, length: int, count: int, seed: int) -> None:
        self.storage = storage
        self.length = length
        self.count = count
        self._rng = torch.Generator()
        self.reseed(seed)

    @classmethod
    def needed_by(
        cls, objectives: Iterable[Objective], storage: FrameStackStorage, spec: EnvSpec, seed: int
    ) -> SequenceSampler | None:
        """What draws for all of an agent's objectives: as many and as long windows as the most demanding one asks for.

        Args:
            objectives: The agent's.
            storage: The replay's storage.
            spec: The environment's shapes.
            seed: Seed of the draws.

        Returns:
            None if no objective needs sequences.

        Raises:
            ConfigError: No episode, or not this replay, is as long as an objective asks for; or the run's processes
                cannot share the windows evenly.
        """
        needing = [objective for objective in objectives if objective.sequences]
        if not needing:
            return None
        longest = max(needing, key=lambda objective: objective.sequence_length)
        most = max(needing, key=lambda objective: objective.sequences)
        for what, limit, key in (
            ("an episode has", spec.episode_agent_steps, "data.env.action_repeat"),
            ("a process's replay holds", storage.max_size, "data.replay_capacity"),
        ):
            if longest.sequence_length > limit:
                raise ConfigError(
                    f"{type(longest).__name__} (model.objectives) looks at {longest.sequence_length} agent steps in a "
                    f"row, but {what} {limit} ({key}); it can be 1 to {limit}."
                )
        if most.sequences % processes.count():
            raise ConfigError(
                f"{type(most).__name__} (model.objectives) takes {most.sequences} sequences an update, which "
                f"{processes.count()} processes cannot share evenly; it must be a multiple of {processes.count()}."
            )
        return cls(storage, longest.sequence_length, most.sequences // processes.count(), seed)

    def add_to(self, batch: TensorDictBase) -> TensorDictBase:
        """The same batch with a draw as its entry ``sequences``.

        Args:
            batch: Transitions (B,); as it holds both afterwards, it has no batch size any more, its entries have.
        """
        batch.batch_size = torch.Size([])
        return batch.set("sequences", self.sample())

    def sample(self) -> TensorDict:
        """Draw windows.

        Returns:
            Windows (S,), or (0,) while the replay holds none: ``pixels`` (S, L + 1, 3·k, H, W) uint8, the observations
            s_0 … s_L with the one after the last transition; ``action`` (S, L, A), a_0 … a_{L−1}; ``reward`` (S, L, 1),
            that of a_t at t; ``terminated`` (S, L, 1) bool, whether s_{t+1} was a true end.
        """
        position = self._windows(self._drawn_ends())
        frames = self.storage.column("frames")[position]  # (S, L, k + 1): each row's stack, and the frame after it
        numbers = torch.cat([frames[:, 0, :-1], frames[:, :, -1]], dim=1)  # (S, k + L): each frame once
        stacks = self.storage.frames(numbers).unfold(1, self.storage.frame_stack, 1)  # (S, L + 1, 3, H, W, k)
        following: Any = self.storage.column("next")
        return TensorDict(
            {
                "pixels": stacks.movedim(-1, 2).flatten(2, 3),
                "action": self.storage.column("action")[position],
                "reward": following["reward"][position],
                "terminated": following["terminated"][position],
            },
            [len(position)],
        )

    def ends(self) -> Tensor:
        """Positions (N,) of all rows that a window can end with."""
        return self._that_end(torch.arange(len(self.storage)))

    def _that_end(self, position: Tensor) -> Tensor:
        """Those of some positions whose rows a window can end with, in the same order."""
        previous, oldest = self.storage.column("previous_row"), self.storage.oldest_row
        position = position.to(previous.device)
        row = self.storage.column("row_id")[position]
        for _ in range(self.length - 1):
            row = previous[row % self.storage.max_size]
            held = row >= oldest
            position, row = position[held], row[held]
        return position

    def _drawn_ends(self) -> Tensor:
        """Positions (S,) drawn from :meth:`ends`, or (0,) if there are none."""
        # Nearly all rows end a window as a rule: to draw rows and drop the others is quicker than to list them.
        rows = torch.randint(len(self.storage), (2 * self.count,), generator=self._rng)
        drawn = self._that_end(rows)
        if len(drawn) < self.count:
            ends = self.ends()
            drawn = ends[torch.randint(len(ends), (self.count,), generator=self._rng)] if len(ends) else ends
        return drawn[: self.count]

    def _windows(self, ends: Tensor) -> Tensor:
        """Positions (S, L), in the order of time, of the windows that end with the given ones (S,)."""
        positions, previous = [ends], self.storage.column("previous_row")
        for _ in range(self.length - 1):
            positions.append(previous[positions[-1]] % self.storage.max_size)
        return torch.stack(positions[::-1], dim=1)

    def reseed(self, seed: int) -> None:
        """Draw with other random numbers from here on."""
        self._rng.manual_seed(seed + SEED_OFFSET)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state; all else follows from the storage."""
        return {"rng": self._rng.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set what :meth:`state_dict` gave."""
        self._rng.set_state(state["rng"])
