"""One fine-tune round: choose rows, weigh them, train the adapter, measure before and after."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from tqdm import tqdm

from covr_lightning import processes
from covr_lightning.errors import RunFailed, WrongResult
from covr_lightning.finetune.filters import Filter, TopFraction
from covr_lightning.finetune.launch import SeparateLaunch
from covr_lightning.finetune.module import FineTuneSettings
from covr_lightning.finetune.optimizers import check_optimizer
from covr_lightning.finetune.samples import RoundSamples
from covr_lightning.finetune.split import hold_out
from covr_lightning.finetune.training import shows_progress, train_adapter
from covr_lightning.finetune.weights import Weight
from covr_lightning.memory import PeakMemory
from covr_lightning.progress import bar
from covr_lightning.random_state import derived_seed, own_randomness
from covr_lightning.saving.files import WRITE_ERRORS, reason
from covr_lightning.vlm.vlm import VLM, Proposals

#: Bins of the distribution of scores that a round reports.
BINS = 40


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
        held_out: Kept rows that measured the VLM; see :func:`~covr_lightning.finetune.split.hold_out`.
        held_out_episodes: Episodes that they are of; 0 where that is not known.
        entropy: ε, the policy's entropy per action dimension.
        action_dim: A.
        tau: τ in the unit of the returns.
        score_quantiles: Minimum, quartiles and maximum of the scores in D_f.
        histogram: Of the scores in D_f (Fig. 8): ``edges`` of :data:`BINS` equal bins from minimum to maximum, and how
            many of ``all`` rows and of the ``kept`` ones are in each.
        kept_top95: Rows that a fixed top-95 % filter would have kept (ablation M4), which Fig. 8 compares with.
        tau_top95: The lowest score that it keeps.
        error_before: VLM's error before the round.
        error_after: VLM's error after it.
        error_constant: The constant predictor's error on the rows that the VLM's is taken on after the round (before
            it, if nothing was trained): those whose answers could be parsed, or all where none could.
        noise: Mean |a − tanh μ| of actions that the policy draws on the states that ε is estimated on: what remains of
            the error for a VLM that knows all that the policy knows. (D_f's actions are those of earlier policies.)
        unparsable_before: Share of held-out answers that could not be parsed before.
        unparsable_after: The same after.
        unanswered_before: Share of held-out rows that got no answer before, the VLM's engine being away; they count in
            neither of the other two.
        unanswered_after: The same after.
        losses: Training losses, one per forward pass.
        failures: Why training was tried again with half the batch, or given up.
        seconds: Wall time of the round.
        renewed: Answers in D that were masked or given anew because the VLM changed (YAML key data.stale_priors).
        seconds_renewing: Wall time of that, not part of `seconds`.
        vlm_return: Mean return of the VLM acting alone after the round (Table 14), with `vlm_episodes` above 0.
        peak_memory_mb: Highest memory use in the round in MB: of the VLM's GPU, or without one of the process; see
            :class:`~covr_lightning.memory.PeakMemory`.
        note: Why nothing was trained, or that the VLM did not beat the constant predictor.
    """

    round: int
    env_steps: int
    rows: int
    kept: int = 0
    trained: int = 0
    held_out: int = 0
    held_out_episodes: int = 0
    entropy: float = math.nan
    action_dim: int = 0
    tau: float = math.nan
    score_quantiles: tuple[float, ...] = ()
    histogram: dict[str, list[float]] = field(default_factory=dict)
    kept_top95: int = 0
    tau_top95: float = math.nan
    error_before: float = math.nan
    error_after: float = math.nan
    error_constant: float = math.nan
    noise: float = math.nan
    unparsable_before: float = math.nan
    unparsable_after: float = math.nan
    unanswered_before: float = math.nan
    unanswered_after: float = math.nan
    losses: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    renewed: int = 0
    seconds_renewing: float = 0.0
    vlm_return: float = math.nan
    peak_memory_mb: float = math.nan
    note: str = ""

    @property
    def measures(self) -> tuple[float, float, float]:
        """What a prior may go by; see :meth:`covr_lightning.agent.Prior.measured`."""
        return self.error_after, self.error_constant, self.unparsable_after

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        """The figures that say whether the round was worth it, and its note."""
        text = (
            f"Round {self.round} at {self.env_steps} environment steps: kept {self.kept} of {self.rows} rows "
            f"(ε {self.entropy:.2f}, τ {self.tau:.2f}); VLM error {self.error_before:.3f} → "
            f"{self.error_after:.3f}, constant {self.error_constant:.3f}"
        )
        if not math.isnan(self.noise):
            text += f", noise of the policy {self.noise:.3f}"
        text += f"; {self.seconds:.0f} s"
        if not math.isnan(self.peak_memory_mb):
            text += f", {self.peak_memory_mb:.0f} MB at most"
        return f"{text}; {self.note}" if self.note else text


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
    adapter: Path | None = None,
    launch: SeparateLaunch | None = None,
    samples: RoundSamples | None = None,
    ask_at_once: int = 16,
) -> RoundReport:
    """Run one round on finished rows of D_f; the global random state is left as it was.

    Args:
        report: Filled in.
        vlm: Gets a better adapter.
        rows: (N,) with ``frame`` (3, H, W) uint8 and ``action`` (A,), and ``episode`` () int64 where it is known.
        scores: (N,).
        entropy: ε per action dimension.
        filter_: Chooses rows.
        weight: Weighs the kept rows by their scores.
        settings: How to train.
        trainer_kwargs: Arguments of the inner Trainer (devices, strategy, precision). Where they hold
            ``enable_progress_bar`` and it is not False, bars show how far the round has come.
        adapter: Folder to write the trained adapter to, where an engine elsewhere reads it; needed with `launch`.
        launch: Trains the adapter in processes of its own; by default this one does.
        samples: Filled in with rows that the VLM is asked about before and after; none by default.
        ask_at_once: Frames per question.

    Returns:
        The report.

    Raises:
        ConfigError: The optimizer cannot run on the VLM's device.
        RunFailed: The adapter cannot be written.
    """
    check_optimizer(settings.optimizer, vlm.device if launch is None else None)
    start, peak = time.monotonic(), PeakMemory(vlm.device)
    shown = shows_progress(trainer_kwargs)
    seed = derived_seed(settings.seed or 0, report.round)
    filter_.reseed(seed)
    weight.reseed(seed)
    report.entropy = entropy
    report.tau = filter_.threshold(scores.clone(), entropy)
    if not isinstance(report.tau, float | int):
        raise WrongResult(
            f"{type(filter_).__name__}.threshold (filter) gave {report.tau!r}; it must give a float, NaN where there "
            "is none."
        )
    if len(scores):
        report.action_dim = rows["action"].shape[-1]
        levels = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
        report.score_quantiles = tuple(torch.quantile(scores.double(), levels).tolist())
    kept = filter_.kept(scores, entropy)
    report.kept = len(kept)
    if len(scores):
        report.histogram = histogram(scores, scores[kept])
        best = scores[TopFraction(0.95).keep(scores, entropy)]
        report.kept_top95, report.tau_top95 = len(best), best.min().item()
    if len(kept) < (2 if settings.held_out else 1):
        report.note = f"{len(kept)} of {len(scores)} rows kept: nothing to fine-tune on"
        return report

    with own_randomness(seed):
        episode = rows.get("episode", None)
        held_out, training = hold_out(kept, settings.held_out, episode)
        # Weights come from the returns of all kept rows, held out or not, so that the split does not move them.
        weights = torch.zeros(len(scores))
        weights[kept] = weight.of(scores[kept])
        report.trained, report.held_out = int((weights[training] > 0).sum()), len(held_out)
        report.held_out_episodes = 0 if episode is None else len(episode[held_out].unique())
        if not report.trained:
            report.note = "no training row has a weight above 0: nothing to fine-tune on"
            return report

        frames, actions = rows["frame"], rows["action"]
        asked = samples if samples is not None and samples.count else RoundSamples(0)
        asked.choose(scores, kept, held_out, seed)
        answers = _ask(vlm, frames, held_out, asked, ask_at_once, shown=shown)
        if answers is not None:
            constant = actions[training].median(0).values
            report.error_before, report.unparsable_before, report.unanswered_before = proposal_error(
                answers, actions[held_out]
            )
            report.error_constant = _constant_error(answers, actions[held_out], constant)
        trained_on = frames[training], actions[training], weights[training]
        if launch is None:
            report.losses, report.failures = train_adapter(vlm, *trained_on, settings, trainer_kwargs)
            if report.losses:
                _put_in_force(vlm, report.round, adapter)
        else:
            assert adapter is not None, "a separate launch hands the adapter over on disk"
            _launch(report, launch, vlm, trained_on, settings, adapter)
        if not report.losses:
            report.note = f"the adapter stays as it was: {'; '.join(report.failures)}"
        else:
            answers = _ask(vlm, frames, held_out, asked, ask_at_once, after=True, shown=shown)
            if answers is not None:
                report.error_constant = _constant_error(answers, actions[held_out], constant)
                _measure_after(report, answers, actions[held_out])
    report.seconds, report.peak_memory_mb = time.monotonic() - start, peak.megabytes()
    return report


@contextmanager
def _on_disk(round_: int) -> Iterator[None]:
    """End the run where a round cannot write what it trains; the checkpoint before the round is still there."""
    try:
        yield
    except WRITE_ERRORS as error:
        raise RunFailed(f"The adapter of round {round_} could not be written ({reason(error)})") from error


def _put_in_force(vlm: VLM, round_: int, adapter: Path | None) -> None:
    """Write the adapter that every process has trained, in the first one, and answer with it in all."""
    with processes.failing_together(), _on_disk(round_):
        if processes.number() == 0:
            vlm.adapter_trained(round_, adapter)
    if processes.number() and adapter is not None:
        vlm.adapter_written(round_, adapter)


def _launch(
    report: RoundReport,
    launch: SeparateLaunch,
    vlm: VLM,
    trained_on: tuple[Tensor, Tensor, Tensor],
    settings: FineTuneSettings,
    adapter: Path,
) -> None:
    """Train in a launch of the first process, and load its adapter in all."""
    with processes.failing_together(), _on_disk(report.round):
        if processes.number() == 0:
            report.losses, report.failures = launch.train(
                vlm, *trained_on, settings, report.round, report.env_steps, adapter
            )
    report.losses, report.failures = processes.from_first((report.losses, report.failures))
    if processes.number() and report.losses:
        vlm.load_adapter(adapter, report.round)


def _measure_after(report: RoundReport, answers: Proposals, actions: Tensor) -> None:
    report.error_after, report.unparsable_after, report.unanswered_after = proposal_error(answers, actions)
    if report.unanswered_after == 1:
        report.note = "no held-out row got an answer after training, so the new adapter is not measured"
    elif math.isnan(report.error_after):
        report.note = "none of the VLM's answers on held-out rows could be parsed"
    elif not report.error_after < report.error_constant:
        report.note = "the VLM does not beat the constant predictor on held-out rows"


def _constant_error(answers: Proposals, actions: Tensor, constant: Tensor) -> float:
    """The constant's error on the rows that the VLM's is taken on, as it may answer only where that is easy."""
    taken = answers.valid if answers.valid.any() else torch.ones_like(answers.valid)
    return (actions - constant).abs()[taken].mean().item()


def histogram(scores: Tensor, kept: Tensor) -> dict[str, list[float]]:
    """Distribution of scores in :data:`BINS` equal bins from their minimum to their maximum.

    Args:
        scores: (N,), N ≥ 1.
        kept: Those of the kept rows.

    Returns:
        ``edges`` (BINS + 1), and the counts (BINS) of ``all`` and ``kept`` rows; a bin holds its lower edge, the last
        one its upper edge too. Where all scores are equal, the bins are 1 wide altogether around them.
    """
    values = scores.detach().double().cpu()
    low, high = values.min().item(), values.max().item()
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)

    def counts(part: Tensor) -> list[float]:
        place = torch.bucketize(part.detach().double().cpu(), edges[1:-1], right=True)
        return torch.bincount(place, minlength=BINS).tolist()

    return {"edges": edges.tolist(), "all": counts(scores), "kept": counts(kept)}


def _ask(
    vlm: VLM,
    frames: Tensor,
    held_out: Tensor,
    samples: RoundSamples,
    at_once: int,
    after: bool = False,
    shown: bool = False,
) -> Proposals | None:
    """Ask about the held-out rows and the low samples, and note the samples' answers.

    Returns:
        The answers to the held-out rows; None without any.
    """
    assert samples.low is not None, "chosen"
    what = f"asking the VLM {'after' if after else 'before'} fine-tuning"
    with bar(len(held_out) + len(samples.low), what, "row", shown) as progress:
        # Apart, so that the answers to the held-out rows are the same with and without samples, bit for bit.
        of_held_out, of_low = (
            ask_all(vlm, frames[index], at_once, progress) if len(index) else None for index in (held_out, samples.low)
        )
    joined = samples.join(of_held_out, of_low)
    samples.before, samples.after = (samples.before, joined) if after else (joined, None)
    return of_held_out


def ask_all(vlm: VLM, frames: Tensor, batch_size: int = 16, progress: tqdm[Any] | None = None) -> Proposals:
    """The VLM's answers; several processes share the frames out, and each gets all answers.

    Args:
        vlm: The VLM.
        frames: (N, 3, H, W) uint8.
        batch_size: Frames per question.
        progress: Moved on by the frames that all processes have answered.
    """
    first, last = (len(frames) * (processes.number() + i) // processes.count() for i in (0, 1))
    parts = []
    for part in frames[first:last].split(batch_size):
        if len(part):
            parts.append(vlm.ask(part))
            if progress is not None:
                progress.update(len(part) * processes.count())
    parts = [part for of_one in processes.gather(parts) for part in of_one]
    return Proposals(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def proposal_error(answers: Proposals, actions: Tensor) -> tuple[float, float, float]:
    """How far the VLM's proposals are from the agent's actions.

    Args:
        answers: The VLM's answers to N frames.
        actions: (N, A).

    Returns:
        Mean absolute error over rows that could be parsed and dimensions (NaN without any), the share of the answered
        rows that could not (NaN without any), and the share of all rows that got no answer.
    """
    proposed, valid, answered = answers
    error = (proposed - actions).abs()[valid].mean().item() if valid.any() else math.nan
    return error, 1 - valid[answered].float().mean().item(), 1 - answered.float().mean().item()
