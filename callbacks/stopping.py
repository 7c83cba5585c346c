"""Stops a run on a signal, at a moment that can be continued exactly."""

from __future__ import annotations

import lightning as L
from covr_lightning.callbacks.checkpoints import RunCheckpoint

from covr_lightning.data.datamodule import ExperienceData
from covr_lightning.stopping import stop_signals


class StopOnSignal(L.Callback):
    """Ends the run after the agent step in which Ctrl-C, SIGTERM or SIGUSR1 came; `RunCheckpoint` then saves it.

    A signal in a fine-tune round or an evaluation, which may take long, ends it at once; the step stays open, and the
    resumed run begins with that round or evaluation. Of a run of several processes all stop if one is told to, after
    the same step; round and evaluation are then finished first. Must come after `ProgressiveFineTune`.

    Before training begins, while environments are opened, say, there is nothing to save that the disk does not have: a
    signal ends a run of one process at once there.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Listen, in place of Lightning, which would end the run in the middle of a step's work."""
        if stage != "fit":
            return
        # Lightning's own handlers, and what it does for them at each item of several processes, whose wait for the GPU
        # would come between two updates. Were they named otherwise one day, `listen_again` still replaces the handlers.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        stop_signals.install()
        stop_signals.begin_at_once()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on a step is finished, and the run saved."""
        stop_signals.listen_again()
        stop_signals.end_at_once()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        """Stop between two agent steps; with an evaluation to come, the step stays open."""
        data: ExperienceData = trainer.datamodule  # type: ignore[attr-defined]
        if not data.env_steps_completed:
            return
        data.step_is_open = trainer.val_check_batch == 1
        stop_signals.check_together()
        data.step_is_open = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on a signal stops the run at once."""
        if trainer.state.fn == "fit":
            trainer.datamodule.step_is_open = True  # type: ignore[attr-defined]
            stop_signals.begin_at_once()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The step is done."""
        if trainer.state.fn == "fit":
            stop_signals.end_at_once()
            trainer.datamodule.step_is_open = False  # type: ignore[attr-defined]

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back, unless the run is saved first: then `RunCheckpoint` does."""
        if not any(isinstance(callback, RunCheckpoint) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            stop_signals.uninstall()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        stop_signals.uninstall()
