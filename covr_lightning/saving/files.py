"""Files that are there complete or not at all, whatever happens while they are written."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

log = logging.getLogger(__name__)

#: What the name of a file ends in while it is written. One that a killed process left is written over or removed later.
UNFINISHED = ".part"


def write_atomically(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file so that a kill, a crash or a full disk leaves the old file, or none, in its place.

    The bytes go to a temporary file in the same folder and to the disk, then the file gets its name, then the name goes
    to the disk. The temporary file is removed when anything fails.

    Args:
        path: File to write; its folder is made if need be.
        pieces: What to write, piece after piece.

    Raises:
        OSError: It could not be written; its `filename` is `path`.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_or_warn(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file as :func:`write_atomically` does, or warn: a run goes on without it, or writes it again later."""
    try:
        write_atomically(path, pieces)
    except OSError as error:
        log.warning("%s could not be written (%s).", path, error.strerror)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
