"""One fine-tune round: choose rows, weigh them, train the adapter, measure before and after."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning as L
import torch
from tensordict import TensorDictBase
from torch import Tensor

from covr_lightning.finetune.filters import Filter
from covr_lightning.finetune.module import FineTuneSettings, VLMFineTuner
from covr_lightning.finetune.weights import Weight
from covr_lightning.vlm.vlm import VLM, own_randomness

log = logging.getLogger(__name__)


@dataclass
class RoundReport:
    """What one round did.

    Errors are mean absolute errors per action dimension on kept rows that were held out of training. The constant
    predictor answers the median action of the training rows.

    Attributes:
        round: Number of the round, from 1.
        env_steps: Environment steps at which it ran.
        rows: Finished rows in D_f.
        kept: Rows that the filter kept.
        trained: Kept rows that were trained on with a weight above 0.
        held_out: Kept rows that measured the VLM.
        entropy: ε, the policy's entropy per action dimension.
        tau: τ in the unit of the returns.
        score_quantiles: Minimum, quartiles and maximum of the scores in D_f.
        error_before: VLM's error before the round.
        error_after: VLM's error after it.
        error_constant: The constant predictor's error.
        unparsable_before: Share of held-out answers that could not be parsed before.
        unparsable_after: The same after.
        losses: Training losses, one per forward pass.
        seconds: Wall time of the round.
        note: Why nothing was trained, or that the VLM did not beat the constant predictor.
    """

    round: int
    env_steps: int
    rows: int
    kept: int = 0
    trained: int = 0
    held_out: int = 0
    entropy: float = math.nan
    tau: float = math.nan
    score_quantiles: tuple[float, ...] = ()
    error_before: float = math.nan
    error_after: float = math.nan
    error_constant: float = math.nan
    unparsable_before: float = math.nan
    unparsable_after: float = math.nan
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def fine_tune_round(
    report: RoundReport,
    vlm: VLM,
    rows: TensorDictBase,
    scores: Tensor,
    entropy: float,
    filter_: Filter,
    weight: Weight,
    settings: FineTuneSettings,
    trainer_kwargs: dict[str, Any],
) -> RoundReport:
    """Run one round on finished rows of D_f; the global random state is left as it was.

    Args:
        report: Filled in.
        vlm: Gets a better adapter.
        rows: (N,) with ``frame`` (3, H, W) uint8 and ``action`` (A,).
        scores: (N,).
        entropy: ε per action dimension.
        filter_: Chooses rows.
        weight: Weighs the kept rows by their scores.
        settings: How to train.
        trainer_kwargs: Arguments of the inner Trainer (devices, strategy, precision).

    Returns:
        The report.
    """
    start = time.monotonic()
    report.entropy = entropy
    report.tau = filter_.threshold(scores, entropy)
    if len(scores):
        levels = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
        report.score_quantiles = tuple(torch.quantile(scores.double(), levels).tolist())
    kept = filter_.keep(scores, entropy).nonzero().squeeze(-1)
    report.kept = len(kept)
    if len(kept) < 2:
        report.note = f"{len(kept)} of {len(scores)} rows kept: nothing to fine-tune on"
        return report

    with own_randomness(settings.seed + report.round):
        order = kept[torch.randperm(len(kept))]
        n_held_out = min(max(1, round(settings.held_out * len(kept))), len(kept) - 1) if settings.held_out else 0
        held_out, training = order[:n_held_out], order[n_held_out:]
        # Weights come from the returns of all kept rows, held out or not, so that the split does not move them.
        weights = torch.zeros(len(scores))
        weights[kept] = weight(scores[kept])
        report.trained, report.held_out = int((weights[training] > 0).sum()), n_held_out
        if not report.trained:
            report.note = "no training row has a weight above 0: nothing to fine-tune on"
            return report

        frames, actions = rows["frame"], rows["action"]
        if n_held_out:
            constant = actions[training].median(0).values
            report.error_constant = (actions[held_out] - constant).abs().mean().item()
            report.error_before, report.unparsable_before = proposal_error(vlm, frames[held_out], actions[held_out])
        tuner = VLMFineTuner(vlm, settings)
        with quiet_lightning(), torch.enable_grad():
            trainer = L.Trainer(
                max_epochs=settings.epochs,
                max_steps=settings.max_steps,
                accumulate_grad_batches=settings.accumulate,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                inference_mode=False,
                **trainer_kwargs,
            )
            trainer.fit(tuner, tuner.train_loader(frames[training], actions[training], weights[training]))
        report.losses = tuner.losses
        vlm.round = report.round
        vlm.weights_changed()
        if n_held_out:
            report.error_after, report.unparsable_after = proposal_error(vlm, frames[held_out], actions[held_out])
            if not report.error_after < report.error_constant:
                report.note = "the VLM does not beat the constant predictor on held-out rows"
    report.seconds = time.monotonic() - start
    return report


def proposal_error(vlm: VLM, frames: Tensor, actions: Tensor, batch_size: int = 32) -> tuple[float, float]:
    """How far the VLM's proposals are from the agent's actions.

    Args:
        vlm: The VLM.
        frames: (N, 3, H, W) uint8.
        actions: (N, A).
        batch_size: Frames per question.

    Returns:
        Mean absolute error over rows that could be parsed and dimensions (NaN without any), and the share of rows
        that could not.
    """
    proposals = [vlm.propose(part) for part in frames.split(batch_size)]
    proposed = torch.cat([action for action, _ in proposals])
    valid = torch.cat([v for _, v in proposals])
    error = (proposed - actions).abs()[valid].mean().item() if valid.any() else math.nan
    return error, 1 - valid.float().mean().item()


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep an inner Trainer from announcing itself in the middle of a run."""
    import warnings

    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
