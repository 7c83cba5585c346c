"""One run at a time in a run's folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from covr_lightning.errors import ConfigError

#: The file that a running process holds a lock on. It stays when the run ends; the lock does not.
LOCK_FILE = "run.lock"


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold a run's folder. The system lets go of it when the process ends, however it ends.

    Of a run with several processes the first one holds it for all.

    Args:
        folder: The run's folder; made if need be.

    Raises:
        ConfigError: Another run holds it.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_only  # slow, and a reader of LOCK_FILE needs none of it

    if rank_zero_only.rank:  # type: ignore[attr-defined]
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"Another run is writing to {folder} (it holds {LOCK_FILE} there); wait for its end, or give this run "
            "another --name."
        ) from error
    try:
        yield
    finally:
        lock.release()
