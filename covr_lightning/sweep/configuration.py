"""The full configuration of a command line."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

from covr_lightning.agent.sac import SACModule
from covr_lightning.config_files import resolve_arguments
from covr_lightning.data.datamodule import ExperienceData
from covr_lightning.errors import ConfigError
from covr_lightning.finetune.cli import fine_tunes_alone
from covr_lightning.sweep.differences import Configuration, read_configuration
from covr_lightning.training import CovrCLI


class _Parsed(CovrCLI):
    """Parses a command line, and builds and runs nothing."""

    def _set_seed(self) -> None:
        """Leave this process's random numbers alone."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def configuration(arguments: list[str]) -> Configuration:
    """The configuration that a run of ``covr fit`` would write to its ``config.yaml``.

    Args:
        arguments: Command line from ``fit`` on.

    Raises:
        ConfigError: A key or a value is wrong, or the config fine-tunes a VLM alone.
    """
    resolved, _ = resolve_arguments(arguments)
    if fine_tunes_alone(resolved):
        name = arguments[arguments.index("--config") + 1]
        raise ConfigError(
            f"{name} fine-tunes the VLM alone (covr_lightning.finetune.SavedRows); a sweep trains agents."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's on arguments that are not the command line's
        cli = _Parsed(
            SACModule, ExperienceData, subclass_mode_model=True, subclass_mode_data=True, seed_everything_default=0,
            trainer_defaults={"log_every_n_steps": 50, "enable_model_summary": False}, auto_configure_optimizers=False,
            args=resolved,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        cli.save_config(Path(folder) / "config.yaml")
        return read_configuration(Path(folder) / "config.yaml")
