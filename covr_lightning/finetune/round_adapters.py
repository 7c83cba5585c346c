"""The adapters of a run's rounds on disk, of which a checkpoint names one by its round and by what is in it.

A run that goes on from an earlier checkpoint does later rounds again, perhaps with other settings. What is there of
them is set aside, ``round_NNN_adapter.DIGEST``, for the checkpoints that are of the time before.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from covr_lightning.errors import ConfigError
from covr_lightning.saving.files import in_place_of
from covr_lightning.vlm.adapters import adapter_digest


def adapter_of(rounds: Path, round_: int) -> Path:
    """Where a round's adapter is, in a run's folder ``rounds``."""
    return rounds / f"round_{round_:03d}_adapter"


def set_aside(own: Path) -> None:
    """Make room for a round's adapter; does nothing if there is none."""
    if own.is_dir():
        aside = _aside(own, adapter_digest(own))
        shutil.rmtree(aside, ignore_errors=True)
        own.rename(aside)


def remove_double(own: Path) -> str | None:
    """Remove what was set aside if the round has come out as before.

    Returns:
        The digest of the round's adapter; None if it has none.
    """
    if not own.is_dir():
        return None
    digest = adapter_digest(own)
    shutil.rmtree(_aside(own, digest), ignore_errors=True)
    return digest


def fetch(own: Path, folder: str | None, digest: str | None) -> None:
    """Have a checkpoint's adapter in its place in this run's folder.

    Args:
        own: Its place.
        folder: ``rounds`` of the run that it was trained in, if it may be another one.
        digest: What is in it; None where the checkpoint does not say.

    Raises:
        ConfigError: It is neither here nor there.
    """
    places = [own] if folder is None else list(dict.fromkeys((own, Path(folder) / own.name)))
    candidates = [path for place in places for path in (place, *([_aside(place, digest)] if digest else []))]
    found = [path for path in candidates if path.is_dir() and (digest is None or digest == adapter_digest(path))]
    if not found:
        others = ", where another one is," * any(path.is_dir() for path in candidates)
        where = " and ".join(map(str, places))
        raise ConfigError(f"The checkpoint's VLM was fine-tuned, but its adapter is missing{others} ({where}).")
    if found[0] != own:
        set_aside(own)
        with in_place_of(own) as part:
            shutil.copytree(found[0], part, dirs_exist_ok=True)


def _aside(own: Path, digest: str) -> Path:
    return own.with_name(f"{own.name}.{digest[:12]}")
