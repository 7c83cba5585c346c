"""EDDF, RALW, the loss, the schedules and the returns against hand arithmetic and naive versions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase

from covr_lightning.counters import Counters
from covr_lightning.errors import ConfigError
from covr_lightning.finetune import (
    EDDF,
    RALW,
    EpisodeBuffer,
    GivenSchedule,
    LinearSchedule,
    NeverSchedule,
    PrintedSchedule,
    RandomSubset,
    RandomWeight,
    ScoreAsWeight,
    TopFraction,
    ralw_loss,
)

# -- EDDF ----------------------------------------------------------------------------------------------------------


def numpy_eddf(g: np.ndarray, entropy: float, sign: float = 1.0, z_score: bool = True) -> np.ndarray:
    x = (g - g.mean()) / g.std() if z_score else g
    q1, median, q3 = np.percentile(x, [25, 50, 75])
    return x > median + (q3 - q1) / (1 + np.exp(-sign * entropy))


def test_eddf_of_a_hand_made_buffer() -> None:
    # g = 0 … 4: median 2, quartiles 1 and 3, IQR 2. ε = 0: σ = 0.5, τ = 2 + 0.5·2 = 3, so only 4 exceeds it.
    g = torch.arange(5.0)
    assert EDDF().keep(g, 0.0).tolist() == [False, False, False, False, True]
    # τ = 3 as a z-score is (3 − 2)/√2; turned back it is 3 again.
    assert EDDF().threshold(g, 0.0) == pytest.approx(3.0)
    # ε = −10: σ ≈ 0, τ ≈ the median 2, so 3 and 4 exceed it. The prose's sign makes it σ ≈ 1, τ ≈ 4: none.
    assert EDDF().keep(g, -10.0).tolist() == [False, False, False, True, True]
    assert EDDF(sign="prose").keep(g, -10.0).sum() == 1  # 4 > 3.99991 = 2 + 2·σ(10)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("sign", ["printed", "prose"])
def test_eddf_equals_numpy_and_ignores_z_scoring(seed: int, sign: str) -> None:
    rng = np.random.default_rng(seed)
    g = rng.gamma(2.0, 30.0, size=int(rng.integers(2, 700))).astype(np.float32)
    entropy = float(rng.normal(0, 3))
    s = 1.0 if sign == "printed" else -1.0
    kept = EDDF(sign=sign).keep(torch.from_numpy(g), entropy).numpy()  # type: ignore[arg-type]
    double = g.astype(np.float64)
    np.testing.assert_array_equal(kept, numpy_eddf(double, entropy, s))
    # Affine invariance: raw returns against τ(raw), and z-scores of any a·g + b, keep the same rows.
    np.testing.assert_array_equal(kept, numpy_eddf(double, entropy, s, z_score=False))
    moved = torch.from_numpy(double * 3.5 - 200)
    np.testing.assert_array_equal(kept, EDDF(sign=sign).keep(moved, entropy).numpy())  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(20))
def test_ablation_m5_keeps_the_rows_of_eddf(seed: int) -> None:
    """Z-scoring is affine, so leaving it out changes nothing; comparing raw returns with τ of z-scores does."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(500, generator=generator).exp() * 40 - 30
    entropy = float(torch.randn((), generator=generator) * 3)
    kept, m5, raw = (EDDF(compare=how).keep(g, entropy) for how in ("z", "unscaled", "raw"))  # type: ignore[arg-type]
    assert torch.equal(kept, m5)
    assert 0 < int(kept.sum()) < 250
    assert not torch.equal(kept, raw)
    assert EDDF(compare="unscaled").threshold(g, entropy) == pytest.approx(EDDF().threshold(g, entropy))
    # By NumPy, in the returns' own unit.
    np.testing.assert_array_equal(m5.numpy(), numpy_eddf(g.double().numpy(), entropy, z_score=False))


def test_eddf_raw_compares_raw_returns_with_the_threshold_of_z_scores() -> None:
    g = torch.tensor([5.0, 6.0, 7.0, 50.0])  # every raw return is above any threshold of z-scores
    assert EDDF(compare="raw").keep(g, 0.0).all()
    assert not EDDF().keep(g, 0.0).all()
    # 0 … 4 have z's IQR 2/√2, of which ε = 0 takes half: τ(z) = 1/√2, below which the third of these is.
    between = torch.tensor([-1.33, -0.33, 0.67, 1.67, 2.67])
    assert EDDF(compare="raw").keep(between, 0.0).tolist() == [False, False, False, True, True]
    # z of 5, 5, 5, 1 is ±1/√3 and −√3, so median 0.577, quartiles −0 and 0.577: τ(z) = 0.577 + 0.5·0.577 = 0.866 < 1.
    raw, saturated = EDDF(compare="raw"), torch.tensor([5.0, 5.0, 5.0, 1.0])
    assert raw.keep(saturated, 0.0).all()
    assert raw.threshold(saturated, 0.0) == pytest.approx(0.866, abs=1e-3)
    assert EDDF().keep(saturated, 0.0).tolist() == [True, True, True, False]


@pytest.mark.parametrize(("g", "kept"), [([], 0), ([3.0], 1), ([2.0] * 9, 9)])
@pytest.mark.parametrize("compare", ["z", "raw", "unscaled"])
def test_eddf_of_empty_single_and_equal_buffers(g: list[float], kept: int, compare: str) -> None:
    mask = EDDF(compare=compare).keep(torch.tensor(g), 1.0)  # type: ignore[arg-type]
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == kept
    assert math.isnan(EDDF().threshold(torch.tensor(g), 1.0)) == (len(g) == 0)


@pytest.mark.parametrize("compare", ["z", "unscaled"])
@pytest.mark.parametrize("others", [[0.0, 0.5], [0.0, 0.2, 0.5, 0.7]])
def test_eddf_keeps_the_best_rows_where_half_are_the_best(compare: str, others: list[float]) -> None:
    # Of nine rows seven or five have the highest score, so the median is that score; the first quartile is with seven.
    g = torch.tensor([1.0] * 3 + others + [1.0] * (6 - len(others)))
    filter_ = EDDF(compare=compare)  # type: ignore[arg-type]
    assert filter_.keep(g, -3.0).tolist() == (g == 1).tolist()
    assert filter_.threshold(g, -3.0) == pytest.approx(1.0)
    # Eq. 5 to the letter keeps none.
    assert not numpy_eddf(g.double().numpy(), 3.0).any()
    g[0] = 0.1  # as many as before less one: six of nine still, or four, where the median is below
    kept = filter_.keep(g, 3.0)
    assert kept.tolist() == (g == 1).tolist() if len(others) == 2 else not kept.any()


def test_other_filters() -> None:
    g = torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0])
    assert TopFraction(0.4).keep(g, 0.0).tolist() == [False, True, False, True, False]
    assert TopFraction(0.5).keep(torch.tensor([1.0, 2.0, 2.0, 2.0]), 0.0).tolist() == [False, True, True, False]
    assert int(TopFraction(0.55).keep(torch.arange(100.0), 0.0).sum()) == 55
    assert int(TopFraction(0.55).keep(torch.arange(101.0), 0.0).sum()) == 56
    assert int(RandomSubset(TopFraction(0.4)).keep(g, 0.0).sum()) == 2
    for bad in (0.0, 1.5):
        with pytest.raises(ConfigError, match="fraction"):
            TopFraction(bad)
    with pytest.raises(ConfigError, match="'printed' or 'prose'"):
        EDDF(sign="both")  # type: ignore[arg-type]


def test_scores_as_weights_are_not_negative() -> None:
    assert ScoreAsWeight()(torch.tensor([0.0, 2.5])).tolist() == [0.0, 2.5]
    for bad in (-1.0, math.nan):
        with pytest.raises(ConfigError, match=rf"ScoreAsWeight .* got the score {bad:g}; .* 0 or more"):
            ScoreAsWeight()(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("part", [RandomSubset(TopFraction(0.3)), RandomWeight(seed=5)])
def test_what_a_round_draws_follows_from_its_seed(part: RandomSubset | RandomWeight) -> None:
    def draw(seed: int) -> list[float]:
        part.reseed(seed)
        scores = torch.arange(100.0)
        return (part.keep(scores, 0.0) if isinstance(part, RandomSubset) else part(scores)).tolist()

    first = draw(1)
    assert draw(2) != first
    assert draw(1) == first  # as in a run that was resumed before the round
    assert all(0 <= one <= 1 for one in first)


@pytest.mark.parametrize("kind", [lambda seed: RandomSubset(TopFraction(0.3), seed), RandomWeight])
def test_a_seed_of_ones_own_gives_other_draws(kind: Callable[[int], RandomSubset | RandomWeight]) -> None:
    def drawn(seed: int) -> list[float]:
        part, scores = kind(seed), torch.arange(100.0)
        part.reseed(1)
        return (part.keep(scores, 0.0) if isinstance(part, RandomSubset) else part(scores)).tolist()

    assert drawn(0) == drawn(0) != drawn(5)


def test_a_filter_inside_another_begins_the_round_too() -> None:
    begun: list[int] = []

    class Noted(TopFraction):
        def reseed(self, seed: int) -> None:
            begun.append(seed)

    RandomSubset(Noted(0.5)).reseed(7)
    assert begun == [7]


# -- RALW ----------------------------------------------------------------------------------------------------------


def test_ralw_weights_by_hand() -> None:
    # 10, 20, 25, 30 → 2·(g − 10)/20 − 1 = −1, 0, 0.5, 1 → 0, 0, 0.5, 1.
    assert RALW()(torch.tensor([10.0, 20.0, 25.0, 30.0])).tolist() == [0.0, 0.0, 0.5, 1.0]
    # Mapped to [0, 1]: 0, 0.5, 0.75, 1; to [−0.5, 1]: −0.5, 0.25, 0.625, 1.
    assert RALW(lowest=0.0)(torch.tensor([10.0, 20.0, 25.0, 30.0])).tolist() == [0.0, 0.5, 0.75, 1.0]
    assert RALW(lowest=-0.5)(torch.tensor([10.0, 20.0, 25.0, 30.0])).tolist() == [0.0, 0.25, 0.625, 1.0]
    with pytest.raises(ConfigError, match=r"RALW's lowest is 1.0; it must lie in -1 to 1"):
        RALW(lowest=1.0)
    assert RALW()(torch.tensor([7.0, 7.0])).tolist() == [1.0, 1.0]
    assert RALW()(torch.tensor([])).tolist() == []


def naive_ralw(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, eps: float) -> torch.Tensor:
    total, n_v = torch.zeros(()), 0
    for b in range(logits.shape[0]):
        for t in range(logits.shape[1] - 1):
            y = int(labels[b, t + 1])
            if y == -100:
                continue
            n_v += 1
            log_p = logits[b, t] - torch.logsumexp(logits[b, t], 0)
            total = total + weights[b] * ((1 - eps) * -log_p[y] + eps * (-log_p).mean())
    return total / n_v


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_ralw_equals_a_double_loop_in_value_and_gradient(eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, 11, generator=generator)
    labels = torch.randint(0, 11, (5, 7), generator=generator)
    labels[:, :3] = -100
    labels[1, 5:] = -100
    weights = torch.tensor([0.0, 0.3, 1.0, 0.0, 0.7])
    ours, naive = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, reference = ralw_loss(ours, labels, weights, eps), naive_ralw(naive, labels, weights, eps)
    loss.backward()
    reference.backward()
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(ours.grad, naive.grad)
    assert ours.grad is not None
    assert not ours.grad[0].any()  # weight 0: not trained


def test_n_v_counts_the_tokens_of_zero_weight_rows() -> None:
    # Two rows, one label token each, uniform logits over V = 4: −log p = log 4. Weights 1 and 0, N_v = 2.
    labels = torch.tensor([[-100, 2], [-100, 1]])
    loss = ralw_loss(torch.zeros(2, 2, 4), labels, torch.tensor([1.0, 0.0]), 0.0)
    assert loss.item() == pytest.approx(math.log(4) / 2)
    assert ralw_loss(torch.zeros(1, 2, 4), torch.full((1, 2), -100), torch.ones(1)).item() == 0.0


# -- schedules -----------------------------------------------------------------------------------------------------


def test_rounds_of_the_schedules() -> None:
    assert LinearSchedule(psi0_env_steps=5000).rounds(100_000) == [5000, 15000, 30000, 50000, 75000]
    assert PrintedSchedule(psi0_env_steps=5000).rounds(100_000) == [5000, 15000, 45000]
    assert NeverSchedule().rounds(100_000) == []
    assert GivenSchedule([2000, 50_000, 120_000]).rounds(100_000) == [2000, 50_000]
    assert GivenSchedule([2000, 50_000]).round_at(2) is None


@pytest.mark.parametrize("steps", [[], [0, 5], [5, 5], [7, 5]])
def test_given_rounds_ascend(steps: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"schedule.at_env_steps is .*; it must be ascending"):
        GivenSchedule(steps)


@pytest.mark.parametrize(
    "schedule", [LinearSchedule(5000), PrintedSchedule(5000), NeverSchedule(), GivenSchedule([9, 1001])]
)
def test_rounds_fire_once_each_and_never_at_step_0(schedule) -> None:
    counters, fired = Counters(), []
    for env_steps in range(0, 100_001, 8):
        counters.env_steps = env_steps
        if schedule.due(counters):
            fired.append(env_steps)
            counters.rounds += 1
    assert fired == [-(-at // 8) * 8 for at in schedule.rounds(100_000)]
    assert not schedule.due(Counters())


# -- returns -------------------------------------------------------------------------------------------------------


def transition(reward: float, terminated: bool = False, truncated: bool = False) -> TensorDict:
    next_ = TensorDict(
        {
            "pixels": torch.full((9, 2, 2), int(reward) + 1, dtype=torch.uint8),
            "reward": torch.tensor([reward]),
            "terminated": torch.tensor([terminated]),
            "truncated": torch.tensor([truncated]),
        }
    )
    pixels = torch.full((9, 2, 2), int(reward), dtype=torch.uint8)
    return TensorDict({"pixels": pixels, "action": torch.tensor([reward]), "next": next_})


def test_returns_of_hand_made_episodes() -> None:
    buffer = EpisodeBuffer(gamma=0.5)
    for reward, ends in ((1.0, {}), (2.0, {}), (4.0, {"truncated": True}), (3.0, {}), (8.0, {"terminated": True})):
        buffer.add(transition(reward, **ends))
    # First episode: 4; 2 + 0.5·4 = 4; 1 + 0.5·4 = 3. Second: 8; 3 + 0.5·8 = 7.
    assert buffer.rows()["g"].flatten().tolist() == [3.0, 4.0, 4.0, 7.0, 8.0]
    assert buffer.rows()["frame"].shape == (5, 3, 2, 2)


def test_returns_of_two_environments_in_turns() -> None:
    buffer = EpisodeBuffer(gamma=0.5)
    for env, reward, ends in ((0, 1.0, False), (1, 10.0, False), (0, 2.0, True), (1, 20.0, True)):
        buffer.add(transition(reward, terminated=ends), env=env)
    rows = buffer.rows()  # in the order in which episodes ended
    assert rows["g"].flatten().tolist() == [2.0, 2.0, 20.0, 20.0]
    assert rows["action"].flatten().tolist() == [1.0, 2.0, 10.0, 20.0]
    assert rows["frame"][:, 0, 0, 0].tolist() == [1, 2, 10, 20]  # a frame's value is its reward's


def test_a_row_s_picture_may_show_several_frames() -> None:
    buffer = EpisodeBuffer(frames=3)
    row = transition(1.0, terminated=True)
    row["pixels"] = torch.arange(9, dtype=torch.uint8)[:, None, None].expand(9, 2, 2)
    buffer.add(row)
    picture = buffer.rows()["frame"]
    assert picture.shape == (1, 3, 2, 6)
    assert picture[0, :, 1, ::2].tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]  # channels × moments, the newest last
    with pytest.raises(ConfigError, match=r"vlm\.frames is 1, but the checkpoint's run showed its VLM 3"):
        EpisodeBuffer().load_state_dict(buffer.state_dict())


def test_bootstrap_follows_a_time_limit_but_no_terminal() -> None:
    buffer = EpisodeBuffer(gamma=0.5, value_after=lambda _: 10.0)
    buffer.add(transition(1.0, truncated=True))
    buffer.add(transition(1.0, terminated=True))
    buffer.add(transition(1.0, terminated=True, truncated=True))
    assert buffer.rows()["g"].flatten().tolist() == [6.0, 1.0, 1.0]


def ten_times_what_is_seen(led_to: TensorDictBase) -> float:
    """A value that tells which transition was asked about: 10 times the pixels there, plus the action."""
    return 10.0 * int(led_to["next", "pixels"].max()) + float(led_to["action"])


CUT = [
    (ten_times_what_is_seen, [8.125, 14.25, 24.5]),  # 10·4 + 3 follows: 3 + 0.5·43, 2 + 0.5·24.5, 1 + 0.5·14.25
    (None, [2.75, 3.5, 3.0]),  # 3, 2 + 0.5·3, 1 + 0.5·3.5
]


@pytest.mark.parametrize(("value_after", "returns"), CUT)
@pytest.mark.parametrize("saved", ["no", "and taken back", "and shared out"])
def test_a_cut_episode_is_truncated_where_it_was_cut(value_after, returns: list[float], saved: str) -> None:
    buffer = EpisodeBuffer(0.5, value_after)
    for reward in (1.0, 2.0, 3.0):
        buffer.add(transition(reward))
        buffer.add(transition(7.0), env=1)
    if saved != "no":
        before, buffer = buffer, EpisodeBuffer(0.5, value_after)
        if saved == "and shared out":
            buffer.load_share([before.state_dict()], 0, 2)  # the first episode is the first one's, the other another's
        else:
            buffer.load_state_dict(before.state_dict())
    buffer.cut_episode(0)
    buffer.cut_episode(7)  # an environment without an open episode
    assert buffer.open_rows == (0 if saved == "and shared out" else 3)
    assert buffer.rows()["g"].flatten().tolist() == returns


def test_rows_of_a_cut_whose_returns_nobody_knows_are_dropped() -> None:
    """With a checkpoint of before 29 November 2026, which did not say what open episodes had led to."""
    buffer, resumed = (EpisodeBuffer(0.5, ten_times_what_is_seen) for _ in range(2))
    buffer.add(transition(1.0))
    state = buffer.state_dict()
    del state["newest"]
    resumed.load_state_dict(state)
    resumed.cut_episode()
    assert (len(resumed), resumed.open_rows) == (0, 0)


def test_after_the_last_round_open_rows_go_too() -> None:
    buffer = EpisodeBuffer(0.5, ten_times_what_is_seen)
    buffer.add(transition(1.0))
    buffer.clear(open_too=True)
    assert buffer.state_dict() == {"frames": 1, "finished": [], "open": {}, "newest": {}}


def test_an_episode_that_spans_a_round_keeps_its_rows() -> None:
    buffer = EpisodeBuffer(gamma=1.0)
    buffer.add(transition(5.0, terminated=True))
    buffer.add(transition(1.0))
    assert (len(buffer), buffer.open_rows) == (1, 1)
    buffer.clear()  # a round
    assert (len(buffer), buffer.open_rows) == (0, 1)
    restored = EpisodeBuffer(gamma=1.0)
    restored.load_state_dict(buffer.state_dict())
    for each in (buffer, restored):
        each.add(transition(2.0, truncated=True))
        assert each.rows()["g"].flatten().tolist() == [3.0, 2.0]  # 1 + 2 and 2: the row from before the round counts
