"""Replay storage that keeps every frame once and stacks frames when they are read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import LazyTensorStorage

log = logging.getLogger(__name__)

#: Frames kept per transition. An episode of T transitions has T + 1 frames, so this holds episodes of 20 and longer.
FRAMES_PER_TRANSITION = 1.05


@dataclass
class ReplaySlice:
    """Consecutive rows, the frames that they brought, and late labels of rows before them.

    Attributes:
        rows: Entry → (N, …), by its key with ``/`` between the levels.
        first_frame: Running number of the first frame.
        frames: (F, 3, H, W) uint8.
        labels: ``row_id`` (L,) and entries of those rows (L, …); may be empty.
    """

    rows: dict[str, torch.Tensor]
    first_frame: int
    frames: torch.Tensor
    labels: dict[str, torch.Tensor]


@dataclass(frozen=True)
class OpenEpisode:
    """An episode that goes on.

    Attributes:
        last_row: Running number of its last row.
        rows: How many it has so far.
        stack: Running numbers of its newest k frames, oldest first.
    """

    last_row: int
    rows: int
    stack: list[int]


class FrameStackStorage(LazyTensorStorage):
    """A TorchRL storage for transitions of one or several environments, in the order in which they were collected.

    What goes in and what comes out are ordinary transitions with stacked ``pixels`` (3·k, H, W) uint8 at both ends.
    Inside, a ring of single frames holds each frame once and a ring of rows holds everything else, with the running
    numbers of the row's k + 1 frames, oldest first (an episode begins with one frame k times, as the environment gives
    it at a reset). Frame numbers never wrap. Storing both stacks takes 2·k frames a transition, this 1 + 1/T.

    Rows may carry ``env``, the number of their environment (0 without it); each environment's rows continue its last
    ones. All of them share both rings, so that samplers see one replay in the order of time.

    Rows also get ``row_id``, their running number, so that a late label finds its row or finds it overwritten; for
    whoever follows an episode, ``previous_row``, the running number of the row before it (−1 at the episode's first
    one), and ``episode_row``, how many rows of its episode came before it.

    If episodes are so short that live frames would be overwritten, the frame ring grows by a quarter and says so.

    Args:
        max_size: Transitions kept.
        frame_stack: Frames per observation, k.
        frames_per_transition: Size of the frame ring, in frames per transition.
        device: Where frames live. Rows are small and stay in the host's memory, so that samplers, labels and saves read
            them without waiting for a GPU.
    """

    def __init__(
        self,
        max_size: int,
        frame_stack: int = 3,
        frames_per_transition: float = FRAMES_PER_TRANSITION,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(max_size)
        self.frames_device = torch.device(device)
        self.frame_stack = frame_stack
        self._frame_capacity = int(max_size * frames_per_transition) + frame_stack + 2
        self._frames: torch.Tensor | None = None
        self._written = 0  # frames ever written; the next frame gets this number
        self._rows_written = 0
        self._open: dict[int, OpenEpisode] = {}  # by environment
        self._oldest_known = 0  # no frame before this is needed; only as new as the last time the ring was full
        #: How often the storage was saved; a label is stamped with it, so that the next save finds what changed.
        self.saves = 0
        self._labelled_at = torch.full((max_size,), -1)
        self._label_keys: set[str] = set()

    # -- writing -------------------------------------------------------------------------------------------------

    def cut_episode(self, env: int = 0) -> None:
        """End an open episode where it is: its last row becomes truncated (a run resumed without its environment).

        Args:
            env: Whose episode.
        """
        episode = self._open.pop(env, None)
        if episode is None or episode.last_row < self.oldest_row:
            return
        last = torch.tensor([episode.last_row % self.max_size])
        for key in ("next/done", "next/truncated"):
            if tuple(key.split("/")) in self._storage.keys(True):
                self.write_column(key, last, torch.ones(1, 1, dtype=torch.bool))

    def cut_episodes(self) -> None:
        """End every open episode where it is."""
        for env in list(self._open):
            self.cut_episode(env)

    def set(self, cursor: int | Sequence[int] | slice, data: TensorDictBase, *, set_cursor: bool = True) -> None:
        """Write transitions, which must continue the last ones of their environments.

        Args:
            cursor: Row positions, as TorchRL's writers give them.
            data: Transitions with ``pixels``, ``("next", "pixels")``, ``("next", "done")`` and perhaps ``env``.
            set_cursor: See :class:`torchrl.data.TensorStorage`.
        """
        single = data.batch_dims == 0
        if single:
            data = data.unsqueeze(0)
        n = data.shape[0]
        if n > self.max_size:
            raise ValueError(f"{n} transitions cannot be written at once into a replay of {self.max_size}.")
        numbers, before, starts, episodes, written = self._number(data)

        self._reserve(data["pixels"], written, n)
        assert self._frames is not None, "reserved above"
        self._put(numbers[:, -1], data["next", "pixels"][:, -3:])
        if starts:
            first = data["pixels"][starts].unflatten(1, (self.frame_stack, 3))
            self._put(numbers[starts, :-1].flatten(), first.flatten(0, 1))
        rows = data.exclude("pixels", ("next", "pixels"))
        rows["frames"] = numbers
        rows["row_id"] = self._rows_written + torch.arange(n)
        rows["previous_row"], rows["episode_row"] = before.unbind(1)
        super().set(cursor, rows[0] if single else rows, set_cursor=set_cursor)
        self._rows_written += n
        self._written, self._open = written, episodes

    def _put(self, numbers: torch.Tensor, frames: torch.Tensor) -> None:
        """Write frames (N, 3, H, W) to the places of their running numbers (N,), without waiting for a GPU."""
        assert self._frames is not None, "reserved before"
        places = (numbers % self._frame_capacity).to(self.frames_device, non_blocking=True)
        self._frames.index_copy_(0, places, frames.to(self.frames_device, non_blocking=True))

    def _number(
        self, data: TensorDictBase
    ) -> tuple[torch.Tensor, torch.Tensor, list[int], dict[int, OpenEpisode], int]:
        """Give frames their running numbers, and find each row's place in its episode.

        Every transition brings its next frame; one that starts an episode brings its own before it. That is one frame
        after a reset, and k where the episode's beginning is not known here.

        Returns:
            Numbers of each row's frames (N, k + 1), ``previous_row`` and ``episode_row`` (N, 2), which rows start an
            episode, what is open afterwards, and the number of the frame after the last one.
        """
        done = data["next", "done"].reshape(-1).tolist()
        named = data.get("env", None)
        envs = named.reshape(-1).tolist() if named is not None else [0] * len(done)
        episodes, written = dict(self._open), self._written
        numbers, before, starts = [], [], []
        for row, (env, ends) in enumerate(zip(envs, done, strict=True)):
            episode = episodes.pop(env, None)
            if episode is None:
                stack = _first_stack(data["pixels"][row], self.frame_stack, written)
                written = stack[-1] + 1
                starts.append(row)
                before.append([-1, 0])
            else:
                stack = episode.stack
                before.append([episode.last_row, episode.rows])
            numbers.append([*stack, written])
            written += 1
            if not ends:
                episodes[env] = OpenEpisode(self._rows_written + row, before[-1][1] + 1, numbers[-1][1:])
        return torch.tensor(numbers), torch.tensor(before), starts, episodes, written

    def _reserve(self, pixels: torch.Tensor, written_after: int, n: int) -> None:
        """Allocate the frame ring, or grow it if writing would overwrite frames that live rows need."""
        if self._frames is None:
            shape = (self._frame_capacity, 3, *pixels.shape[-2:])
            self._frames = torch.empty(shape, dtype=torch.uint8, device=self.frames_device)
        if written_after - self._oldest_known <= self._frame_capacity:
            return
        oldest = self._oldest_known = self._oldest_needed(n)
        needed = written_after - oldest
        if needed <= self._frame_capacity:
            return
        capacity = max(needed + self.frame_stack, int(1.25 * self._frame_capacity))
        log.info("Episodes are short: the replay's frame ring grows to %d frames.", capacity)
        frames = torch.empty((capacity, *self._frames.shape[1:]), dtype=torch.uint8, device=self.frames_device)
        live = torch.arange(oldest, self._written)
        frames[live % capacity] = self._frames[live % self._frame_capacity]
        self._frames, self._frame_capacity = frames, capacity

    def _oldest_needed(self, n: int) -> int:
        """Number of the oldest frame that is still needed once `n` more rows are written."""
        oldest = min((episode.stack[0] for episode in self._open.values()), default=self._written)
        stay = torch.arange(max(0, self._rows_written + n - self.max_size), self._rows_written)
        if not len(stay):
            return oldest
        return min(oldest, int(self._storage["frames"][stay % self.max_size, 0].min()))

    # -- reading -------------------------------------------------------------------------------------------------

    def get(self, index: int | Sequence[int] | slice | torch.Tensor) -> TensorDictBase:
        """Read transitions with both observations stacked.

        Args:
            index: Row positions.

        Returns:
            The rows, with ``pixels`` and ``("next", "pixels")`` (…, 3·k, H, W) uint8, which are where the frames are.
        """
        rows = super().get(index).clone(recurse=False)
        rows["next"] = rows["next"].clone(recurse=False)
        if self.frames_device.type != "cpu":
            rows.clear_device_()  # they get frames of another one
        frames = self.frames(rows["frames"])  # (…, k + 1, 3, H, W)
        at = frames.ndim - 4
        rows["pixels"] = frames.narrow(at, 0, self.frame_stack).flatten(at, at + 1)
        rows["next", "pixels"] = frames.narrow(at, 1, self.frame_stack).flatten(at, at + 1)
        return rows

    def newest_frames(self, index: torch.Tensor, count: int = 1) -> torch.Tensor:
        """The newest frames of each row's observation.

        Args:
            index: Row positions (N,).
            count: How many, at most k.

        Returns:
            (N, 3·count, H, W) uint8, the oldest first.
        """
        return self.frames(self._storage["frames"][index, -1 - count : -1]).flatten(1, 2)

    def frames(self, numbers: torch.Tensor) -> torch.Tensor:
        """Single frames by their running numbers, which the rows' entry ``frames`` names.

        Args:
            numbers: (…) of frames that rows still need.

        Returns:
            (…, 3, H, W) uint8.
        """
        assert self._frames is not None, "a row was written"
        places = (numbers % self._frame_capacity).to(self.frames_device, non_blocking=True)
        # index_select copies whole frames; indexing goes pixel by pixel and takes three times as long.
        return self._frames.index_select(0, places.flatten()).unflatten(0, places.shape)

    def position_of(self, row_id: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where rows of given running numbers stand.

        Args:
            row_id: (N,) running numbers.

        Returns:
            Positions (N,), and which of them still hold that row (N,) bool.
        """
        position = row_id % self.max_size
        return position, self._storage["row_id"][position] == row_id

    def column(self, key: str | tuple[str, ...]) -> torch.Tensor:
        """One entry of every row, by position (N, …); a view, not to be written to.

        Args:
            key: Entry of the rows.
        """
        return self._storage[key][: len(self)]

    def write_column(self, key: str, index: torch.Tensor, value: torch.Tensor) -> None:
        """Overwrite one entry of existing rows (a label that came later).

        Args:
            key: Entry of the rows; ``next/done`` is the entry ``done`` of ``next``.
            index: Row positions (N,).
            value: (N, …).
        """
        column = self._storage[tuple(key.split("/"))]
        column[index] = value.to(column)
        self._labelled_at[index] = self.saves
        self._label_keys.add(key)

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

    @property
    def oldest_row(self) -> int:
        """Running number of the oldest row that is still held."""
        return max(0, self._rows_written - self.max_size)

    @property
    def oldest_frame(self) -> int:
        """Running number of the oldest frame that a row still needs."""
        return self._oldest_needed(0)

    def frames_end(self, row_id: int) -> int:
        """Running number of the frame after the last one that the rows before `row_id` need."""
        return int(self._storage["frames"][(row_id - 1) % self.max_size, -1]) + 1 if row_id else 0

    def numbers(self) -> dict[str, Any]:
        """What the storage counts, of plain integers; ``rows_written`` is its write index.

        ``open`` has an entry per open episode: its environment, its last row, how many it has, and the numbers of its
        newest frames.
        """
        return {
            "max_size": self.max_size, "frame_capacity": self._frame_capacity, "rows_written": self._rows_written,
            "frames_written": self._written,
            "open": [[env, e.last_row, e.rows, *e.stack] for env, e in sorted(self._open.items())],
        }  # fmt: skip

    def slice(self, start: int, end: int, first_frame: int, labels_since: int | None) -> ReplaySlice:
        """Copy rows that are held, in the order of their running numbers, for a save.

        Args:
            start: Running number of the first row.
            end: Running number after the last one.
            first_frame: Running number of the first frame; the last one is that of the last row.
            labels_since: Take labels of rows before `start` that were written since the storage was saved so many
                times; None for no labels.
        """
        position = torch.arange(start, end) % self.max_size
        rows = {"/".join(_as_tuple(k)): v for k, v in self._storage[position].items(True, True)}
        assert self._frames is not None, "a row was written"
        frames = self._frames[torch.arange(first_frame, self.frames_end(end)) % self._frame_capacity].cpu()
        labels: dict[str, torch.Tensor] = {}
        if labels_since is not None:
            row_id = self.column("row_id")
            due = ((self._labelled_at[: len(self)] >= labels_since) & (row_id < start)).nonzero().squeeze(-1)
            if len(due):
                names = ("row_id", *sorted(self._label_keys))
                labels = {name: self._storage[tuple(name.split("/"))][due] for name in names}
        return ReplaySlice(rows, first_frame, frames, labels)

    def has_labels_since(self, saves: int) -> bool:
        """Whether a row got a label since the storage was saved so many times."""
        return bool((self._labelled_at[: len(self)] >= saves).any())

    def restore(self, numbers: dict[str, Any], slices: Iterable[ReplaySlice]) -> None:
        """Become the storage that gave `numbers` and, in this order, the slices.

        Rows and frames that have left the ring since are passed over.

        Args:
            numbers: What :meth:`numbers` of a storage of the same capacity gave.
            slices: Rows up to the last one, without a gap from the oldest that is held.

        Raises:
            ValueError: The slices lack rows that are held.
        """
        self._empty()
        self._rows_written, self._written = numbers["rows_written"], numbers["frames_written"]
        self._open = {env: OpenEpisode(last_row, rows, stack) for env, last_row, rows, *stack in numbers["open"]}
        self._frame_capacity = numbers["frame_capacity"]
        oldest, length = self.oldest_row, min(self._rows_written, self.max_size)
        rows: dict[str, torch.Tensor] = {}
        for part in slices:
            self._put_frames(part)
            row_id = part.rows["row_id"]
            held = row_id >= oldest
            for key, value in part.rows.items():
                column = rows.setdefault(key, value.new_full((length, *value.shape[1:]), -1 if key == "row_id" else 0))
                column[row_id[held] % self.max_size] = value[held]
            if part.labels:
                row_id = part.labels.pop("row_id")
                held = row_id >= oldest
                for key, value in part.labels.items():
                    rows[key][row_id[held] % self.max_size] = value[held]
                    self._label_keys.add(key)
                self._labelled_at[row_id[held] % self.max_size] = self.saves
            self.saves += 1
        row_id = torch.arange(oldest, self._rows_written)
        if length and ("row_id" not in rows or not torch.equal(rows["row_id"][row_id % self.max_size], row_id)):
            raise ValueError(f"The replay that was saved lacks some of its rows {oldest} to {self._rows_written - 1}.")
        if length:
            restored = TensorDict({tuple(key.split("/")): value for key, value in rows.items()}, [length])
            super().set(range(length), restored)

    def _put_frames(self, part: ReplaySlice) -> None:
        if self._frames is None:
            shape = (self._frame_capacity, *part.frames.shape[1:])
            self._frames = torch.empty(shape, dtype=torch.uint8, device=self.frames_device)
        gone = max(0, self._written - self._frame_capacity - part.first_frame)
        frames, slot = part.frames[gone:], (part.first_frame + gone) % self._frame_capacity
        before_the_end = self._frame_capacity - slot
        self._frames[slot : slot + len(frames)] = frames[:before_the_end]
        self._frames[: max(0, len(frames) - before_the_end)] = frames[before_the_end:]

    def _empty(self) -> None:
        super()._empty()
        self._frames = None
        self._written = self._rows_written = self._oldest_known = 0
        self._open = {}
        self.saves = 0
        self._labelled_at.fill_(-1)
        self._label_keys.clear()

    def state_dict(self) -> dict[str, Any]:
        """Not offered: a replay is saved in parts, by :class:`covr_lightning.data.replay_parts.ReplayParts`."""
        raise RuntimeError("A replay is saved with ReplayParts.save(storage), not through a state dict.")


def _first_stack(pixels: torch.Tensor, frame_stack: int, number: int) -> list[int]:
    frames = pixels.unflatten(0, (frame_stack, 3))
    if bool((frames == frames[-1]).all()):
        return [number] * frame_stack
    return list(range(number, number + frame_stack))


def _as_tuple(key: str | tuple[str, ...]) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key
