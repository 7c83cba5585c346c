"""Algorithm 1's outer loop: when ψ says so, the agent's best experience fine-tunes the VLM."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

import lightning as L
import torch
from covr_lightning.callbacks.vlm_acts import play_alone
from tensordict import TensorDictBase

from covr_lightning import processes
from covr_lightning.agent.acting import Spread
from covr_lightning.agent.priors import Prior
from covr_lightning.agent.sac import SACModule
from covr_lightning.data.datamodule import ExperienceData
from covr_lightning.errors import ConfigError
from covr_lightning.finetune import EDDF, RALW, EpisodeBuffer, Filter, LinearSchedule, Schedule, Score, Weight
from covr_lightning.finetune.episodes import everyones
from covr_lightning.finetune.launch import SeparateLaunch
from covr_lightning.finetune.module import FineTuneSettings, Precision
from covr_lightning.finetune.optimizers import check_optimizer
from covr_lightning.finetune.round import RoundReport, fine_tune_round
from covr_lightning.finetune.round_adapters import fetch, remove_double, set_aside
from covr_lightning.finetune.samples import RoundSamples
from covr_lightning.finetune.saved_rows import RowsOfRound, save_rows
from covr_lightning.finetune.scores import ReturnScore
from covr_lightning.finetune.vlm_alone import save_episodes
from covr_lightning.random_state import derived_seed, own_randomness
from covr_lightning.saving.files import as_json, or_warn, write_or_warn
from covr_lightning.saving.manifest import run_of
from covr_lightning.saving.round_files import RoundFiles, take_back
from covr_lightning.stopping import stop_signals

log = logging.getLogger(__name__)


class ProgressiveFineTune(L.Callback):
    """Fills D_f with the agent's episodes and fine-tunes the VLM on them, round after round.

    A round: label what still waits, score the finished rows of D_f, filter them (EDDF), weigh them (RALW), train the
    adapter in an inner Trainer, clear the finished rows, advance c. The open episode stays in D_f.

    Each round's figures go to the loggers (``round/…``), to ``rounds/round_NNN.json`` in the run's folder, and its
    adapter to ``rounds/round_NNN_adapter``.

    Args:
        schedule: When rounds are due.
        filter: Which rows are kept.
        weight: How much they count.
        score: What rows are judged by.
        settings: How the adapter is trained.
        at_time_limit: What follows a truncated episode in g_t: ``"end"`` or ``"bootstrap"`` with the critics' V.
        entropy_states: States of D that ε is estimated on.
        warmup_rows: Let the warm-up's rows into D_f. By default they are: until ψ₀ there is often little else,
            and EDDF takes the best of it. Without them a round learns from the policy's own actions alone.
        precision: Precision of the inner Trainer: ``"32-true"`` computes in the weights' own types, the adapter in
            float32; ``"bf16-mixed"`` computes both in bfloat16.
        save_rows: Also write each round's rows of D_f (``rounds/round_NNN_rows.safetensors``), for ``covr fit --config
            vlm_sft.yaml``.
        samples: Rows of D_f that the VLM is asked about before and after each round and whose answers are written to
            ``rounds/round_NNN_samples.safetensors`` for ``covr report``: half of high return, which the round asks
            about anyway, and half of low return, so ``samples / 2`` answers more before and after. The paper's Fig. 6
            has 300.
        vlm_episodes: Evaluation episodes that the VLM plays alone before the first round and after each (Table 14,
            Fig. 9), written to ``rounds/round_NNN_vlm.safetensors``. None by default: every
            ``data.label_every_agent_steps``-th step of them costs an answer.
        launch: Trains the adapter in processes and on devices of its own; by default this process does, on the VLM's
            device. With it, `precision` is that of the launch's config.
    """

    measures_vlm = True

    def __init__(
        self,
        schedule: Schedule | None = None,
        filter: Filter | None = None,
        weight: Weight | None = None,
        score: Score | None = None,
        settings: FineTuneSettings | None = None,
        at_time_limit: Literal["end", "bootstrap"] = "end",
        entropy_states: int = 1024,
        warmup_rows: bool = True,
        precision: Precision = "32-true",
        save_rows: bool = False,
        samples: int = 64,
        vlm_episodes: int = 0,
        launch: SeparateLaunch | None = None,
    ) -> None:
        if at_time_limit not in ("end", "bootstrap"):
            raise ConfigError(f"at_time_limit is {at_time_limit!r}; it can be 'end' or 'bootstrap'.")
        if precision not in get_args(Precision):
            choices = " or ".join(map(repr, get_args(Precision)))
            raise ConfigError(f"precision of ProgressiveFineTune is {precision!r}; it can be {choices}.")
        for name, value, least in (("samples", samples, 0), ("vlm_episodes", vlm_episodes, 0),
                                   ("entropy_states", entropy_states, 1)):  # fmt: skip
            if value < least:
                raise ConfigError(f"{name} of ProgressiveFineTune is {value}; it must be {least} or more.")
        self.schedule = schedule or LinearSchedule()
        self.filter = filter or EDDF()
        self.weight = weight or RALW()
        self.score = score or ReturnScore()
        self.settings = settings or FineTuneSettings()
        self.at_time_limit = at_time_limit
        self.entropy_states = entropy_states
        self.warmup_rows = warmup_rows
        self.precision = precision
        self.save_rows = save_rows
        self.samples = samples
        self.vlm_episodes = vlm_episodes
        self.launch = launch
        self.reports: list[RoundReport] = []
        self.buffer: EpisodeBuffer | None = None
        self._restored: dict[str, Any] | None = None
        self._rounds_folder: Path | None = None
        self._digest: str | None = None  # of the newest adapter that was trained

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the VLM, make D_f and listen to the collector; nothing of it if no round will ever be due.

        Raises:
            ConfigError: There is no VLM, or the prior waits for what no round will measure.
        """
        if stage != "fit":
            return
        data: ExperienceData = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, SACModule), "this callback serves a SACModule"
        rounds = self.schedule.rounds(data.max_env_steps)
        self._check_prior(pl_module.prior, rounds, data.max_env_steps)
        if pl_module.prior.needs_measure and self.warmup_rows and data.warmup_actions == "vlm":
            raise ConfigError(
                f"{type(pl_module.prior).__name__} (model.prior) goes by the VLM's error, but with "
                "data.warmup_actions = 'vlm' the warm-up's rows are its own answers, in which it has none; set "
                "warmup_rows of ProgressiveFineTune to false."
            )
        if self.schedule.round_at(0) is None:
            return
        if data.vlm is None:
            raise ConfigError("ProgressiveFineTune has no VLM to fine-tune (YAML key vlm).")
        if self.settings.seed is None:
            self.settings = replace(self.settings, seed=data.seed)
        if self.launch is None:
            check_optimizer(self.settings.optimizer, trainer.strategy.root_device)
        data.vlm.load(data.spec)
        if rounds:
            if self.launch is None:
                data.vlm.load_weights()
            data.vlm.check_targets()
        value_after = self._value_after if self.at_time_limit == "bootstrap" else None
        self.buffer = EpisodeBuffer(pl_module.gamma, value_after, self.score.needs_stack, data.vlm.frames)
        data.listeners.append(self._add)
        self._agent, self._data = pl_module, data

    def _check_prior(self, prior: Prior, rounds: list[int], max_env_steps: int) -> None:
        needed = {
            "the VLM's error on held-out rows": (prior.needs_measure, "settings.held_out", self.settings.held_out),
            "what the VLM returns alone": (prior.needs_vlm_return, "vlm_episodes", self.vlm_episodes),
        }
        for goes_by, (needs, key, value) in needed.items():
            if needs and not (rounds and value):
                why = (
                    f"{key} of ProgressiveFineTune is 0; it must be above 0" if rounds else
                    f"no round is due within data.max_env_steps = {max_env_steps} (schedule of ProgressiveFineTune)"
                )  # fmt: skip
                raise ConfigError(f"{type(prior).__name__} (model.prior) goes by {goes_by}, but {why}.")

    def _add(self, env: int, transition: TensorDictBase | None) -> None:
        assert self.buffer is not None, "setup made it"
        if self.schedule.round_at(self._data.counters.rounds) is None:
            return  # no round will ask for it
        if transition is None:
            self.buffer.cut_episode(env)
        elif self.warmup_rows or not transition["warmup"]:
            self.buffer.add(transition, env)

    def _value_after(self, transition: TensorDictBase) -> float:
        """V of the state that a transition led to."""
        return float(self._agent.state_value(transition["next", "pixels"][None], transition["action"][None]))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the VLM where the agent is."""
        if self.buffer is not None:
            trainer.datamodule.vlm.to(pl_module.device)  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Run a round if one is due."""
        data: ExperienceData = trainer.datamodule  # type: ignore[attr-defined]
        if data.env_steps_completed and self.schedule.due(data.counters):
            with self._agent.times("fine-tune"):
                self._round(trainer, self._agent, data)

    def _round(self, trainer: L.Trainer, pl_module: SACModule, data: ExperienceData) -> None:
        assert self.buffer is not None, "setup made it"
        assert data.vlm is not None, "setup checked it"
        # A signal in here leaves the round for the resumed run, which begins with it: until the end of this block
        # nothing changes that the round does not do again in the same way.
        data.step_is_open = True
        with stop_signals.at_once():
            if data.labels is not None:
                data.labels.flush()
            with processes.failing_together():
                own = self._own(pl_module)
            rows, scores = everyones(*own)
            report = RoundReport(round=data.counters.rounds + 1, env_steps=data.counters.env_steps, rows=len(rows))
            files = self._files(trainer, report.round)
            if report.round == 1:
                self._vlm_alone(trainer, data, 0)
            with processes.failing_together():
                if not processes.number():
                    set_aside(files.adapter)
            samples = RoundSamples(self.samples)
            entropy, report.noise = self._spread(pl_module, data)
            fine_tune_round(
                report, data.vlm, rows, scores, entropy, self.filter, self.weight,
                self.settings, self._trainer_kwargs(trainer), files.adapter, self.launch,
                samples, data.label_batch_size,
            )  # fmt: skip
            if len(rows) and not processes.number():
                if self.save_rows:
                    of_round = RowsOfRound(rows, scores, report.entropy, report.round, report.env_steps, data.spec)
                    with or_warn(files.rows):
                        save_rows(files.rows, of_round)
                with or_warn(files.samples):
                    samples.save(files.samples, rows, scores, data.spec)
            data.vlm.round = report.round
            data.vlm.to(pl_module.device)
            report.vlm_return = self._vlm_alone(trainer, data, report.round)
            if data.labels is not None and report.losses:
                start = time.monotonic()
                renewed = data.labels.vlm_changed(_shows_progress(trainer))
                report.renewed = sum(processes.gather(renewed))
                report.seconds_renewing = time.monotonic() - start
        self._record(trainer, data, report)
        data.counters.rounds = report.round
        self.buffer.clear(open_too=self.schedule.round_at(report.round) is None)
        self.reports.append(report)
        self._tell_prior(self._agent.prior, report)
        data.step_is_open = False

    @staticmethod
    def _tell_prior(prior: Prior, report: RoundReport) -> None:
        prior.measured(*report.measures)
        if math.isfinite(report.vlm_return):
            prior.vlm_acted(report.vlm_return)

    def _vlm_alone(self, trainer: L.Trainer, data: ExperienceData, round_: int) -> float:
        """Have the VLM play alone and write it down.

        Returns:
            Its mean return; NaN if it plays none, or if its engine was away, so that not all actions were its own.
        """
        if not self.vlm_episodes:
            return math.nan
        with own_randomness(derived_seed(self.settings.seed or 0, round_)):
            episodes, answers = play_alone(data, self.vlm_episodes, _shows_progress(trainer))
        if not processes.number():
            with or_warn(path := self._files(trainer, round_).episodes):
                save_episodes(path, episodes, round_, answers)
        if answers.unanswered:
            log.warning(
                "%d of %d frames that the VLM was asked about while it played alone after round %d got no answer; what "
                "it returned is no measure of it and is not counted.", answers.unanswered, answers.asked, round_,
            )  # fmt: skip
            return math.nan
        return fmean(episode.episode_return for episode in episodes)

    def _own(self, pl_module: SACModule) -> tuple[TensorDictBase, torch.Tensor]:
        """This process's finished rows and their scores."""
        assert self.buffer is not None, "setup made it"
        rows = self.buffer.rows()
        return rows, self.score.of(rows, pl_module.min_q) if len(rows) else torch.zeros(0)

    def _spread(self, pl_module: SACModule, data: ExperienceData) -> Spread:
        """Estimate ε, and the policy's noise, on states drawn from D, without touching the sampler's random state."""
        own = None  # of a process that has no rows: right after D was dealt out to more processes than it has episodes
        if len(data.storage):
            generator = torch.Generator().manual_seed(derived_seed(self.settings.seed or 0, data.counters.env_steps))
            index = torch.randint(0, len(data.storage), (self.entropy_states,), generator=generator)
            rows = data.storage.get(index)
            own = pl_module.spread(rows["pixels"], rows.get("previous_action"))
        everyone = [one for one in processes.gather(own) if one is not None]
        return Spread(*map(fmean, zip(*everyone, strict=True)))

    def _trainer_kwargs(self, trainer: L.Trainer) -> dict[str, Any]:
        """Of an inner Trainer on the same devices, in the processes that are there."""
        device = trainer.strategy.root_device
        accelerator = "gpu" if device.type == "cuda" else device.type
        shared = {
            "accelerator": accelerator, "precision": self.precision, "enable_progress_bar": _shows_progress(trainer),
        }  # fmt: skip
        if processes.count() == 1:
            devices: Any = [device.index or 0] if accelerator == "gpu" else 1
            return shared | {"devices": devices}
        devices = trainer.device_ids if accelerator == "gpu" else trainer.num_devices
        return shared | {"devices": devices, "num_nodes": trainer.num_nodes, "strategy": "ddp"}

    def _record(self, trainer: L.Trainer, data: ExperienceData, report: RoundReport) -> None:
        if processes.number():
            return
        files = self._files(trainer, report.round)
        if data.vlm is not None and data.vlm.has_adapter and not report.losses:
            with or_warn(files.adapter):
                data.vlm.save_adapter(files.adapter)  # one that was trained is written already
        digest = remove_double(files.adapter)
        if report.losses:
            self._digest = digest
        write_or_warn(files.report, [as_json(report.as_dict())])
        numbers = {f"round/{k}": float(v) for k, v in report.as_dict().items() if isinstance(v, int | float)}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=report.env_steps)
        log.log(logging.WARNING if report.note else logging.INFO, "%s", report)

    @staticmethod
    def _folder(trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "rounds"

    @classmethod
    def _files(cls, trainer: L.Trainer, round_: int) -> RoundFiles:
        return RoundFiles(cls._folder(trainer), round_)

    def state_dict(self) -> dict[str, Any]:
        """Reports and each process's D_f; the adapter is on disk under its round, in the folder that is named."""
        mine = self.buffer.state_dict() if self.buffer is not None else None
        return {
            "reports": [report.as_dict() for report in self.reports],
            "buffers": processes.gather_on_first(mine),
            "folder": None if self._rounds_folder is None else str(self._rounds_folder),
            "adapter": self._digest,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the reports; keep the rest until training starts, which a run that is over does not do again."""
        self._restored = state_dict
        self.reports = [
            RoundReport(**{**r, "score_quantiles": tuple(r["score_quantiles"])}) for r in state_dict["reports"]
        ]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over what a checkpoint brought: D_f, the last round's adapter and what the prior goes by.

        Raises:
            ConfigError: The adapter is neither in the run's folder nor where the checkpoint's run had it.
        """
        self._rounds_folder = self._folder(trainer).resolve()
        state, self._restored = self._restored, None
        if state is None:
            return
        data: ExperienceData = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, SACModule), "setup checked it"
        if self.buffer is not None:
            self._take_back([buffer for buffer in state["buffers"] if buffer is not None], data.cut_envs)
        trained = [report.round for report in self.reports if report.losses]
        if trained:
            self._digest = state.get("adapter")
            if self.buffer is None and not pl_module.prior.uses_vlm:  # nothing asks the VLM any more
                self._rounds_folder = None if state.get("folder") is None else Path(state["folder"])
            else:
                before = [Path(folder) for folder in [state.get("folder")] if folder]
                beside = run_of(Path(trainer.ckpt_path or "")) / "rounds"
                before = [beside, *before] if beside.is_dir() else before  # that run may have been moved
                self._put_back_adapter(data, self._files(trainer, trained[-1]), before)
        for report in self.reports:
            self._tell_prior(pl_module.prior, report)
        if data.vlm is not None:
            data.vlm.round = data.counters.rounds
        if not processes.number():
            with or_warn(self._folder(trainer)):
                take_back(self._folder(trainer), data.counters.rounds)

    def _put_back_adapter(self, data: ExperienceData, files: RoundFiles, before: list[Path]) -> None:
        """Answer with the newest adapter that was trained; later rounds have changed nothing."""
        assert data.vlm is not None, "setup checked it"
        with processes.failing_together():
            if not processes.number():
                fetch(files.adapter, before, self._digest)
        data.vlm.load_adapter(files.adapter, files.round)

    def _take_back(self, states: list[dict[str, Any]], cut_envs: list[int] | None) -> None:
        """Take this process's D_f from a checkpoint, or, if its processes or environments were others, its share."""
        assert self.buffer is not None, "setup made it"
        if not states:
            return
        if cut_envs is not None:
            self.buffer.load_state_dict(states[processes.number()])
            for env in cut_envs:
                self.buffer.cut_episode(env)
            return
        self.buffer.load_share(states, processes.number(), processes.count())


def _shows_progress(trainer: L.Trainer) -> bool:
    return trainer.progress_bar_callback is not None
