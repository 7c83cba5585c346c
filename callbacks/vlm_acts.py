"""VBE: the VLM acts alone (``covr test --actor vlm``)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from covr_lightning import processes
from covr_lightning.data.datamodule import EVAL_SEED_OFFSET, ExperienceData
from covr_lightning.data.labels import Labeller
from covr_lightning.errors import ConfigError
from covr_lightning.evaluation import EpisodeResult, play_episode
from covr_lightning.finetune.vlm_alone import save_episodes
from covr_lightning.progress import bar
from covr_lightning.saving.round_files import round_of
from covr_lightning.vlm.answers import Answers
from covr_lightning.vlm.pictures import side_by_side


class VLMActs(L.Callback):
    """Evaluates the VLM in place of the policy: the paper's VBE, and the VLM's rows of its Tables 4, 14 and 15.

    The VLM is asked at every `data.label_every_agent_steps`-th step; its action is held in between. An answer
    that cannot be parsed is the environment's `idle_action`, 0 nearly everywhere (the paper says nothing of this), and
    is counted; so is one that never came, the VLM's engine being away.

    Args:
        file: Where a test's episodes are written, for ``covr report``; nowhere by default.

    Attributes:
        vlm_plays: Says so to the data, whose tests of the VLM play the episodes of the evaluations.
    """

    vlm_plays = True

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.answers = Answers()
        self.episodes: list[EpisodeResult] = []

    def _take_over(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data.vlm is None:
            raise ConfigError("--actor is 'vlm', but no VLM is given (YAML key vlm).")
        data.vlm.to(pl_module.device)  # first, so that it is quantised there
        data.vlm.load(data.spec)
        pl_module.episode_policy = lambda: HeldAnswers(  # type: ignore[assignment]
            data.vlm, data.env_factory.idle_action, data.label_every_agent_steps, self.answers
        )

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the VLM in the policy's place."""
        self._take_over(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the VLM in the policy's place."""
        self._take_over(trainer, pl_module)

    def on_test_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Record the first episode."""
        if args[1] == 0:
            pl_module.record_frames = True  # type: ignore[assignment]

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        """Keep the episode."""
        pl_module.record_frames = False  # type: ignore[assignment]
        if isinstance(outputs, EpisodeResult):
            self.episodes.append(outputs)

    def _say(self) -> None:
        a = self.answers
        missing = f", {a.unanswered} without an answer" if a.unanswered else ""
        print(f"The VLM acted alone: {a.asked} frames asked, {a.unparsable} unparsable{missing} (no action then).")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how often it could not be understood, and write down what it did."""
        self._say()
        if self.file is not None and self.episodes and trainer.world_size == 1:
            save_episodes(self.file, self.episodes, round_of(self.file), self.answers)
            print(f"For covr report: {self.file}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how often it could not be understood."""
        self._say()


def play_alone(data: ExperienceData, episodes: int, show_progress: bool = False) -> tuple[list[EpisodeResult], Answers]:
    """Have the VLM play evaluation episodes alone, the first ones of each evaluation; several processes share them.

    Args:
        data: Its VLM plays, on its evaluation environment.
        episodes: How many.
        show_progress: Show a bar of this process's episodes.

    Returns:
        The episodes, the first one recorded, and the answers that were counted, those of all processes.
    """
    assert data.vlm is not None, "checked in setup"
    answers, first, mine = Answers(), data.seed + EVAL_SEED_OFFSET, []
    seeds = range(first, first + episodes)[processes.number() :: processes.count()]
    with bar(len(seeds), "the VLM acts alone", "episode", show_progress) as progress:
        for seed in seeds:
            policy = HeldAnswers(data.vlm, data.env_factory.idle_action, data.label_every_agent_steps, answers)
            mine.append(play_episode(policy, data.eval_env, seed, record=seed == first))
            progress.update()
    everyone = processes.gather((mine, answers))
    in_turn = chain(*zip_longest(*(own for own, _ in everyone)))
    return [one for one in in_turn if one is not None], sum((counted for _, counted in everyone), Answers())


class HeldAnswers:
    """A policy that asks at an episode's first step and every n-th after it, and holds the answer.

    Args:
        vlm: Proposes actions.
        idle_action: (A,), taken where an answer cannot be parsed or never came.
        hold_agent_steps: n.
        counts: Counted up.
    """

    def __init__(self, vlm: Labeller, idle_action: Sequence[float], hold_agent_steps: int, counts: Answers) -> None:
        self.vlm = vlm
        self.hold_agent_steps = hold_agent_steps
        self.counts = counts
        self._steps = 0
        self._idle = torch.tensor([idle_action])
        self._held = self._idle

    def __call__(self, pixels: Tensor, deterministic: bool = True, previous_action: Tensor | None = None) -> Tensor:
        """The action (1, A) for stacked frames (1, C, H, W) uint8, of which it is shown the newest.

        `previous_action` (1, A) is None at an episode's first step.
        """
        if previous_action is None:  # perhaps of an episode that is played again
            self._steps = 0
        if self._steps % self.hold_agent_steps == 0:
            action, valid, answered = self.vlm.ask(side_by_side(pixels, self.vlm.frames))
            self.counts.count(valid, answered)
            self._held = action if bool(valid[0]) else self._idle
        self._steps += 1
        return self._held
