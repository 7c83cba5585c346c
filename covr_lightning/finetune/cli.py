"""`covr fit` on saved rows: LightningCLI's keys for a fine-tuning that stands alone."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser

from covr_lightning.cli import run_folder
from covr_lightning.config_files import read_config
from covr_lightning.errors import ConfigError
from covr_lightning.finetune.alone import fine_tune_saved
from covr_lightning.finetune.module import VLMFineTuner
from covr_lightning.finetune.saved_rows import SavedRows
from covr_lightning.saving.lock import only_run_in
from covr_lightning.trainer_keys import refuse_trainer_keys, trainer_errors
from covr_lightning.training import ParsingCLI
from covr_lightning.vlm.vlm import VLM

#: As :data:`covr_lightning.training._THE_RUNS_OWN`, of a round.
_THE_ROUNDS_OWN = {
    "max_epochs": (None, "; the length of a fine-tuning is model.settings.epochs"),
    "max_steps": (-1, "; the length of a fine-tuning is model.settings.max_steps"),
    "accumulate_grad_batches": (1, "; the length of a fine-tuning is model.settings.accumulate"),
}
_SET_IN_CODE = ("default_root_dir", "logger", "enable_checkpointing", "enable_model_summary", "inference_mode")


def fine_tunes_alone(arguments: list[str]) -> bool:
    """Whether the configs of a command line name :class:`SavedRows` as the data; the last one that names any wins."""
    named = ""
    for flag, path in itertools.pairwise(arguments):
        if flag == "--config":
            data = read_config(path).get("data")
            named = str(data.get("class_path", named)) if isinstance(data, dict) else named
    return named.rpartition(".")[2] == SavedRows.__name__


class FineTuneCLI(ParsingCLI):
    """LightningCLI whose `fit` is one round of fine-tuning on saved rows.

    Attributes:
        status: Exit status: 1 if nothing was trained.
    """

    run_name = "vlm_sft"
    status = 0

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys beside `model`, `data` and `trainer`."""
        parser.add_class_arguments(VLM, "vlm")
        self.add_run_arguments(parser)
        parser.link_arguments("vlm", "model.init_args.vlm", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Keep the Trainer's arguments: each try of the round makes a Trainer of its own.

        Returns:
            One more, for the device and number of this process.
        """
        arguments = dict(self._get(self.config_init, "trainer"))
        refuse_trainer_keys(arguments, _THE_ROUNDS_OWN)
        set_in_code = {*_SET_IN_CODE, *_THE_ROUNDS_OWN}
        self.trainer_kwargs = {name: value for name, value in arguments.items() if name not in set_in_code}
        given = copy.deepcopy(self.trainer_kwargs)
        with trainer_errors():
            return L.Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False, **given)

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand != "fit":
            raise ConfigError(f"The config's data are saved rows, which are for `covr fit`, not `covr {subcommand}`.")
        model: VLMFineTuner = self.model
        if self.config[subcommand].get("ckpt_path") is not None:
            raise ConfigError(
                "--ckpt_path is for runs of an agent; fine-tuning on saved rows begins anew, from an adapter if there "
                "is one (YAML key vlm.adapter)."
            )
        name = self._get(self.config, "name") or self.run_name
        folder = run_folder(Path(self._get(self.config, "runs_dir")), name, None)
        with only_run_in(folder):
            if self.trainer.is_global_zero:
                self.save_config(folder / "config.yaml")
            report = fine_tune_saved(
                self.datamodule, model.vlm, model.settings, self.trainer, self.trainer_kwargs, folder / "rounds"
            )
        self.status = 0 if report.losses else 1
