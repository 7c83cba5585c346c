"""Files that are there complete or not at all, whatever happens while they are written."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

log = logging.getLogger(__name__)

#: What the name of a file ends in while it is written. One that a killed process left is written over or removed later.
UNFINISHED = ".part"

#: What writing a file can raise where the disk, or a right, is what is missing.
WRITE_ERRORS = (OSError, SafetensorError)


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
        _sync(path.parent)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_or_warn(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file as :func:`write_atomically` does, or warn: a run goes on without it, or writes it again later."""
    with or_warn(path):
        write_atomically(path, pieces)


@contextmanager
def or_warn(path: Path) -> Iterator[None]:
    """Warn if what is written inside, a file or a folder, could not be: a run goes on without it."""
    try:
        yield
    except WRITE_ERRORS as error:
        log.warning("%s could not be written (%s).", path, reason(error))


@contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder that is to appear at `path` complete or not at all; the parent is made.

    As with :func:`write_atomically`, all is on the disk before it gets its name.

    Raises:
        OSError: It could not be written, or what safetensors raises then; nothing half written is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        yield unfinished
        _open_to_readers(unfinished)
        for written in [*unfinished.rglob("*"), unfinished]:
            _sync(written)
        if path.is_dir():  # a file gives way by itself
            shutil.rmtree(path)
        unfinished.replace(path)
        _sync(path.parent)
    except BaseException:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)
        raise


def _open_to_readers(path: Path) -> None:
    """Give a file, or those in a folder, the rights that `open` gives: safetensors keeps them to the owner."""
    mask = os.umask(0o022)
    os.umask(mask)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(0o666 & ~mask)


def as_json(value: Any) -> bytes:
    """Plain values as JSON; a number that JSON does not know (NaN, ±∞) is null there."""

    def known(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: known(below) for key, below in value.items()}
        if isinstance(value, list | tuple):
            return [known(below) for below in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(known(value), indent=1, allow_nan=False).encode()


def reason(error: BaseException) -> str:
    """Why something could not be written, in words."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _sync(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, go to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
