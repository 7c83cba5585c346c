"""How a replay is saved: in part files that are written once, and a manifest that names them.

A save writes what is new since the last one, rows, frames and late labels of older rows, to a part file of its own
(safetensors). The manifest lists the parts in order, with their sizes and checksums, and goes into the checkpoint. So a
checkpoint names exactly the parts that it needs, and the parts of later saves do not touch it; a run resumed from an
older checkpoint goes on with parts of other names.
"""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from covr_lightning.data.frame_storage import FrameStackStorage, ReplaySlice
from covr_lightning.errors import ConfigError
from covr_lightning.saving.files import write_atomically
from covr_lightning.saving.manifest import ReplayPartError, checked_part, folder_of

#: Largest size of one part, in bytes; a save holds about twice that in memory beside the replay.
PART_BYTES = 2**28
#: Parts that are smaller than the replay divided by this are merged, however small the saves.
SMALL_PARTS = 64
#: A part's bytes beside its tensors, roughly.
HEADER_BYTES = 2048


@dataclass(frozen=True)
class Part:
    """One part file.

    Attributes:
        name: Its name; no other part of any run has it.
        rows: Running numbers of its first row and of the row after its last one.
        frames: The same of its frames.
        bytes: Its size.
        sha256: Its checksum.
        labels_since: Its labels are those that were written since the storage had been saved so often; not in the
            manifest.
    """

    name: str
    rows: tuple[int, int]
    frames: tuple[int, int]
    bytes: int
    sha256: str
    labels_since: int = 0

    def entry(self) -> dict[str, Any]:
        """What the manifest says of it."""
        entry = {"name": self.name, "rows": list(self.rows), "frames": list(self.frames)}
        return {**entry, "bytes": self.bytes, "sha256": self.sha256}


class ReplayParts:
    """The part files of one run, and which of them make up its replay.

    Args:
        folder: Where they are written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: list[Part] = []

    def save(self, storage: FrameStackStorage) -> dict[str, Any]:
        """Write what the parts so far lack; if nothing is new, nothing is written.

        After an error the next call writes what this one could not.

        Args:
            storage: The replay, always the same one.

        Returns:
            The manifest, of plain values. It stays valid as long as the files that it names are there.

        Raises:
            OSError: A part could not be written.
        """
        numbers = storage.numbers()
        parts = [p for p in self._parts if p.rows[1] > storage.oldest_row or p.frames[1] > storage.oldest_frame]
        saved = parts[-1].rows[1] if parts else storage.oldest_row
        if numbers["rows_written"] > saved or storage.has_labels_since(storage.saves):
            kept = parts[: _first_to_merge(parts, numbers["rows_written"] - saved, storage)]
            parts = kept + self._write(storage, kept, since=(parts + [None])[len(kept)])
            storage.saves += 1
        self._parts = parts
        return {**numbers, "folder": str(self.folder.resolve()), "parts": [part.entry() for part in parts]}

    def forget(self) -> None:
        """Know no part any more: the next save writes everything anew."""
        self._parts = []

    def _write(self, storage: FrameStackStorage, kept: list[Part], since: Part | None) -> list[Part]:
        """Write everything after the kept parts, and the labels that came with part `since` or later."""
        start = max(kept[-1].rows[1] if kept else 0, storage.oldest_row)
        first_frame = max(kept[-1].frames[1] if kept else 0, storage.oldest_frame)
        labels_since = since.labels_since if since else storage.saves
        stop = storage.numbers()["rows_written"]
        step = max(1, int(PART_BYTES / storage.bytes_per_transition()))
        written = []
        for first in range(start, max(stop, start + 1), step):
            end = min(first + step, stop)
            piece = storage.slice(first, end, first_frame, labels_since if first == start else None)
            written.append(self._write_part(piece, (first, end), labels_since))
            first_frame = written[-1].frames[1]
        return written

    def _write_part(self, piece: ReplaySlice, rows: tuple[int, int], labels_since: int) -> Part:
        frames = (piece.first_frame, piece.first_frame + len(piece.frames))
        tensors = {f"rows/{key}": value.contiguous() for key, value in piece.rows.items()}
        tensors |= {f"labels/{key}": value.contiguous() for key, value in piece.labels.items()}
        stamp = {"rows": f"{rows[0]} to {rows[1] - 1}", "frames": f"{frames[0]} to {frames[1] - 1}"}
        data = save({**tensors, "frames": piece.frames}, metadata=stamp)
        name = f"{rows[0]:09d}-{rows[1]:09d}-{uuid.uuid4().hex[:12]}.safetensors"
        write_atomically(self.folder / name, [data])
        return Part(name, rows, frames, len(data), hashlib.sha256(data).hexdigest(), labels_since)

    def restore(self, storage: FrameStackStorage, manifest: dict[str, Any]) -> None:
        """Make the storage what it was when `manifest` was given out.

        Args:
            storage: Storage of the same capacity; what it holds is dropped.
            manifest: What :meth:`save` returned. If its parts are another run's, this run writes its own at the next
                save.

        Raises:
            ReplayPartError: A part is missing or damaged.
            ConfigError: The storage has another capacity.
        """
        if manifest["max_size"] != storage.max_size:
            raise ConfigError(
                f"The checkpoint's replay holds {manifest['max_size']} transitions, but data.replay_capacity is "
                f"{storage.max_size}; a run is resumed with the capacity that it began with."
            )
        folder = folder_of(manifest, self.folder)
        try:
            storage.restore(manifest, (_slice(folder, entry) for entry in manifest["parts"]))
        except ReplayPartError:
            raise
        except ValueError as error:
            raise ReplayPartError(str(error).rstrip(".")) from error
        self._parts = []
        if folder.resolve() == self.folder.resolve():
            entries = [{**e, "rows": tuple(e["rows"]), "frames": tuple(e["frames"])} for e in manifest["parts"]]
            self._parts = [Part(**entry, labels_since=number) for number, entry in enumerate(entries)]


def _slice(folder: Path, entry: dict[str, Any]) -> ReplaySlice:
    tensors = load_file(checked_part(folder, entry))  # mapped: copied once, into the ring
    groups: dict[str, dict[str, torch.Tensor]] = {"rows": {}, "labels": {}}
    frames = tensors.pop("frames")
    for name, value in tensors.items():
        group, key = name.split("/", 1)
        groups[group][key] = value
    return ReplaySlice(groups["rows"], entry["frames"][0], frames, groups["labels"])


def _first_to_merge(parts: list[Part], new_rows: int, storage: FrameStackStorage) -> int:
    """Index of the first part that the next one takes in; the number of parts if it takes in none.

    Many small saves would leave many small parts. So a part takes in the small ones before it where that costs next to
    nothing (half a percent of what is written anyway), and where they are no larger than itself, up to a 64th of the
    replay: each row is then written again a few times (log₂), as long as parts are small. A save of a 64th of the
    replay or more writes what is new and that half percent.
    """
    per_row = storage.bytes_per_transition()
    small = storage.max_size * per_row / SMALL_PARTS
    new = written = HEADER_BYTES + new_rows * per_row
    first = len(parts)
    for part in reversed(parts):
        cheap = written + part.bytes - new <= new / 200
        alike = part.bytes <= written and written + part.bytes <= small
        if not (cheap or alike):
            break
        written += part.bytes
        first -= 1
    return first
