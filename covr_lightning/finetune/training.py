"""Training an adapter in an inner Trainer, and what happens when that fails."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning as L
import torch
import torch.distributed
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor
from tqdm import tqdm

from covr_lightning.finetune.module import DivergedError, FineTuneSettings, VLMFineTuner
from covr_lightning.progress import bar
from covr_lightning.stopping import stop_signals
from covr_lightning.vlm.vlm import VLM

log = logging.getLogger(__name__)


def train_adapter(
    vlm: VLM,
    frames: Tensor,
    actions: Tensor,
    weights: Tensor,
    settings: FineTuneSettings,
    trainer_kwargs: dict[str, Any],
) -> tuple[list[float], list[str]]:
    """Train the VLM's adapter; if memory runs out or the loss is not finite, once more with half the batch.

    The second try accumulates more batches, so that an optimizer step sees as many rows, or up to a batch more where
    they do not divide; batches of one row cannot be halved, and there is none. After a failure the
    adapter is what it was before, or none if there was none. On several devices memory that runs out on one is an
    error: the others already wait for it in a collective. Sharded (FSDP2) there is no second try, and afterwards the
    VLM can be saved and nothing else.

    Args:
        vlm: Gets an adapter if it has none.
        frames: (N, 3, H, W) uint8.
        actions: (N, A).
        weights: (N,) ≥ 0.
        settings: How to train.
        trainer_kwargs: Arguments of the inner Trainer (devices, strategy, precision).

    Returns:
        The losses, one per forward pass, none if both tries failed; and why a try failed, if one did.
    """
    had_adapter = vlm.has_adapter
    vlm.add_adapter()
    before = {name: p.detach().cpu().clone() for name, p in vlm.model.named_parameters() if p.requires_grad}
    half = max(1, settings.batch_size // 2)
    halved = replace(settings, batch_size=half, accumulate=-(-settings.batch_size * settings.accumulate // half))
    failures: list[str] = []
    for attempt in (settings, halved) if half < settings.batch_size else (settings,):
        if settings.adapter == "new":
            vlm.renew_adapter()
        tuner = VLMFineTuner(vlm, attempt)
        try:
            _fit(tuner, attempt, trainer_kwargs, (frames, actions, weights))
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, DivergedError) and (is_distributed() or not _out_of_memory(error)):
                raise
            if tuner.is_sharded:
                raise
            failures.append(f"{str(error).splitlines()[0]} (batches of {attempt.batch_size})")
            log.warning("Fine-tuning failed: %s", failures[-1])
            with torch.no_grad():
                for name, parameter in vlm.model.named_parameters():
                    if name in before:
                        parameter.copy_(before[name])
        else:
            return tuner.losses, failures
        finally:
            if not tuner.is_finished:
                tuner.finish()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if not had_adapter:
        vlm.remove_adapter()
    return [], failures


def _fit(
    tuner: VLMFineTuner,
    settings: FineTuneSettings,
    trainer_kwargs: dict[str, Any],
    rows: tuple[Tensor, Tensor, Tensor],
) -> None:
    with quiet_lightning(), torch.enable_grad():
        # A strategy or a plugin serves one Trainer, hence the copy.
        arguments = copy.deepcopy(trainer_kwargs)
        callbacks = arguments.pop("callbacks", None) or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        if not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(_StepBar(shows_progress(arguments)))
            arguments["enable_progress_bar"] = False  # Lightning's own counts batches, of so many epochs
        trainer = L.Trainer(
            max_epochs=settings.epochs,
            max_steps=settings.max_steps,
            accumulate_grad_batches=settings.accumulate,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            inference_mode=False,
            callbacks=[*callbacks, _LeaveSignals()],
            **{**arguments, "use_distributed_sampler": False},  # the module shares each batch out itself
        )
        trainer.fit(tuner, tuner.train_loader(*rows))
    if not all(torch.isfinite(p).all() for p in tuner.model.parameters() if p.requires_grad):
        raise DivergedError("the adapter is not finite after the last step")


def shows_progress(trainer_kwargs: dict[str, Any]) -> bool:
    """Whether a round shows how far it has come; where nothing is said of it, it does not."""
    return trainer_kwargs.get("enable_progress_bar", False) is not False


class _StepBar(L.Callback):
    """A bar in optimizer steps, with the loss of the last forward pass."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self._bar: tqdm[Any] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bar = bar(int(trainer.estimated_stepping_batches), "fine-tuning the VLM", "step", self.shown)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        assert self._bar is not None, "made at the start"
        self._bar.set_postfix(loss=f"{pl_module.losses[-1]:.3f}", refresh=False)  # type: ignore[union-attr, index]
        self._bar.update(trainer.global_step - self._bar.n)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # which Lightning leaves out then


class _LeaveSignals(L.Callback):
    """Leaves signals to the run whose round this is; Lightning's Trainer has just put its own handlers before them."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stop_signals.listen_again()


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU (for which PyTorch has no error of its own)."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error) or "out of memory" in str(error)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep an inner Trainer from announcing itself in the middle of a run."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
