"""The adapters of a run's rounds on disk, of which a checkpoint names one by its round and by what is in it.

A run that goes on from an earlier checkpoint does later rounds again, perhaps with other settings. What is there of
them is set aside, ``round_NNN_adapter.DIGEST``, for the checkpoints that are of the time before.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from covr_lightning.errors import ConfigError
from covr_lightning.saving.files import in_place_of
from covr_lightning.vlm.adapters import adapter_digest


def set_aside(own: Path) -> None:
    """Make room for a round's adapter; what is no whole one is removed."""
    digest = _digest_of(own)
    if digest is None:
        shutil.rmtree(own, ignore_errors=True)
        return
    aside = _aside(own, digest)
    shutil.rmtree(aside, ignore_errors=True)
    own.rename(aside)


def remove_double(own: Path) -> str | None:
    """Remove what was set aside if the round has come out as before.

    Returns:
        The digest of the round's adapter; None if it has none.
    """
    digest = _digest_of(own)
    if digest is not None:
        shutil.rmtree(_aside(own, digest), ignore_errors=True)
    return digest


def _digest_of(folder: Path) -> str | None:
    """What is in a folder; None if that is no whole adapter, as one whose removal was cut short."""
    try:
        return adapter_digest(folder)
    except ConfigError:
        return None


def fetch(own: Path, folders: Sequence[Path], digest: str | None) -> None:
    """Have a checkpoint's adapter in its place in this run's folder.

    Args:
        own: Its place.
        folders: ``rounds`` of the run that it was trained in, where that may be.
        digest: What is in it; None where the checkpoint does not say.

    Raises:
        ConfigError: It is neither here nor there.
    """
    places = list(dict.fromkeys((own, *(folder / own.name for folder in folders))))
    candidates = [path for place in places for path in (place, *([_aside(place, digest)] if digest else []))]
    found = next((path for path in candidates if path.is_dir() and digest in (None, _digest_of(path))), None)
    if found is None:
        others = ", where another one is," * any(path.is_dir() for path in candidates)
        where = " and ".join(map(str, places))
        raise ConfigError(f"The checkpoint's VLM was fine-tuned, but its adapter is missing{others} ({where}).")
    if found != own:
        set_aside(own)
        with in_place_of(own) as part:
            shutil.copytree(found, part, dirs_exist_ok=True)


def _aside(own: Path, digest: str) -> Path:
    return own.with_name(f"{own.name}.{digest[:12]}")
