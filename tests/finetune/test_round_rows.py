"""Which rows a round trains on, with which labels and weights, and which ones measure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from covr_lightning.finetune import EDDF, RALW, RandomSubset, RandomWeight, TopFraction, round
from covr_lightning.finetune.filters import Filter
from covr_lightning.finetune.module import FineTuneSettings, VLMFineTuner
from covr_lightning.finetune.round import RoundReport, fine_tune_round, proposal_error
from covr_lightning.finetune.training import train_adapter
from covr_lightning.finetune.weights import Weight
from covr_lightning.vlm.vlm import Proposals
from tests.finetune.small_rounds import CPU, frames, vlm
from tests.finetune.small_rounds import SETTINGS as SMALL

ROWS = 60
#: Row i has a picture of value i, and the action (i / 100, −i / 200); ten episodes of six rows.
FRAMES = torch.arange(ROWS, dtype=torch.uint8)[:, None, None, None].expand(ROWS, 3, 2, 2)
ACTIONS = torch.stack([torch.arange(ROWS) / 100, torch.arange(ROWS) / -200], 1)
DATA = TensorDict({"frame": FRAMES, "action": ACTIONS, "episode": torch.arange(ROWS) // 6}, [ROWS])
SCORES = 100 * torch.rand(ROWS, generator=torch.Generator().manual_seed(3))
SETTINGS = FineTuneSettings(held_out=0.25, seed=11)


class Trained(NamedTuple):
    """What a round handed over."""

    rows: list[int]
    actions: Tensor
    weights: Tensor
    settings: FineTuneSettings
    trainer: dict[str, Any]
    asked: list[list[int]]
    report: RoundReport


class Silent:
    """A VLM that answers 0.1 to everything and is not trained."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def ask(self, frames: Tensor) -> Proposals:
        self.asked.append(frames[:, 0, 0, 0].tolist())
        valid = torch.ones(len(frames), dtype=torch.bool)
        return Proposals(torch.full((len(frames), 2), 0.1), valid, valid)

    def adapter_trained(self, *args: Any) -> None:
        pass


def a_round(
    monkeypatch: pytest.MonkeyPatch, filter_: Filter, weight: Weight, number: int = 1, entropy: float = 0.0
) -> Trained:
    """Run it without training; what would have been trained on."""
    seen: list[Any] = []

    def train(model: Any, *handed: Any) -> tuple[list[float], list[str]]:
        seen.extend(handed)
        return [1.0], []

    monkeypatch.setattr(round, "train_adapter", train)
    model, trainer = Silent(), {"accelerator": "cpu"}
    report = RoundReport(number, 1000, ROWS)
    fine_tune_round(report, model, DATA, SCORES, entropy, filter_, weight, SETTINGS, trainer, ask_at_once=100)  # type: ignore[arg-type]
    frames, *others = seen
    return Trained(frames[:, 0, 0, 0].tolist(), *others, model.asked, report)


@pytest.mark.parametrize("entropy", [-2.0, 0.0])
def test_kept_rows_are_trained_on_with_their_own_labels_and_weights(
    monkeypatch: pytest.MonkeyPatch, entropy: float
) -> None:
    trained = a_round(monkeypatch, EDDF(), RALW(), entropy=entropy)
    g = SCORES.double().numpy()
    q1, median, q3 = np.percentile(g, [25, 50, 75])
    kept = {int(i) for i in np.nonzero(g > median + (q3 - q1) / (1 + np.exp(-entropy)))[0]}
    before, after = trained.asked
    assert before == after
    held_out = {*before}
    assert len(held_out) == len(before) == int(0.25 * len(kept) + 0.5)
    assert {*trained.rows} | held_out <= kept  # beside a held-out stretch rows may be left out
    assert not {*trained.rows} & held_out
    assert len({*trained.rows}) == len(trained.rows) > len(kept) // 2
    low, high = min(g[i] for i in kept), max(g[i] for i in kept)
    for row, action, weight in zip(trained.rows, trained.actions, trained.weights, strict=True):
        assert action.tolist() == pytest.approx([row / 100, -row / 200])
        assert weight.item() == pytest.approx(max(0.0, 2 * (g[row] - low) / (high - low) - 1), abs=1e-6)
    assert trained.settings is SETTINGS
    assert trained.trainer == {"accelerator": "cpu"}
    report = trained.report
    assert (report.kept, report.held_out) == (len(kept), len(held_out))
    assert report.trained == int((trained.weights > 0).sum())
    constant = np.sort(trained.actions.numpy(), 0)[(len(trained.rows) - 1) // 2]  # torch's median is the lower one
    measured = np.array([[row / 100, -row / 200] for row in before])
    assert report.error_constant == pytest.approx(np.abs(measured - constant).mean(), rel=1e-5)
    assert report.error_after == pytest.approx(np.abs(measured - 0.1).mean(), rel=1e-5)


def test_the_split_does_not_move_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    weights: dict[int, float] = {}
    measured: set[int] = set()
    for number in range(1, 7):
        trained = a_round(monkeypatch, EDDF(), RALW(), number=number)
        for row, weight in zip(trained.rows, trained.weights.tolist(), strict=True):
            assert weights.setdefault(row, weight) == weight
        measured |= {*trained.asked[0]}
    lowest = min({*weights} | measured, key=SCORES.tolist().__getitem__)
    assert lowest in measured  # in one of these rounds, and in another it is trained on
    assert weights[lowest] == 0


def test_the_bound_of_the_best_95_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    report = a_round(monkeypatch, EDDF(), RALW()).report
    assert report.kept_top95 == 57  # of 60
    assert report.tau_top95 == pytest.approx(sorted(SCORES.tolist())[3])


def test_what_a_round_draws_does_not_depend_on_the_rounds_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def parts() -> tuple[Filter, Weight]:
        return RandomSubset(TopFraction(0.5)), RandomWeight()

    used = parts()
    first, second = (a_round(monkeypatch, *used, number=n) for n in (1, 2))
    resumed = a_round(monkeypatch, *parts(), number=2)
    assert second.rows == resumed.rows
    assert torch.equal(second.weights, resumed.weights)
    assert second.asked == resumed.asked
    assert first.rows != second.rows


def test_training_is_in_train_mode_in_a_new_order_each_round_and_by_the_rate_of_the_settings(
    untrained_vlm: Any,
) -> None:
    model = vlm(untrained_vlm)
    model.add_adapter()
    tuner = VLMFineTuner(model, replace(SETTINGS, batch_size=8, gradient_checkpointing=False))
    tuner.prepare()
    assert model.model.training
    orders = []
    for number in (0, 0, 1):
        model.round = number
        loader = tuner.train_loader(FRAMES, ACTIONS, SCORES)
        batches = [(frames[:, 0, 0, 0].tolist(), actions, scores) for frames, actions, scores in loader]
        for rows, actions, scores in batches:
            assert torch.equal(actions, ACTIONS[rows])
            assert torch.equal(scores, SCORES[rows])
        orders.append([row for rows, *_ in batches for row in rows])
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(order) == list(range(ROWS)) != order for order in orders)
    tuner.finish()
    assert not model.model.training


def test_errors_are_of_parsed_answers_and_shares_of_those_that_came() -> None:
    # Four rows: 0.1 and 0.3 off in both dimensions, one answer that says no action, one that never came.
    said = torch.tensor([[0.1, -0.1], [0.3, 0.3], [9.0, 9.0], [9.0, 9.0]])
    answers = Proposals(said, torch.tensor([True, True, False, False]), torch.tensor([True, True, True, False]))
    error, unparsable, unanswered = proposal_error(answers, torch.zeros(4, 2))
    assert (error, unparsable, unanswered) == pytest.approx((0.2, 1 / 3, 1 / 4))


def test_an_optimizer_step_is_of_as_many_batches_as_are_accumulated(
    untrained_vlm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    before = VLMFineTuner.on_before_optimizer_step

    def step(tuner: VLMFineTuner, optimizer: Any) -> None:
        steps.append(len(tuner.losses))
        before(tuner, optimizer)

    monkeypatch.setattr(VLMFineTuner, "on_before_optimizer_step", step)
    settings = replace(SMALL, epochs=2, batch_size=2, accumulate=3)
    some = frames(12), torch.zeros(12, 2), torch.ones(12)
    losses, failures = train_adapter(vlm(untrained_vlm), *some, settings, CPU)
    assert failures == []
    assert len(losses) == 12  # twice six batches
    assert steps == [3, 6, 9, 12]
