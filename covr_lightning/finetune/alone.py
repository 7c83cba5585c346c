"""Fine-tuning that stands alone: one round on saved rows of D_f, on any number of devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import lightning as L
import torch.distributed
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from covr_lightning.errors import ConfigError
from covr_lightning.finetune.module import FineTuneSettings, Precision
from covr_lightning.finetune.round import RoundReport, fine_tune_round
from covr_lightning.finetune.saved_rows import SavedRows
from covr_lightning.finetune.training import is_distributed
from covr_lightning.saving.files import as_json, write_or_warn
from covr_lightning.saving.round_files import RoundFiles
from covr_lightning.vlm.vlm import VLM


def fine_tune_saved(
    data: SavedRows,
    vlm: VLM,
    settings: FineTuneSettings,
    trainer: L.Trainer,
    trainer_kwargs: dict[str, Any],
    folder: Path,
) -> RoundReport:
    """Run the round that saved rows belong to, and write ``round_NNN_adapter`` and ``round_NNN.json``.

    With several processes each calls this; each measures the same held-out rows, and the first one writes.

    Args:
        data: The rows and what is chosen from them.
        vlm: Not loaded yet; `vlm.adapter` is what the round begins with.
        settings: How to train.
        trainer: A Trainer of `trainer_kwargs`, which tells this process's device and number; it trains nothing.
        trainer_kwargs: Arguments of the Trainer (devices, strategy, precision).
        folder: Where to write.

    Returns:
        The report.

    Raises:
        ConfigError: Rows, VLM or settings cannot be used.
    """
    if vlm.engine.elsewhere:
        raise ConfigError(
            f"vlm.engine is {type(vlm.engine).__name__}; a fine-tuning that stands alone measures the weights "
            "that it trains (covr_lightning.vlm.engines.LocalEngine, the default)."
        )
    saved = data.load()
    is_sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    check_strategy(trainer)
    if is_sharded and settings.held_out:
        raise ConfigError(
            f"model.settings.held_out is {settings.held_out} with ModelParallelStrategy, whose VLM cannot be measured; "
            "it must be 0."
        )
    if is_sharded and vlm.quantization is not None:
        raise ConfigError(
            f"vlm.quantization is {vlm.quantization!r} with ModelParallelStrategy, which shards full weights; it must "
            "be null."
        )
    width = saved.rows["frame"].shape[-1]
    if width != vlm.frames * saved.spec.frame_width:
        raise ConfigError(
            f"vlm.frames is {vlm.frames}, but the pictures in data.rows are {width} pixels wide, where one frame has "
            f"{saved.spec.frame_width}; it must be as in the run that saved them."
        )
    if not is_sharded:  # its weights go to the devices layer by layer
        vlm.to(trainer.strategy.root_device)
    vlm.load(saved.spec)
    vlm.round = saved.round - 1
    report = RoundReport(saved.round, saved.env_steps, len(saved.rows))
    files = RoundFiles(folder, saved.round)
    fine_tune_round(
        report, vlm, saved.rows, saved.scores, saved.entropy, data.filter, data.weight, settings, trainer_kwargs,
        files.adapter if trainer.is_global_zero else None,
    )  # fmt: skip
    if trainer.is_global_zero:
        write_or_warn(files.report, [as_json(report.as_dict())])
        print(f"{report}\nadapter: {files.adapter if report.losses else 'none'}")
    if is_distributed():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return report


def check_strategy(trainer: L.Trainer) -> None:
    """Refuse strategies that would lose the adapter or change the loss, and precisions that would change the weights.

    Args:
        trainer: A Trainer with the strategy.

    Raises:
        ConfigError: It is such a one.
    """
    if trainer.precision not in get_args(Precision):
        raise ConfigError(
            f"trainer.precision is {trainer.precision!r}, which would turn base weights and adapter into another type; "
            f"it can be {' or '.join(map(repr, get_args(Precision)))}. The base weights' own is vlm.dtype."
        )
    strategy = trainer.strategy
    choices = "it can be auto, ddp, deepspeed_stage_1 or _2, or ModelParallelStrategy (docs/several_gpus.md)"
    if isinstance(strategy, FSDPStrategy) or getattr(strategy, "zero_stage_3", False):
        raise ConfigError(
            f"trainer.strategy is {type(strategy).__name__}, of whose parts no adapter is put together; {choices}."
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ConfigError(f"trainer.strategy spawns or forks its processes, whose report would be lost; {choices}.")
    if isinstance(strategy, ModelParallelStrategy) and strategy._data_parallel_size != trainer.world_size:
        raise ConfigError(
            f"trainer.strategy.data_parallel_size is {strategy._data_parallel_size!r}; it must be the number of all "
            f"devices, {trainer.world_size}, and tensor_parallel_size 1."
        )
