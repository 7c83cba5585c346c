"""Rows that the VLM is asked about before and after a round, and the distribution of returns that a round reports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensordict import TensorDict

from covr_lightning.envs import DMControl
from covr_lightning.finetune.round import BINS, histogram
from covr_lightning.finetune.samples import SHORTER_SIDE, RoundSamples, reduced
from covr_lightning.vlm.vlm import Proposals


def answers(n: int, value: float) -> Proposals:
    valid = torch.ones(n, dtype=torch.bool)
    return Proposals(torch.full((n, 1), value), valid, valid)


def test_high_rows_are_held_out_and_low_ones_not_kept_each_on_its_side_of_the_median() -> None:
    scores = torch.tensor([5.0, 1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 0.0])  # median 3: rows 1, 3, 5 and 7 are low
    samples = RoundSamples(4)
    samples.choose(scores, kept=torch.tensor([2, 4, 6, 7]), held_out=torch.tensor([6, 7, 2, 4]), seed=0)
    assert samples.high is not None
    assert samples.low is not None
    assert samples.high.tolist() == [6, 2]  # 7 is held out, but low
    of_held_out = Proposals(torch.tensor([[0.6], [0.7], [0.2], [0.4]]), torch.ones(4) > 0, torch.ones(4) > 0)
    joined = samples.join(of_held_out, answers(2, -1.0))
    assert joined is not None
    assert joined.actions.flatten().tolist() == pytest.approx([0.6, 0.2, -1, -1])
    assert len(samples.low) == 2
    assert set(samples.low.tolist()) < {1, 3, 5}  # 7 is low, but kept


def test_a_held_out_row_with_the_median_score_is_high() -> None:
    samples = RoundSamples(4)
    samples.choose(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), torch.tensor([0, 1, 2, 3]), torch.tensor([2, 0]), seed=0)
    assert samples.high is not None
    assert samples.high.tolist() == [2, 0]


def test_the_choice_draws_nothing_from_the_global_random_numbers() -> None:
    before = torch.get_rng_state()
    RoundSamples(4).choose(torch.arange(9.0), torch.tensor([8]), torch.tensor([8]), seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_the_file_has_the_chosen_rows_with_their_answers(tmp_path: Path) -> None:
    spec = DMControl("cartpole-swingup", size=40).spec
    scores = torch.tensor([1.0, 2.0, 3.0, 10.0])
    rows = TensorDict(
        {
            "frame": torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 40, 40),
            "action": torch.tensor([[0.1], [0.2], [0.3], [0.4]]), "reward": torch.tensor([[1.0], [2.0], [3.0], [4.0]]),
        },
        [4],
    )  # fmt: skip
    samples = RoundSamples(4)
    samples.choose(scores, kept=torch.tensor([3, 2]), held_out=torch.tensor([3]), seed=0)
    samples.before = samples.join(answers(1, 0.5), answers(2, -0.5))
    samples.save(tmp_path / "rounds" / "samples.safetensors", rows, scores, spec)
    columns = load_file(tmp_path / "rounds" / "samples.safetensors")
    assert columns["high"].tolist() == [True, False, False]
    assert sorted(columns["score"].tolist()) == [1, 2, 10]
    assert columns["score"][0] == 10
    assert columns["before"].flatten().tolist() == [0.5, -0.5, -0.5]
    assert "after" not in columns
    assert (columns["action"].flatten() * 10).round().tolist() == columns["reward"].tolist()
    assert columns["frames"][:, 0, 0, 0].tolist() == [int(r) - 1 for r in columns["reward"]]
    assert (columns["action_low"], columns["action_high"]) == (-1, 1)


def test_nothing_is_written_where_nothing_was_asked(tmp_path: Path) -> None:
    samples = RoundSamples(0)
    samples.choose(torch.arange(3.0), torch.tensor([2]), torch.tensor([2]), seed=0)
    samples.before = samples.join(answers(1, 0.0), None)
    samples.save(tmp_path / "x", TensorDict({}, [3]), torch.arange(3.0), DMControl("cartpole-swingup").spec)
    assert not list(tmp_path.iterdir())


def test_frames_are_reduced_to_the_shorter_side_by_area() -> None:
    frames = torch.zeros(1, 3, 2 * SHORTER_SIDE, 4 * SHORTER_SIDE, dtype=torch.uint8)  # two frames side by side
    frames[..., 0::2] = 100
    small = reduced(frames)
    assert small.shape == (1, 3, SHORTER_SIDE, 2 * SHORTER_SIDE)
    assert (small == 50).all()
    assert reduced(small) is small


def test_the_distribution_counts_every_row_once() -> None:
    # Bins of width 1 from 0 to 40; 40 itself is in the last one.
    scores = torch.tensor([0.0, 0.5, 1.0, 39.5, 40.0])
    shown = histogram(scores, scores[3:])
    assert BINS == 40
    assert shown["edges"] == pytest.approx(list(range(41)))
    assert {i: n for i, n in enumerate(shown["all"]) if n} == {0: 2, 1: 1, 39: 2}
    assert {i: n for i, n in enumerate(shown["kept"]) if n} == {39: 2}


def test_the_distribution_of_equal_scores() -> None:
    shown = histogram(torch.full((7,), 3.0), torch.zeros(0))
    assert (shown["edges"][0], shown["edges"][-1]) == (2.5, 3.5)
    assert sum(shown["all"]) == 7
    assert sum(shown["kept"]) == 0
