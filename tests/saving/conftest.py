"""Lets tests import what several of them use; whole runs, and what befalls them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from covr_lightning.callbacks import RunCheckpoint

from covr_lightning.cli import main
from covr_lightning.data.datamodule import ExperienceData

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.saving.whole_runs import command


@pytest.fixture
def covr(tmp_path: Path) -> Callable[..., int]:
    """``covr("fit", options, …)`` runs that command line."""

    def run(name: str, options: dict[str, Any] | None = None, *more: str, runs: Path | None = None) -> int:
        return main([*command(tmp_path, name, options, runs), *more])

    return run


@pytest.fixture
def killed_at() -> Callable[[int], Any]:
    """A context in which a run dies at an environment step and nothing is saved on the way out, as after kill −9."""

    class Killed(BaseException):
        pass

    def context(step: int) -> Any:
        store = ExperienceData._store

        def dying(data: ExperienceData, collected: Any) -> Any:
            if data.counters.env_steps >= step:
                raise Killed
            return store(data, collected)

        patch = pytest.MonkeyPatch()
        patch.setattr(ExperienceData, "_store", dying)
        patch.setattr(RunCheckpoint, "on_exception", lambda *arguments: None)

        class Context:
            def __enter__(self) -> None:
                self.expected = pytest.raises(Killed)
                self.expected.__enter__()

            def __exit__(self, *error: Any) -> bool:
                patch.undo()
                return bool(self.expected.__exit__(*error))

        return Context()

    return context


@pytest.fixture
def signal_at() -> Callable[[int, signal.Signals], Any]:
    """A context in which this process gets a signal in the agent step that begins at an environment step."""

    @contextmanager
    def context(step: int, signum: signal.Signals) -> Iterator[None]:
        store = ExperienceData._store

        def signalled(data: ExperienceData, collected: Any) -> Any:
            if data.counters.env_steps == step:
                os.kill(os.getpid(), signum)
            return store(data, collected)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ExperienceData, "_store", signalled)
            yield

    return context


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of eight megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if mount is None or subprocess.run([mount, *options], capture_output=True, check=False).returncode:
        pytest.skip("may not mount a tmpfs here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
