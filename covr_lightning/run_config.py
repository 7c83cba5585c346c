"""A run's full configuration in its folder, ``config.yaml``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from covr_lightning.errors import RunFailed
from covr_lightning.saving.files import reason, write_atomically
from covr_lightning.secrets import masked
from covr_lightning.sweep.differences import differences, read_configuration

log = logging.getLogger(__name__)


class SaveConfig(SaveConfigCallback):
    """Writes a run's full configuration to its folder, and says what is another there than before.

    A configuration that a run has gone on with until now stays beside it, as ``config_until_STEPS.yaml``.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet: a checkpoint that is refused must leave its run as it is."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write it, when a checkpoint has been taken over by all parts of the run."""
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / self.config_filename
        before, text = read_configuration(path), path.read_bytes() if path.is_file() else b""
        counters = getattr(trainer.datamodule, "counters", None)  # type: ignore[attr-defined]
        now = config_text(self.parser, self.config)
        others = differences(before, yaml.safe_load(now)) if before else []
        try:
            if others and counters is not None:
                write_atomically(path.with_stem(f"config_until_{counters.env_steps}"), [text])
            write_atomically(path, [now.encode()])
        except OSError as error:
            raise RunFailed(f"The configuration {path} could not be written ({reason(error)})") from error
        if others and counters is not None:
            log.warning("The run goes on with another configuration: %s.", "; ".join(others))


def write_config(parser: LightningArgumentParser, config: Any, path: Path) -> None:
    """Write a configuration without secrets; the folder is made."""
    write_atomically(path, [config_text(parser, config).encode()])


def config_text(parser: LightningArgumentParser, config: Any) -> str:
    """A configuration as YAML, without secrets."""
    config = config.clone()
    config.base = None  # what it builds on is in it now
    return masked(parser.dump(config, skip_none=False))
