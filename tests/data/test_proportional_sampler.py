"""Prioritised replay: the sum tree against cumulative sums, draws against priorities, weights by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer

from covr_lightning.data import FrameStackStorage, ProportionalSampler
from covr_lightning.data.sum_tree import SumTree
from covr_lightning.errors import ConfigError


@pytest.mark.parametrize("size", [1, 2, 5, 64, 100])
def test_tree_equals_cumulative_sums(size: int) -> None:
    rng, tree, naive = np.random.default_rng(size), SumTree(size), np.zeros(size)
    for _ in range(20):
        index = rng.integers(0, size, 7)
        value = rng.integers(0, 50, 7) * (rng.random(7) < 0.7)  # integers, so that every sum is exact
        tree.set(index, value.astype(float))
        for i, v in zip(index, value, strict=True):
            naive[i] = v
        assert tree.leaves.tolist() == naive.tolist()
        assert tree.total == naive.sum()
        if not tree.total:
            continue
        mass = np.concatenate([rng.random(50) * tree.total, np.unique(naive.cumsum())[:-1], [0.0]])
        mass = mass[mass < tree.total]
        expected = [next(i for i in range(size) if m < naive[: i + 1].sum()) for m in mass]
        assert tree.find(mass).tolist() == expected


def test_a_row_of_weight_zero_is_never_found() -> None:
    # Thirds do not sum exactly; a mass just below the total must still find a row that has some.
    tree = SumTree(100)
    tree.set(np.arange(50), np.full(50, 1 / 3))
    assert tree.find(np.array([np.nextafter(tree.total, 0), tree.total])).max() == 49


def row(number: int) -> TensorDict:
    pixels = torch.zeros(9, 2, 2, dtype=torch.uint8)
    following = {"pixels": pixels, "reward": torch.tensor([float(number)]), "done": torch.tensor([True])}
    return TensorDict({"pixels": pixels, "next": TensorDict(following)})


def replay(sampler: ProportionalSampler, rows: int, capacity: int = 8, batch: int = 4) -> TensorDictReplayBuffer:
    buffer = TensorDictReplayBuffer(
        storage=FrameStackStorage(capacity), sampler=sampler, batch_size=batch,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    if rows:
        buffer.extend(torch.stack([row(i) for i in range(rows)]))
    return buffer


def test_priorities_and_weights_by_hand() -> None:
    # α = ½: |δ| + 1e-5 = 4, 1, ¼ give p = 2, 1, ½. Row 3 is as it came: p = 1, the largest so far.
    sampler = ProportionalSampler(alpha=0.5, beta=0.4)
    buffer = replay(sampler, rows=4, batch=40_000)
    buffer.sample()
    buffer.update_priority(torch.tensor([0, 1, 2]), torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64) - 1e-5)
    p = [2.0, 1.0, 0.5, 1.0]
    assert sampler._tree is not None
    assert sampler._tree.leaves[:5].tolist() == pytest.approx([*p, 0.0])
    # Half of the way β is 0.4 + ½ · 0.6 = 0.7, and w = (p / ½)^−0.7: 4^−0.7, 2^−0.7, 1, 2^−0.7.
    sampler.progress = 0.5
    drawn = buffer.sample()
    weights = torch.tensor([4**-0.7, 2**-0.7, 1.0, 2**-0.7])
    torch.testing.assert_close(drawn["priority_weight"], weights[drawn["index"]])
    # The same from the definition: N = 4, Σ p = 4.5, w = (N P(i))^−β over the largest.
    raw = torch.tensor([(4 * v / 4.5) ** -0.7 for v in p])
    torch.testing.assert_close(drawn["priority_weight"], (raw / raw.max())[drawn["index"]])
    count = torch.bincount(drawn["index"], minlength=8)
    assert count[4:].sum() == 0
    chi2 = sum((int(count[i]) - 40_000 * v / 4.5) ** 2 / (40_000 * v / 4.5) for i, v in enumerate(p))
    assert chi2 < 16.3  # 0.1 % of χ² with three degrees of freedom lies above
    # A new row gets the largest p so far, 2.
    buffer.extend(row(4)[None])
    buffer.sample()
    assert sampler._tree.leaves[:5].tolist() == pytest.approx([*p, 2.0])
    # Of a row that was drawn twice the last |δ| counts; one that is not finite changes nothing.
    buffer.update_priority(torch.tensor([1, 1, 0]), torch.tensor([9.0, 16.0, math.nan]))
    assert sampler._tree.leaves[:2].tolist() == pytest.approx([2.0, 4.0])


def test_weights_are_over_the_largest_of_the_batch() -> None:
    # Row 0 has the largest weight of all, (1/1e-3)^0.4 times the others', and is in hardly any batch.
    sampler = ProportionalSampler(alpha=1.0)
    buffer = replay(sampler, rows=8)
    buffer.sample()
    buffer.update_priority(torch.arange(8), torch.tensor([1e-3, *[1.0] * 7]))
    for _ in range(5):
        drawn = buffer.sample()
        assert (drawn["index"] > 0).all()
        assert (drawn["priority_weight"] == 1).all()


def test_rows_that_are_overwritten_begin_anew() -> None:
    sampler = ProportionalSampler(alpha=1.0)
    buffer = replay(sampler, rows=8)
    buffer.sample()
    buffer.update_priority(torch.arange(8), torch.full((8,), 0.25))
    buffer.extend(torch.stack([row(8), row(9)]))
    buffer.sample()
    assert sampler._tree is not None
    assert sampler._tree.leaves.tolist() == pytest.approx([1, 1, *[0.25] * 6], rel=1e-4)


def test_exponent_0_is_uniform_sampling() -> None:
    # Not the same draws as RandomSampler's, which takes integers from the generator and not shares of Σ p; but row
    # ⌊u N⌋ for the uniform u that is drawn, and every weight exactly 1.
    sampler = ProportionalSampler(alpha=0.0)
    buffer = replay(sampler, rows=6, batch=30_000)
    for _ in range(3):
        state = sampler._rng.get_state()  # type: ignore[union-attr]
        drawn = buffer.sample()
        u = torch.rand(30_000, dtype=torch.float64, generator=torch.Generator().set_state(state))
        assert torch.equal(drawn["index"], (u * 6).long())
        assert (drawn["priority_weight"] == 1).all()
        buffer.update_priority(drawn["index"], torch.rand(30_000) * 100)
    count = torch.bincount(drawn["index"])
    assert ((count - 5000) ** 2 / 5000).sum() < 20.5  # 0.1 % of χ² with five degrees of freedom lies above


@pytest.mark.parametrize("drawn_before", [False, True])
def test_a_resumed_sampler_draws_the_same(drawn_before: bool) -> None:
    def use(buffer: TensorDictReplayBuffer, first: int) -> list[Any]:
        drawn = []
        for i in range(first, first + 6):
            batch = buffer.sample()
            drawn += [batch["index"], batch["priority_weight"]]
            buffer.update_priority(batch["index"], (batch["index"] + i) * 0.37)
            buffer.extend(row(i)[None])
        return drawn

    buffer = replay(ProportionalSampler(), rows=5)
    if drawn_before:
        use(buffer, 5)
    state, rng = buffer.sampler.state_dict(), buffer._rng.get_state()
    resumed = replay(ProportionalSampler(), rows=0)
    resumed.storage.set(range(8 if drawn_before else 5), buffer.storage.get(range(8 if drawn_before else 5)))
    resumed.sampler.load_state_dict(state)
    resumed._rng.set_state(rng)
    resumed._writer.load_state_dict(buffer._writer.state_dict())
    for mine, theirs in zip(use(resumed, 20), use(buffer, 20), strict=True):
        assert torch.equal(mine, theirs)
    assert resumed.sampler._largest == buffer.sampler._largest > 1
    assert np.array_equal(resumed.sampler._tree._nodes, buffer.sampler._tree._nodes)


@pytest.mark.parametrize(("name", "value"), [("alpha", -0.1), ("alpha", 1.5), ("beta", 2.0)])
def test_wrong_values(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"data\.sampler\.{name} is {value}"):
        ProportionalSampler(**{name: value})
