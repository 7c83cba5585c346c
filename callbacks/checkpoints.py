"""When a run is saved: after every evaluation, every so many environment steps, and when a signal stops it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from covr_lightning.errors import ConfigError, RunFailed
from covr_lightning.processes import OtherProcessFailed
from covr_lightning.stopping import RunStopped, stop_signals

log = logging.getLogger(__name__)

Save = Callable[[L.Trainer, dict[str, Tensor]], None]


class SaveError(RunFailed):
    """The run could not be saved, and was told to stop then, or it was its end."""


class RunCheckpoint(ModelCheckpoint):
    """``best.ckpt`` (highest evaluation return) and ``last.ckpt``, both after each evaluation.

    Lightning's own saves at the end of an epoch, and a run here is one epoch; it leaves ``last`` as it is when an
    evaluation brought no new best.

    Args:
        save_top_k: How many of the best evaluations are kept: 1 is ``best.ckpt``; for more, and for −1 (all of them),
            the files are ``best-env4000.ckpt`` and so on; 0 keeps none.
        last: Keep ``last.ckpt``, what a run is resumed from.
        every_env_steps: Write ``last.ckpt`` also whenever so many environment steps have passed.
        on_save_error: When the disk is full, or a save fails otherwise: ``"warn"`` and go on, or ``"stop"`` the run.
            The checkpoints so far stay as they are; the next moment to save tries again. Where the end cannot be saved,
            ``covr fit`` ends with status 3 in either case.
        folder: Where to write; by default ``checkpoints`` in the run's folder.

    Raises:
        ConfigError: A value is out of range.
    """

    def __init__(
        self,
        save_top_k: int = 1,
        last: bool = True,
        every_env_steps: int | None = None,
        on_save_error: Literal["warn", "stop"] = "warn",
        folder: str | Path | None = None,
    ) -> None:
        if save_top_k < -1:
            raise ConfigError(f"RunCheckpoint.save_top_k is {save_top_k}; it can be −1 (all), 0 (none) or more.")
        if every_env_steps is not None and every_env_steps < 1:
            raise ConfigError(f"RunCheckpoint.every_env_steps is {every_env_steps}; it must be at least 1, or null.")
        if every_env_steps is not None and not last:
            raise ConfigError(
                f"RunCheckpoint.every_env_steps is {every_env_steps}, which writes last.ckpt, but last is false."
            )
        if on_save_error not in ("warn", "stop"):
            raise ConfigError(f"RunCheckpoint.on_save_error is {on_save_error!r}; it can be 'warn' or 'stop'.")
        super().__init__(
            folder,
            filename="best" if save_top_k == 1 else "best-env{env_steps:d}",
            auto_insert_metric_name=False,
            monitor="eval/return",
            mode="max",
            save_top_k=save_top_k,
            save_last=last,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.every_env_steps = every_env_steps
        self.on_save_error = on_save_error
        self._saved_env_steps: int | None = None  # None before training has begun: there is nothing to save
        self._has_failed = False  # the newest save

    # -- when ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder."""
        self.dirpath = self.dirpath or str(Path(trainer.default_root_dir).resolve() / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on there is something to save that the disk does not have."""
        super().on_train_start(trainer, pl_module)
        self._saved_env_steps = _env_steps(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Save the last if it is due; where an evaluation follows, after that."""
        evaluation_follows = trainer.val_check_batch == 1 and trainer.enable_validation
        if self.every_env_steps is None or evaluation_follows or _is_test_run(trainer):
            return
        now, new = _env_steps(trainer), trainer.datamodule.env_steps_completed  # type: ignore[attr-defined]
        if now // self.every_env_steps > (now - new) // self.every_env_steps:
            self._save(trainer, self._save_last_checkpoint)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the best if it is one, and the last."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not _is_test_run(trainer):
            self._save(trainer, self._save_topk_checkpoint, self._save_last_checkpoint)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last if the run has ended without the evaluation that saves it."""
        if not self.has_saved(trainer):
            self._save(trainer, self._save_last_checkpoint, is_over=True)

    def has_saved(self, trainer: L.Trainer) -> bool:
        """Whether all that this process has trained is saved, or is not to be."""
        is_saved = not self._has_failed and self._saved_env_steps in (None, _env_steps(trainer))
        return is_saved or _is_test_run(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the last if a signal stopped the run between two steps; a failure leaves what was saved before.

        Until it is saved another SIGTERM or SIGUSR1 changes nothing; then the signals are given back.
        """
        try:
            has_begun = self._saved_env_steps is not None
            if isinstance(exception, RunStopped) and has_begun and not _is_test_run(trainer):
                self._save(trainer, self._save_last_checkpoint, stop=False)
        finally:
            stop_signals.uninstall()

    # -- how -----------------------------------------------------------------------------------------------------

    def _save(self, trainer: L.Trainer, *saves: Save, stop: bool | None = None, is_over: bool = False) -> None:
        """Save, one after the other, or say why not."""
        now, stop = _env_steps(trainer), self.on_save_error == "stop" if stop is None else stop
        for save in saves:
            books = {**self.state_dict(), "best_k_models": dict(self.best_k_models)}
            try:
                with trainer.lightning_module.times("checkpoint"):  # type: ignore[union-attr, operator]
                    save(trainer, self._monitor_candidates(trainer))
            except (OSError, OtherProcessFailed) as error:
                self._has_failed = True
                super().load_state_dict(books)  # Lightning notes a checkpoint before it is written
                if isinstance(error, OtherProcessFailed):  # which says why
                    if stop or not error.could_not_write:
                        raise
                    return
                so_far = f"the checkpoints so far, up to step {self._saved_env_steps}, are still there"
                so_far = so_far if self._saved_env_steps else "nothing was saved before"
                sentence = f"At {now} environment steps the run could not be saved ({error}); {so_far}"
                if stop:
                    raise SaveError(f"{sentence}; the run stops (RunCheckpoint.on_save_error is 'stop')") from error
                log.warning("%s%s.", sentence, "" if is_over else "; the next moment to save tries again")
                return
        self._saved_env_steps, self._has_failed = now, False

    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
        return {**super()._monitor_candidates(trainer), "env_steps": torch.tensor(_env_steps(trainer))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over which checkpoints are the best: those that are there, wherever the run's folder is now."""
        assert self.dirpath is not None, "setup found it"
        here = {str(Path(self.dirpath) / Path(path).name): v for path, v in state_dict["best_k_models"].items()}
        best = sorted((path for path in here if Path(path).is_file()), key=lambda path: float(here[path]), reverse=True)
        best = best if self.save_top_k == -1 else best[: self.save_top_k]
        self.best_k_models = {path: here[path] for path in best}
        if best:
            self.best_model_path, self.best_model_score = best[0], here[best[0]]
            worst = min(best, key=lambda path: float(here[path]))  # the oldest of equals, as Lightning takes it
            self.kth_best_model_path, self.kth_value = worst, here[worst]


def is_all_saved(trainer: L.Trainer) -> bool:
    """Whether every :class:`RunCheckpoint` of a run has saved where the run is now."""
    return all(one.has_saved(trainer) for one in trainer.checkpoint_callbacks if isinstance(one, RunCheckpoint))


def _env_steps(trainer: L.Trainer) -> int:
    return trainer.datamodule.counters.env_steps  # type: ignore[attr-defined]


def _is_test_run(trainer: L.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
