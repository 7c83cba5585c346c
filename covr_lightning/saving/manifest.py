"""The manifests in a checkpoint: which part files make up the run's replay, and whether they are as they were written.

There is one for each process of the run. A manifest is a dict of plain values. ``parts`` lists the files in order:
``name``, ``rows`` and ``frames`` (running numbers of the first one and of the one after the last), ``bytes`` and
``sha256``. ``folder`` is where they were written; the rest is what
:meth:`covr_lightning.data.frame_storage.FrameStackStorage.numbers` says of the whole.
"""

from __future__ import annotations

import hashlib
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any


class ReplayPartError(ValueError):
    """A part file is missing or damaged; the message names it."""


def folder_of(manifest: dict[str, Any], own: Path) -> Path:
    """Where a manifest's parts are: in the run's own folder, which may have been moved, or where they were written."""
    if any((own / entry["name"]).is_file() for entry in manifest["parts"]):
        return own
    return Path(manifest["folder"])


def look_beside(checkpoint: Path, manifests: list[dict[str, Any]]) -> None:
    """Have manifests name the folder beside a checkpoint if their parts are there: its run may have been moved."""
    for manifest in manifests:
        manifest["folder"] = str(folder_of(manifest, run_of(checkpoint) / "replay"))


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint lies in, if it lies where runs have theirs."""
    return checkpoint.resolve().parent.parent


def checked_part(folder: Path, entry: dict[str, Any]) -> Path:
    """Where a part file is, after checking that it is what was written.

    Args:
        folder: Where the parts are.
        entry: What a manifest says of it.

    Raises:
        ReplayPartError: It is missing, or it is not what was written.
    """
    path = folder / entry["name"]
    if not path.is_file():
        raise ReplayPartError(f"The replay's part {path} is missing")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ReplayPartError(f"The replay's part {path} is damaged ({size} bytes instead of {entry['bytes']})")
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ReplayPartError(f"The replay's part {path} is damaged (its checksum is another one)")
    return path


def manifests_of(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """The manifests of the replay in a checkpoint, one for each process of the run; none if it has no replay."""
    for state in checkpoint.values():
        if isinstance(state, dict) and isinstance(state.get("replays"), list):
            return state["replays"]
    return []


def names_of(manifests: list[dict[str, Any]]) -> set[str]:
    """The part files that manifests name."""
    return {entry["name"] for manifest in manifests for entry in manifest["parts"]}
