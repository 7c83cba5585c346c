"""Checkpoints on disk: written complete or not at all, checked when they are read, and the replay's parts they name.

A checkpoint is what ``torch.save`` writes, a ZIP archive, with a SHA-256 of everything before it as the archive's
comment. The checksum is part of the file, so the two cannot get out of step, and the file can be read without this
package: ``torch.load(path, weights_only=True)``.
"""

from __future__ import annotations

import hashlib
import io
import logging
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import PicklingError, UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from covr_lightning import processes
from covr_lightning.errors import ConfigError
from covr_lightning.saving.files import UNFINISHED, write_atomically
from covr_lightning.saving.manifest import ReplayPartError, checked_part, folder_of, manifests_of, names_of, run_of

log = logging.getLogger(__name__)

_LABEL = b"covr_lightning sha256 "
_SEAL_BYTES = len(_LABEL) + 64
#: A ZIP archive's last record without a comment: its signature, 16 bytes, and the comment's length, 2 bytes.
_END_BYTES, _END_SIGNATURE = 22, b"PK\x05\x06"
_READ_BYTES = 2**22


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's way to checkpoints on disk: sealed, atomic, tensors and plain values only.

    After a checkpoint is on disk, parts of the replay that no checkpoint names any more are removed. Looked at are the
    folder of the checkpoint, the folders of the run's checkpoint callbacks, and the run's own ``checkpoints``.
    """

    def __init__(self) -> None:
        self._named: dict[tuple[str, int, int], set[str]] = {}
        self._read_back = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, complete or not at all, and remove what nothing refers to any more.

        Args:
            checkpoint: Tensors and plain values.
            path: File to write.
            storage_options: Not used.

        Raises:
            ConfigError: It holds something that could not be read again; told of the first one that is written.
            OSError: It could not be written; what was at `path` is still there.
        """
        buffer = io.BytesIO()
        try:
            torch.save(checkpoint, buffer)
        except (PicklingError, TypeError, AttributeError) as error:  # pickle raises any of them
            raise _unreadable(checkpoint, error) from error
        if not self._read_back:
            _check_readable(buffer, checkpoint)
            self._read_back = True
        write_atomically(Path(path), _sealed(buffer))
        manifests = manifests_of(checkpoint)
        if manifests:
            folders = {Path(path).parent, Path(manifests[0]["folder"]).parent / "checkpoints"}
            callbacks = checkpoint.get("callbacks", {}).values()
            folders |= {Path(state["dirpath"]) for state in callbacks if state.get("dirpath")}
            self._remove_unreferenced(manifests, {folder.resolve() for folder in folders})

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint after checking it; nothing but tensors and plain values is ever unpickled.

        Several processes all read the one that the first of them names.

        Args:
            path: The file.
            map_location: Where tensors go; see :func:`torch.load`.
            weights_only: True whatever is asked for.

        Raises:
            ConfigError: The file is missing, damaged, or no checkpoint of this program. The message names the newest
                good checkpoint beside it.
        """
        # Where another run of this name goes on meanwhile, processes may each have found another newest checkpoint.
        return load_checkpoint(Path(processes.from_first(str(path))), map_location)

    def _remove_unreferenced(self, manifests: list[dict[str, Any]], folders: set[Path]) -> None:
        named = names_of(manifests)
        try:
            for folder in folders:
                for unfinished in folder.glob(f"*.ckpt{UNFINISHED}"):
                    unfinished.unlink()
                for path in folder.glob("*.ckpt"):
                    named |= self._names(path)
            for part in Path(manifests[0]["folder"]).iterdir():
                if part.name not in named and part.name.endswith((".safetensors", UNFINISHED)):
                    part.unlink()
        except (OSError, MemoryError) as error:
            log.warning("Parts of the replay that no checkpoint needs any more were not removed: %s.", error)

    def _names(self, path: Path) -> set[str]:
        """The parts that a checkpoint names; those of one that is damaged or none of this program are of no use.

        Raises:
            OSError: It is whole and cannot be read now, for want of memory, say.
        """
        stat = path.stat()
        key = (str(path), stat.st_mtime_ns, stat.st_size)
        if key not in self._named:
            try:
                checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (OSError, MemoryError):
                raise
            except UnpicklingError:
                checkpoint = {}
            except Exception as error:  # a damaged archive, or one that could not be mapped
                if _is_whole(path):
                    raise OSError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from error
                checkpoint = {}
            try:
                manifests = manifests_of(checkpoint)
            except Exception:  # of another program
                manifests = []
            self._named = {k: v for k, v in self._named.items() if k[0] != key[0]}
            self._named[key] = names_of(manifests)
        return self._named[key]


def load_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint after checking it.

    Args:
        path: The file.
        map_location: Where tensors go; see :func:`torch.load`.

    Returns:
        The checkpoint.

    Raises:
        ConfigError: See :meth:`CheckpointFiles.load_checkpoint`.
    """
    try:
        return _load(path, map_location)
    except ConfigError as error:
        raise ConfigError(f"{error}; {newest_good_checkpoint(path)}.") from error


def newest_good_checkpoint(path: Path) -> str:
    """Say, as a clause, which other checkpoint in a checkpoint's folder is the newest that can be resumed.

    Args:
        path: The checkpoint that cannot.
    """
    others = [p for p in path.parent.glob("*.ckpt") if p.name != path.name]
    for other in sorted(others, key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            for manifest in manifests_of(_load(other)):
                folder = folder_of(manifest, run_of(other) / "replay")
                for entry in manifest["parts"]:
                    checked_part(folder, entry)
        except (ConfigError, ReplayPartError, OSError):
            continue
        return f"the newest good checkpoint of this run is {other}"
    return "the run has no other good checkpoint"


def _load(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"The checkpoint {path} is missing")
    _check_seal(path)
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a file of something else makes the unpickler raise
        raise ConfigError(f"The file {path} is no checkpoint of this program") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ConfigError(f"The file {path} is no checkpoint of this program (it holds no state_dict)")
    return checkpoint


def _check_readable(archive: io.BytesIO, checkpoint: dict[str, Any]) -> None:
    """Refuse what a class of somebody's own wants saved and nothing would load."""
    archive.seek(0)
    try:
        torch.load(archive, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise _unreadable(checkpoint, error) from error


def _unreadable(checkpoint: dict[str, Any], error: Exception) -> ConfigError:
    where, kind = _foreign(checkpoint) or ("somewhere", str(error).splitlines()[0])
    return ConfigError(
        f"The run cannot be saved: its checkpoint would hold a {kind} ({where}), which could not be read again. "
        "What state_dict and random_state give must be tensors and plain values (.tolist(), .item())."
    )


def _foreign(value: Any, at: str = "") -> tuple[str, str] | None:
    """Where something is that is neither tensor nor plain value, and what."""
    if isinstance(value, dict | list | tuple):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        inside = (_foreign(part, f"{at}.{key}" if at else str(key)) for key, part in parts)
        return next((found for found in inside if found), None)
    module, name = type(value).__module__, type(value).__name__
    plain = module.split(".")[0] in ("builtins", "torch") and not callable(value)
    return None if plain else (at, f"{module}.{name}")


def _sealed(archive: io.BytesIO) -> Iterator[bytes | memoryview]:
    """The archive with its checksum as the ZIP comment."""
    view = archive.getbuffer()
    assert bytes(view[-_END_BYTES:])[:4] == _END_SIGNATURE, "torch.save writes a ZIP archive without a comment"
    view[-2:] = struct.pack("<H", _SEAL_BYTES)
    yield view
    yield _LABEL + hashlib.sha256(view).hexdigest().encode()


def _is_whole(path: Path) -> bool:
    """Whether a file is, byte for byte, what ``torch.save`` wrote, with this program's checksum or without one."""
    try:
        _check_seal(path)
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist()) and archive.testzip() is None
    except (OSError, MemoryError):
        raise
    except Exception:  # of a damaged archive zipfile raises this and that
        return False


def _check_seal(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _SEAL_BYTES))
        seal = file.read()
        if not seal.startswith(_LABEL):
            # torch.save alone leaves no checksum; its archive ends in a record whose comment is empty.
            ends = seal[-_END_BYTES:]
            if ends[:4] == _END_SIGNATURE and ends[-2:] == bytes(2):
                return
            raise ConfigError(f"The file {path} is cut off, or no checkpoint (it does not end in a checksum)")
        file.seek(0)
        digest, left = hashlib.sha256(), size - _SEAL_BYTES
        while left and (piece := file.read(min(left, _READ_BYTES))):
            digest.update(piece)
            left -= len(piece)
    if seal != _LABEL + digest.hexdigest().encode():
        raise ConfigError(f"The checkpoint {path} is damaged (its checksum is another one)")
