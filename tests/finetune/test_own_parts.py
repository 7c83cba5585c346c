"""Filters, weights, scores and schedules of somebody's own that give something else than they should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from covr_lightning.errors import ConfigError
from covr_lightning.finetune.filters import Filter
from covr_lightning.finetune.schedules import Schedule
from covr_lightning.finetune.scores import Score
from covr_lightning.finetune.weights import Weight

SCORES = torch.arange(4.0)


class Own(Filter, Weight, Score):
    """Gives what it is told to."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def keep(self, scores: Tensor, entropy: float) -> Tensor:
        return self.given

    def __call__(self, *_: Any) -> Tensor:
        return self.given

    def reseed(self, seed: int) -> None:
        pass


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (torch.tensor([0, 2]), r"int64 of shape \(2,\)"),
        (torch.ones(3, dtype=torch.bool), r"bool of shape \(3,\)"),
        (torch.ones(4, 1, dtype=torch.bool), r"bool of shape \(4, 1\)"),
        (torch.ones(4), r"float32 of shape \(4,\)"),
        (np.ones(4, bool), "a ndarray"),
        (None, "a NoneType"),
    ],
)
def test_what_a_filter_keeps(given: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"Own\.keep \(filter of .*\) gave {told} for 4 rows; it must .* \(4,\)"):
        Filter.kept(Own(given), SCORES, 0.0)
    assert Filter.kept(Own(SCORES > 1), SCORES, 0.0).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (torch.ones(3), r"gave float32 of shape \(3,\) for 4 rows"),
        (torch.ones(4, 1), r"gave float32 of shape \(4, 1\) for 4 rows"),
        ([1.0] * 4, "gave a list for 4 rows"),
        (torch.tensor([1.0, -0.5, 0.0, 1.0]), "gave a row the weight -0.5"),
        (torch.tensor([1.0, float("nan"), 0.0, 1.0]), "gave a row the weight nan"),
    ],
)
def test_what_a_weight_gives(given: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"Own \(weight of ProgressiveFineTune\) {told}"):
        Weight.of(Own(given), SCORES)
    weights = Weight.of(Own(torch.tensor([0, 1, 2, 3])), SCORES)
    assert weights.dtype == torch.float32
    assert weights.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (torch.ones(3), r"float32 of shape \(3,\)"),
        (torch.tensor([1.0, 2.0, 3.0, float("nan")]), "scores that are not finite"),
        (3.0, "a float"),
    ],
)
def test_what_a_score_gives(given: Any, told: str) -> None:
    rows = TensorDict({}, [4])
    with pytest.raises(ConfigError, match=rf"Own \(score of ProgressiveFineTune\) gave {told} for 4 rows"):
        Score.of(Own(given), rows, lambda pixels, action: action)
    assert Score.of(Own(SCORES), rows, lambda pixels, action: action) is SCORES


@pytest.mark.parametrize(("psis", "at", "value"), [([400, 0], 1, "0"), ([-5], 0, "-5"), ([3, 2, 0.5], 2, "0.5")])
def test_rounds_that_come_no_later(psis: list[Any], at: int, value: str) -> None:
    class Shrinking(Schedule):
        def psi(self, c: int) -> int | None:
            return psis[c]

    with pytest.raises(ConfigError, match=rf"Shrinking\.psi\({at}\) is {value} \(schedule of .*at least 1"):
        Shrinking().rounds(2000)


def test_a_filter_cannot_change_the_scores() -> None:
    class Centres(Filter):
        def keep(self, scores: Tensor, entropy: float) -> Tensor:
            scores -= scores.mean()
            return scores > 0

    scores = SCORES.clone()
    assert Centres().kept(scores, 0.0).tolist() == [2, 3]
    assert torch.equal(scores, SCORES)
