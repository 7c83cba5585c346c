"""One run at a time in a run's folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from covr_lightning.errors import ConfigError

#: The file that a running process holds a lock on. It stays when the run ends; the lock does not.
LOCK_FILE = "run.lock"
#: Written while a run sets up, as are TensorBoard's files, which then hold no more than their head.
_SET_UP_FILES = (LOCK_FILE, "config.yaml", "hparams.yaml")
_EVENTS = "events.out.tfevents."


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold a run's folder. The system lets go of it when the process ends, however it ends.

    Of a run with several processes the first one holds it for all. A run that fails before it has written anything
    but its configuration leaves no folder.

    Args:
        folder: The run's folder; made if need be.

    Raises:
        ConfigError: Another run holds it, or it cannot be made.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_only  # slow, and a reader of LOCK_FILE needs none of it

    if rank_zero_only.rank:  # type: ignore[attr-defined]
        yield
        return
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The run's folder {folder} cannot be made ({error.strerror}; --runs_dir).") from error
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"Another run is writing to {folder} (it holds {LOCK_FILE} there); wait for its end, or give this run "
            "another --name."
        ) from error
    except OSError as error:
        raise ConfigError(f"{folder / LOCK_FILE} cannot be written ({error.strerror}; YAML key runs_dir).") from error
    try:
        yield
    except BaseException:
        if is_new:
            _remove_if_bare(folder)
        raise
    finally:
        lock.release()


def _remove_if_bare(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    if all(file.name in _SET_UP_FILES or file.name.startswith(_EVENTS) for file in files):
        shutil.rmtree(folder)
