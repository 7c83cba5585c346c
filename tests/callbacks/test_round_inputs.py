"""What a run hands to its fine-tune rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from covr_lightning.callbacks import progressive_finetune
from torch import Tensor

from covr_lightning.agent import SACModule
from covr_lightning.agent.acting import Spread
from covr_lightning.data.labels import LabelQueue
from covr_lightning.finetune.round import RoundReport
from covr_lightning.saving.checkpoints import load_checkpoint
from tests.short_runs import fit, replay

GAMMA = 0.9


class Seen:
    """Stands in for the round and notes what it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, losses: tuple[float, ...] = ()) -> None:
        self.losses = losses
        self.events: list[str] = []
        self.rounds: list[dict[str, Any]] = []
        self.states: list[Tensor] = []
        monkeypatch.setattr(progressive_finetune, "fine_tune_round", self.round)
        monkeypatch.setattr(SACModule, "spread", self.spread)
        monkeypatch.setattr(SACModule, "min_q", lambda module, pixels, action: 100 * action[:, 0])
        flush = LabelQueue.flush
        monkeypatch.setattr(LabelQueue, "flush", lambda queue: self.events.append("answers are in") or flush(queue))

    def spread(self, pixels: Tensor, previous_action: Tensor | None = None) -> Spread:
        self.states.append(pixels.clone())
        return Spread(entropy=0.25, noise=0.75)

    def round(
        self, report: RoundReport, vlm: Any, rows: Any, scores: Tensor, entropy: float, *more: Any
    ) -> RoundReport:
        *_, samples, ask_at_once = more
        assert (samples.count, ask_at_once) == (64, 8)  # `samples` by default, data.label_batch_size of these runs
        self.events.append("round")
        given = {"rows": rows, "scores": scores, "entropy": entropy, "noise": report.noise, "vlm_round": vlm.round}
        self.rounds.append(given)
        report.losses = [*self.losses]
        return report


@pytest.mark.parametrize("score", ["ReturnScore", "RewardScore", "QScore"])
def test_rounds_are_given_the_finished_episodes_with_their_returns(
    score: str, untrained_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    settings = ["--model.gamma", str(GAMMA), "--trainer.callbacks.score", f"covr_lightning.finetune.{score}"]
    assert fit(tmp_path, untrained_vlm, *settings, "--data.max_env_steps", "4000") == 0
    data = replay(tmp_path / "run")
    # Episodes of 25 agent steps; a round after 30 has the first one, the one after 90 the second and third.
    for given, rows in zip(seen.rounds, (range(25), range(25, 75)), strict=True):
        index = list(rows)
        assert torch.equal(given["rows"]["action"], data["action"][index])
        assert torch.equal(given["rows"]["frame"], data["pixels"][index][:, -3:])
        reward = data["next", "reward"].flatten().tolist()
        ends = [25 * (t // 25 + 1) for t in index]
        g = [sum(GAMMA ** (k - t) * reward[k] for k in range(t, end)) for t, end in zip(index, ends, strict=True)]
        assert given["rows"]["g"].flatten().tolist() == pytest.approx(g, rel=1e-5)
        by_q = (100 * data["action"][index][:, 0]).tolist()
        expected = {"ReturnScore": g, "RewardScore": [reward[t] for t in index], "QScore": by_q}
        assert given["scores"].flatten().tolist() == pytest.approx(expected[score], rel=1e-5)
        assert (given["entropy"], given["noise"]) == (0.25, 0.75)
    assert [given["vlm_round"] for given in seen.rounds] == [0, 1]
    # Answers that are still waited for are of the VLM as it was before the round.
    first = seen.events.index("round")
    assert seen.events[first - 1] == "answers are in"


def test_entropy_is_estimated_on_states_from_all_of_the_replay(
    untrained_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    assert fit(tmp_path, untrained_vlm, "--data.max_env_steps", "4000") == 0
    pixels = replay(tmp_path / "run")["pixels"].flatten(1)
    for states, collected in zip(seen.states, (30, 90), strict=True):
        assert len(states) == 16  # entropy_states of these runs
        drawn = [int((pixels == state).all(1).nonzero()[0]) for state in states.flatten(1)]
        assert len({*drawn}) > 8
        assert max(drawn) < collected
        assert max(drawn) - min(drawn) > collected // 2


def test_after_the_last_round_no_rows_are_kept(
    untrained_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    one_round = ["--trainer.callbacks.schedule", "GivenSchedule", "--trainer.callbacks.schedule.at_env_steps", "[1200]"]
    assert fit(tmp_path, untrained_vlm, *one_round, "--data.max_env_steps", "4000") == 0
    assert len(seen.rounds) == 1
    callbacks = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["callbacks"]
    [buffer] = next(state["buffers"] for state in callbacks.values() if "buffers" in state)
    assert (buffer["finished"], buffer["open"]) == ([], {})


@pytest.mark.parametrize("trained", [False, True])
def test_answers_are_stale_only_if_the_vlm_was_trained(
    trained: bool, untrained_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch, losses=(0.5,) * trained)
    renewed: list[int] = []
    monkeypatch.setattr(LabelQueue, "vlm_changed", lambda *_: renewed.append(len(seen.rounds)) or 7)
    assert fit(tmp_path, untrained_vlm, "--data.max_env_steps", "4000") == 0
    assert renewed == [1, 2] * trained
    reports = [json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "rounds").glob("*.json"))]
    assert [report["renewed"] for report in reports] == [7 * trained] * 2


def test_a_round_without_rows_writes_none(untrained_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    early = ["--trainer.callbacks.schedule", "GivenSchedule", "--trainer.callbacks.schedule.at_env_steps", "[400,1200]"]
    more = ["--trainer.callbacks.save_rows", "true", "--data.max_env_steps", "1600"]
    assert fit(tmp_path, untrained_vlm, *early, *more) == 0
    assert [len(given["rows"]) for given in seen.rounds] == [0, 25]  # no episode is over after ten agent steps
    written = sorted(path.name for path in (tmp_path / "run" / "rounds").iterdir() if path.suffix != ".json")
    assert written == ["round_002_rows.safetensors"]


@pytest.mark.parametrize("episodes", [0, 1])
def test_the_vlm_plays_alone_before_the_first_round_and_after_each(
    episodes: int, untrained_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Seen(monkeypatch)
    alone = ["--trainer.callbacks.vlm_episodes", str(episodes), "--data.max_env_steps", "4000"]
    assert fit(tmp_path, untrained_vlm, *alone) == 0
    written = sorted(path.name for path in (tmp_path / "run" / "rounds").iterdir() if path.suffix != ".json")
    assert written == [f"round_{number:03d}_vlm.safetensors" for number in range(3)] * episodes
