"""The sampler of ablations M10 and M11 against a naive version that knows every row."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer

from covr_lightning.cli import main
from covr_lightning.data import FrameStackStorage, ReturnSampler
from covr_lightning.errors import ConfigError
from tests.short_runs import SMALL_SETTINGS


def row(reward: float, done: bool = False, env: int = 0) -> TensorDict:
    pixels = torch.zeros(9, 2, 2, dtype=torch.uint8)
    following = {"pixels": pixels, "reward": torch.tensor([reward]), "done": torch.tensor([done])}
    following["truncated"] = following["done"].clone()
    return TensorDict({"env": torch.tensor(env), "pixels": pixels, "next": TensorDict(following)})


def replay(sampler: ReturnSampler, capacity: int = 10) -> TensorDictReplayBuffer:
    generator = torch.Generator().manual_seed(0)
    return TensorDictReplayBuffer(
        storage=FrameStackStorage(capacity), sampler=sampler, batch_size=100, generator=generator
    )


def test_best_rows_of_hand_made_episodes() -> None:
    sampler = ReturnSampler(share=0.8, top=0.4, gamma=0.5)
    buffer = replay(sampler)

    def add(*rows: TensorDict) -> list[int]:
        buffer.extend(torch.stack(rows))
        return sampler.best(buffer.storage).tolist()

    assert add(row(9.0), row(2.0)) == []  # no episode has ended
    assert (buffer.sample()["index"] < 2).all()  # so the whole batch is uniform
    # g = 9 + 0.5·(2 + 0.5·4) = 11, 2 + 0.5·4 = 4, 4. ⌈0.4·3⌉ = 2 of three, and the 4s tie.
    assert add(row(4.0, done=True)) == [0, 1, 2]
    # g = 6 + 0.5·8 = 10, 8: the best ⌈0.4·5⌉ = 2 of 11, 4, 4, 10, 8; the open row 1000 has no return yet.
    assert add(row(6.0), row(8.0, done=True), row(1000.0)) == [0, 3]
    index = buffer.sample()["index"]
    assert set(index[:80].tolist()) == {0, 3}
    assert set(index[80:].tolist()) == set(range(6))
    # Five rows more; the last one overwrites position 0. g = 4, 4, 10, 8 are left, and 1000, 0, 0, 0, 0 are new: the
    # best ⌈0.4·9⌉ = 4 are 1000, 10, 8 and a 4, which is a tie of two.
    assert add(*[row(0.0)] * 3, row(0.0, done=True), row(5.0)) == [1, 2, 3, 4, 5]


def naive_best(rows: list[tuple[int, float, bool, int]], capacity: int, top: float, gamma: float) -> list[int]:
    """All rows ever written as (position, reward, done, env): each return as the sum that it is, and a sort."""
    returns = {}
    for i, (position, _, _, env) in enumerate(rows):
        later = [row for row in rows[i:] if row[3] == env]
        ends = [k for k, row in enumerate(later) if row[2]]
        returns[position] = (  # a later row at the same position comes later
            sum(gamma**k * later[k][1] for k in range(ends[0] + 1)) if ends else None
        )
    known = sorted((g for g in returns.values() if g is not None), reverse=True)
    if not known:
        return []
    lowest = known[math.ceil(top * len(known)) - 1]
    return sorted(position for position, g in returns.items() if g is not None and g >= lowest)


@pytest.mark.parametrize(("capacity", "envs"), [(200, 1), (23, 1), (200, 3), (23, 2)])
def test_equals_a_naive_version_also_when_it_begins_anew(capacity: int, envs: int) -> None:
    generator = torch.Generator().manual_seed(3)
    sampler = ReturnSampler(top=0.25, gamma=0.5)
    buffer, rows, sizes = replay(sampler, capacity), [], set()
    for _ in range(90):
        reward = float(
            torch.randint(-20, 20, (), generator=generator)
        )  # g is exact in float32 where episodes are short
        done = bool(torch.rand((), generator=generator) < 0.3)
        env = int(torch.randint(0, envs, (), generator=generator))
        rows.append((len(rows) % capacity, reward, done, env))
        buffer.extend(row(reward, done, env)[None])
        expected = naive_best(rows, capacity, 0.25, 0.5)
        assert sampler.best(buffer.storage).tolist() == expected
        resumed = ReturnSampler(top=0.25, gamma=0.5)
        assert resumed.best(buffer.storage).tolist() == expected
        sizes.add(len(expected))
    assert len(sizes) > 3


def test_a_cut_episode_ends_where_it_was_cut() -> None:
    sampler = ReturnSampler(top=1.0, gamma=1.0)
    buffer = replay(sampler)
    buffer.extend(torch.stack([row(1.0), row(2.0)]))
    assert sampler.best(buffer.storage).tolist() == []
    buffer.storage.cut_episode()
    assert sampler.best(buffer.storage).tolist() == [0, 1]
    buffer.extend(row(7.0, done=True)[None])
    assert sampler._g[:3].tolist() == [3.0, 2.0] + [pytest.approx(math.nan, nan_ok=True)]
    assert sampler.best(buffer.storage).tolist() == [0, 1, 2]
    assert sampler._g[:3].tolist() == [3.0, 2.0, 7.0]


def test_the_oldest_row_may_be_the_last_of_an_open_episode() -> None:
    storage = FrameStackStorage(3)
    storage.set(range(3), torch.stack([row(1.0, env=0), row(2.0, env=1), row(3.0, env=1)]))
    storage.cut_episode(0)
    assert storage.column(("next", "truncated")).flatten().tolist() == [True, False, False]
    storage.set(0, row(4.0, env=1))  # where the row was that was cut
    storage.cut_episode(0)
    assert storage.column(("next", "truncated")).flatten().tolist() == [False, False, False]


@pytest.mark.parametrize(
    ("name", "value"), [("share", 1.2), ("share", -0.1), ("top", 0.0), ("top", 2.0), ("gamma", 1.1)]
)
def test_wrong_values(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"data\.sampler\.{name} is {value}"):
        ReturnSampler(**{name: value})


def test_a_run_with_it_and_without_a_vlm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SMALL_SETTINGS | {
        "--runs_dir": str(tmp_path), "--name": "m10", "--vlm.path": "/no/such/folder",  # so nothing loads it
        "--data.sampler": "covr_lightning.data.ReturnSampler", "--data.sampler.share": "0.5", "--model.gamma": "0.8",
        "--model.prior": "covr_lightning.agent.NoPrior",
        "--trainer.callbacks.schedule": "covr_lightning.finetune.NeverSchedule", "--data.max_env_steps": "3000",
    }  # fmt: skip
    asked, best = set(), ReturnSampler.best

    def noted(sampler: ReturnSampler, storage: FrameStackStorage) -> torch.Tensor:
        rows = best(sampler, storage)
        reward, done = (storage.column("next")[key][: len(storage)].reshape(-1) for key in ("reward", "done"))
        if done.any():
            first = reward[: int(done.nonzero()[0]) + 1]
            g = sum(float(r) * 0.8**t for t, r in enumerate(first))
            asked.add(math.isclose(float(sampler._g[0]), g, rel_tol=1e-5))
        return rows

    monkeypatch.setattr(ReturnSampler, "best", noted)
    assert main(["fit", *(part for setting in settings.items() for part in setting)]) == 0
    assert asked == {True}  # the agent's γ
    assert (tmp_path / "m10" / "summary.json").is_file()
    assert not (tmp_path / "m10" / "rounds").exists()
