"""The full configuration of a command line, and what differs between two of them."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from covr_lightning.agent.sac import SACModule
from covr_lightning.config_files import resolve_arguments
from covr_lightning.data.datamodule import ExperienceData
from covr_lightning.errors import ConfigError
from covr_lightning.finetune.cli import fine_tunes_alone
from covr_lightning.training import CovrCLI

#: A run's configuration, as in its config.yaml.
Configuration = dict[str, Any]

#: Keys that say where a run is written or what of it is shown, and change no result.
_NO_RESULT = ("base", "runs_dir", "name", "ckpt_path", "weights_only", "video", "trainer.enable_progress_bar")


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


def read_configuration(path: Path) -> Configuration:
    """A run's ``config.yaml``; empty if it cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError):
        return {}


def with_seed(config: Configuration, seed: int) -> Configuration:
    """The same configuration with another seed of everything: networks, environment, exploration, replay, update."""
    config = copy.deepcopy(config)
    config["seed_everything"] = seed
    for key in ("data", "model"):
        config[key]["init_args"]["seed"] = seed
    return config


def seed_arguments(seed: int) -> list[str]:
    """What gives a run of ``covr fit`` its seed; the seed of fine-tune rounds follows ``data.seed``."""
    return [part for key in ("seed_everything", "data.seed", "model.seed") for part in (f"--{key}", str(seed))]


def differences(there: Configuration, here: Configuration) -> list[str]:
    """The keys that differ, each as ``data.batch_size is 8 there, 16 here``; what changes no result is left out."""
    one, other = dict(_flat(there)), dict(_flat(here))
    missing = object()
    keys = [key for key in [*one, *(k for k in other if k not in one)] if key not in _NO_RESULT]
    return [
        f"{key} is {_shown(one.get(key, '(missing)'))} there, {_shown(other.get(key, '(missing)'))} here"
        for key in keys
        if one.get(key, missing) != other.get(key, missing)
    ]


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by their keys, as the command line has them (without ``init_args``)."""
    if isinstance(value, list) and any(isinstance(element, dict) for element in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        yield key, value
        return
    for name, below in value.items():
        yield from _flat(below, key if name == "init_args" else f"{key}.{name}".lstrip("."))
