"""Replay storage that keeps every frame once and stacks frames when they are read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tensordict import TensorDict, TensorDictBase
from torchrl.data import LazyTensorStorage

log = logging.getLogger(__name__)

#: Frames kept per transition. An episode of T transitions has T + 1 frames, so this holds episodes of 20 and longer.
FRAMES_PER_TRANSITION = 1.05


class FrameStackStorage(LazyTensorStorage):
    """A TorchRL storage for transitions of one environment, in the order in which they happened.

    What goes in and what comes out are ordinary transitions with stacked ``pixels`` (3·k, H, W) uint8 at both ends.
    Inside, a ring of single frames holds each frame once and a ring of rows holds everything else, with the running
    number of the row's newest frame and of its episode's first frame. Frame numbers never wrap, so a stack is the
    frames n−k+1 … n, none before the episode's first (the first is repeated, as the environment does at a reset), and
    the next stack is the same one frame later. Storing both stacks takes 2·k frames a transition, this 1 + 1/T.

    Rows also get ``row_id``, their running number, so that a late label finds its row or finds it overwritten.

    If episodes are so short that live frames would be overwritten, the frame ring grows by a quarter and says so.

    Args:
        max_size: Transitions kept.
        frame_stack: Frames per observation, k.
        frames_per_transition: Size of the frame ring, in frames per transition.
        device: Where rows and frames live.
    """

    def __init__(
        self,
        max_size: int,
        frame_stack: int = 3,
        frames_per_transition: float = FRAMES_PER_TRANSITION,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(max_size, device=device)
        self.frame_stack = frame_stack
        self._frame_capacity = int(max_size * frames_per_transition) + frame_stack + 2
        self._frames: torch.Tensor | None = None
        self._written = 0  # frames ever written; the next frame gets this number
        self._rows_written = 0
        self._first = 0  # number of the current episode's first frame
        self._episode_open = False

    # -- writing -------------------------------------------------------------------------------------------------

    def cut_episode(self) -> None:
        """Say that the next row starts a new episode although the last row was not done (a resumed run)."""
        self._episode_open = False

    def set(self, cursor: int | Sequence[int] | slice, data: TensorDictBase, *, set_cursor: bool = True) -> None:
        """Write transitions, which must continue the last ones written.

        Args:
            cursor: Row positions, as TorchRL's writers give them.
            data: Transitions with ``pixels``, ``("next", "pixels")`` and ``("next", "done")``.
            set_cursor: See :class:`torchrl.data.TensorStorage`.
        """
        single = data.batch_dims == 0
        if single:
            data = data.unsqueeze(0)
        n = data.shape[0]
        if n > self.max_size:
            raise ValueError(f"{n} transitions cannot be written at once into a replay of {self.max_size}.")
        done = data["next", "done"].reshape(n)
        starts = torch.empty(n, dtype=torch.bool)
        starts[0] = not self._episode_open
        starts[1:] = done[:-1].cpu()
        # Every transition brings its next frame; one that starts an episode brings its own frame too.
        next_frame = self._written + torch.arange(n) + torch.cumsum(starts, 0)
        newest = next_frame - 1
        first = torch.where(starts, newest, torch.full_like(newest, self._first)).cummax(0).values

        self._reserve(data["pixels"], int(next_frame[-1]) + 1, n)
        assert self._frames is not None, "reserved above"
        self._frames[next_frame % self._frame_capacity] = data["next", "pixels"][:, -3:].to(self._frames.device)
        if starts.any():
            self._frames[newest[starts] % self._frame_capacity] = data["pixels"][starts, -3:].to(self._frames.device)
        self._written = int(next_frame[-1]) + 1
        self._first = int(first[-1])
        self._episode_open = not bool(done[-1])

        rows = data.exclude("pixels", ("next", "pixels"))
        rows["frame"] = newest
        rows["first_frame"] = first
        rows["row_id"] = self._rows_written + torch.arange(n)
        self._rows_written += n
        super().set(cursor, rows[0] if single else rows, set_cursor=set_cursor)

    def _reserve(self, pixels: torch.Tensor, written_after: int, n: int) -> None:
        """Allocate the frame ring, or grow it if writing would overwrite frames that live rows need."""
        if self._frames is None:
            shape = (self._frame_capacity, 3, *pixels.shape[-2:])
            self._frames = torch.empty(shape, dtype=torch.uint8, device=self.device)
        oldest = self._oldest_needed(n)
        needed = written_after - oldest
        if needed <= self._frame_capacity:
            return
        capacity = max(needed + self.frame_stack, int(1.25 * self._frame_capacity))
        log.info("Episodes are short: the replay's frame ring grows to %d frames.", capacity)
        frames = torch.empty((capacity, *self._frames.shape[1:]), dtype=torch.uint8, device=self.device)
        live = torch.arange(oldest, self._written)
        frames[live % capacity] = self._frames[live % self._frame_capacity]
        self._frames, self._frame_capacity = frames, capacity

    def _oldest_needed(self, n: int) -> int:
        """Number of the oldest frame that is still needed once `n` more rows are written."""
        oldest_row = max(0, self._rows_written + n - self.max_size)
        if oldest_row >= self._rows_written:  # every row so far gives way
            return max(self._written - 1, 0)
        rows = self._storage
        slot = oldest_row % self.max_size
        return max(int(rows["frame"][slot]) - self.frame_stack + 1, int(rows["first_frame"][slot]))

    # -- reading -------------------------------------------------------------------------------------------------

    def get(self, index: int | Sequence[int] | slice | torch.Tensor) -> TensorDictBase:
        """Read transitions with both observations stacked.

        Args:
            index: Row positions.

        Returns:
            The rows, with ``pixels`` and ``("next", "pixels")`` (…, 3·k, H, W) uint8.
        """
        rows = super().get(index).clone(recurse=False)
        rows["next"] = rows["next"].clone(recurse=False)
        frame, first = rows["frame"], rows["first_frame"]
        offsets = torch.arange(1 - self.frame_stack, 2, device=frame.device)
        numbers = torch.maximum(frame.unsqueeze(-1) + offsets, first.unsqueeze(-1))
        assert self._frames is not None, "a row was written"
        frames = self._frames[numbers % self._frame_capacity]  # (…, k + 1, 3, H, W)
        at = frames.ndim - 4
        rows["pixels"] = frames.narrow(at, 0, self.frame_stack).flatten(at, at + 1)
        rows["next", "pixels"] = frames.narrow(at, 1, self.frame_stack).flatten(at, at + 1)
        return rows

    def newest_frames(self, index: torch.Tensor) -> torch.Tensor:
        """The newest frame of each row, without stacking.

        Args:
            index: Row positions (N,).

        Returns:
            (N, 3, H, W) uint8.
        """
        assert self._frames is not None, "a row was written"
        return self._frames[self._storage["frame"][index] % self._frame_capacity]

    def position_of(self, row_id: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where rows of given running numbers stand.

        Args:
            row_id: (N,) running numbers.

        Returns:
            Positions (N,), and which of them still hold that row (N,) bool.
        """
        position = row_id % self.max_size
        return position, self._storage["row_id"][position] == row_id

    def write_column(self, key: str, index: torch.Tensor, value: torch.Tensor) -> None:
        """Overwrite one entry of existing rows (a label that came later).

        Args:
            key: Entry of the rows.
            index: Row positions (N,).
            value: (N, …).
        """
        self._storage[key][index] = value.to(self._storage[key].dtype)

    @property
    def last_row_id(self) -> int:
        """Running number of the newest row; −1 if there is none."""
        return self._rows_written - 1

    def bytes_per_transition(self) -> float:
        """Bytes held per transition of capacity, frames and rows together."""
        if self._frames is None:
            return 0.0
        row = self._storage[0]
        row_bytes = sum(value.numel() * value.element_size() for value in row.values(True, True))
        frame_bytes = self._frames[0].numel()
        return row_bytes + frame_bytes * self._frame_capacity / self.max_size

    # -- saving --------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:  # type: ignore[override]
        """Write rows and live frames to one safetensors file, complete or not at all.

        Args:
            path: File to write.
        """
        tensors: dict[str, torch.Tensor] = {}
        if self._frames is not None:
            rows = self._storage[: len(self)]
            tensors = {"rows/" + "/".join(_as_tuple(k)): v.contiguous() for k, v in rows.items(True, True)}
            oldest = max(self._oldest_needed(0), self._written - self._frame_capacity, 0)
            live = torch.arange(oldest, self._written)
            tensors["frames"] = self._frames[live % self._frame_capacity]
        numbers = dict(
            max_size=self.max_size, written=self._written, rows_written=self._rows_written, first=self._first,
            episode_open=int(self._episode_open), frame_capacity=self._frame_capacity,
        )  # fmt: skip
        part = path.with_suffix(".part")
        save_file(tensors, part, metadata={name: str(value) for name, value in numbers.items()})
        part.replace(path)

    def restore(self, path: Path) -> None:
        """Read what :meth:`save` wrote.

        Args:
            path: The file.

        Raises:
            ValueError: The file holds a replay of another capacity.
        """
        with safe_open(path, framework="pt") as file:
            numbers = {name: int(value) for name, value in file.metadata().items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if numbers["max_size"] != self.max_size:
            raise ValueError(
                f"{path} holds a replay of capacity {numbers['max_size']}, not {self.max_size} "
                "(YAML key data.replay_capacity)."
            )
        self._empty()
        self._written, self._rows_written = numbers["written"], numbers["rows_written"]
        self._first, self._episode_open = numbers["first"], bool(numbers["episode_open"])
        if not tensors:
            return
        frames = tensors.pop("frames")
        self._frame_capacity = numbers["frame_capacity"]
        self._frames = torch.empty((self._frame_capacity, *frames.shape[1:]), dtype=torch.uint8, device=self.device)
        live = torch.arange(self._written - len(frames), self._written)
        self._frames[live % self._frame_capacity] = frames.to(self.device)
        rows = TensorDict({tuple(k.split("/")[1:]): v for k, v in tensors.items()})
        rows.batch_size = [len(rows["frame"])]
        super().set(range(len(rows)), rows)

    def _empty(self) -> None:
        super()._empty()
        self._frames = None
        self._written = self._rows_written = self._first = 0
        self._episode_open = False

    def state_dict(self) -> dict[str, Any]:
        """Not offered: a replay is saved by :meth:`save`, far faster than through a pickle of tensors."""
        raise RuntimeError("A replay is saved with FrameStackStorage.save(path), not through a state dict.")


def _as_tuple(key: str | tuple[str, ...]) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key
