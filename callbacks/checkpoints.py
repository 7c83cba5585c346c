"""When a run is saved: after every evaluation, and when it is interrupted."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """``best.ckpt`` (highest evaluation return) and ``last.ckpt``, both after each evaluation.

    Lightning's own saves at the end of an epoch, and a run here is one epoch; it leaves ``last`` as it is when an
    evaluation brought no new best, and after an exception it writes over the best.

    Args:
        folder: Where to write.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder,
            filename="best",
            monitor="eval/return",
            mode="max",
            save_last=True,
            save_on_exception=True,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the best if it is one, and the last."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the last."""
        if self._should_save_on_exception(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
