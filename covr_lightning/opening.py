"""A run that was trained: opened from Python, and its policy exported."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning as L
import torch

from covr_lightning.agent.checks import check_checkpoint
from covr_lightning.agent.sac import SACModule
from covr_lightning.envs.base import EnvFactory
from covr_lightning.errors import ConfigError
from covr_lightning.export import CHECKED_FRAMES, export_policy
from covr_lightning.imports import prepare_imports
from covr_lightning.saving.checkpoints import load_checkpoint
from covr_lightning.training import CovrCLI, build
from covr_lightning.vlm.vlm import VLM


class OpenedRun(NamedTuple):
    """What a run consists of, as its config.yaml has it.

    Attributes:
        agent: With the checkpoint's weights, on the CPU, in evaluation mode.
        env: Makes its environment: ``env.make(seed)``.
        vlm: Its VLM before the first round, not loaded (``vlm.load(env.spec)``); a round's adapter is put on by
            ``vlm.load_adapter(folder / "rounds" / "round_001_adapter", round_=1)``.
    """

    agent: SACModule
    env: EnvFactory
    vlm: VLM


class _LoadedCLI(CovrCLI):
    """Builds a run's parts and loads the checkpoint, instead of running anything."""

    def _run_subcommand(self, subcommand: str) -> None:
        checkpoint = load_checkpoint(Path(self._get(self.config_init, "ckpt_path")))
        check_checkpoint(checkpoint, self.model)
        self.model.load_state_dict(checkpoint["state_dict"])


class _ExportCLI(_LoadedCLI):
    command = "export"


class _OpeningCLI(_LoadedCLI):
    def before_instantiate_classes(self) -> None:
        """Leave out the Trainer's parts, which may want packages and devices that are not here."""
        super().before_instantiate_classes()
        trainer = self._get(self.config, "trainer")
        for key in ("logger", "callbacks", "plugins", "profiler"):
            trainer[key] = None
        trainer.strategy = "auto"

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """None: nothing is run."""
        return cast("L.Trainer", None)

    def _set_seed(self) -> None:
        """Random numbers are the caller's."""


@contextmanager
def _working_directory_on_the_path() -> Iterator[None]:
    """The working directory by its name in ``sys.path``, where an interactive Python has "": while a config is parsed
    the parser is in the config's folder, and somebody's own classes lie here.
    """  # noqa: D205
    here = os.getcwd()
    if "" not in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def open_run(folder: str | Path, checkpoint: str = "best") -> OpenedRun:
    """Open a run of ``covr fit``; of the run's Trainer, nothing is built.

    Args:
        folder: The run's folder, e.g. ``runs/quickstart``.
        checkpoint: ``"best"``, ``"last"``, or the name of another file in its ``checkpoints``, without ``.ckpt``.

    Raises:
        ConfigError: There is no such run or checkpoint, or it cannot be used.
    """
    config, file = Path(folder) / "config.yaml", Path(folder) / "checkpoints" / f"{checkpoint}.ckpt"
    if not config.is_file():
        raise ConfigError(f"{folder} is no folder of a run: it has no config.yaml.")
    if not file.is_file():
        there = ", ".join(sorted(other.stem for other in file.parent.glob("*.ckpt"))) or "none"
        raise ConfigError(f"The run {folder} has no checkpoint {checkpoint!r}; it has {there}.")
    prepare_imports()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _working_directory_on_the_path():
        opened = build(_OpeningCLI, ["test", "--config", str(config), "--ckpt_path", str(file)])
    return OpenedRun(opened.model.eval(), opened.datamodule.env_factory, opened.datamodule.vlm)


def export(arguments: list[str], name: str, folder: Path) -> int:
    """Write the policy of a checkpoint (``covr export``).

    Args:
        arguments: Command line of ``covr test``, configs resolved.
        name: The run's default name.
        folder: Where to write.

    Returns:
        Exit status.
    """
    _ExportCLI.run_name = name
    for file in export_policy(build(_ExportCLI, arguments).model, folder):
        print(
            f"{file.path}: {file.megabytes:.1f} MB, {file.milliseconds:.2f} ms an action (median, batch 1, on this "
            f"CPU), at most {file.difference:.1e} from the module on {CHECKED_FRAMES} frames"
        )
    return 0
