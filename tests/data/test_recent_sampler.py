"""Emphasizing recent experience: c_k by hand, which rows are drawn, and η = 1 as uniform sampling."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import RandomSampler, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import Sampler

from covr_lightning.data import EmphasizingRecentSampler, FrameStackStorage
from covr_lightning.data.replay import make_replay
from covr_lightning.envs import EnvSpec
from covr_lightning.errors import ConfigError


def row(done: bool = False, env: int = 0) -> TensorDict:
    pixels = torch.zeros(9, 2, 2, dtype=torch.uint8)
    following = TensorDict({"pixels": pixels, "done": torch.tensor([done])})
    return TensorDict({"env": torch.tensor(env), "pixels": pixels, "next": following})


def replay(sampler: Sampler, capacity: int, batch: int = 2000) -> TensorDictReplayBuffer:
    generator = torch.Generator().manual_seed(0)
    return TensorDictReplayBuffer(
        storage=FrameStackStorage(capacity), sampler=sampler, batch_size=batch, generator=generator
    )


def test_a_run_tells_it_how_long_an_episode_can_be() -> None:
    spec = EnvSpec("cartpole-swingup", 4, 4, 3, 1, 7, 1000)  # 1,000 environment steps, 7 an agent step
    sampler = EmphasizingRecentSampler()
    make_replay(100, 4, spec, sampler, torch.device("cpu"), 0)
    assert sampler.episode_agent_steps == 143


def episode(rows: int, env: int = 0) -> TensorDict:
    return torch.stack([row(done=i == rows - 1, env=env) for i in range(rows)])


def test_c_k_of_an_episode_by_hand() -> None:
    # N = 100, K = 10, η = 0.99 + ½ · 0.01 = 0.995 half of the way: 0.995^100 = 0.605770 a step, so 100, 60, 36, 22, 13,
    # 8 of 100, never below 10.
    sampler = EmphasizingRecentSampler(eta=0.99, c_min=10)
    sampler.progress, sampler.run_rows, sampler.episode_agent_steps = 0.5, 100, 1000
    buffer = replay(sampler, capacity=120)
    for _ in range(15):  # the ring is full
        buffer.extend(episode(10))
    expected = [100, 60, 36, 22, 13, 10]
    for k in range(6):
        buffer.extend(row()[None])
        assert sampler.newest(buffer.storage) == expected[k]
        drawn = buffer.storage.column("row_id")[buffer.sample()["index"]]
        newest = 150 + k
        assert set(drawn.tolist()) == set(range(newest - expected[k] + 1, newest + 1))
    buffer.extend(row(done=True)[None])
    buffer.extend(row()[None])  # a new episode begins with all N rows
    assert sampler.newest(buffer.storage) == 100


def test_an_episode_is_expected_to_be_as_long_as_the_one_before() -> None:
    sampler = EmphasizingRecentSampler(eta=0.995, c_min=1, n="capacity")
    sampler.episode_agent_steps = 10
    buffer = replay(sampler, capacity=100)
    buffer.extend(torch.stack([row() for _ in range(5)]))
    assert sampler.newest(buffer.storage) == 5  # 100 · 0.995^400 = 13.5, of 5
    buffer.extend(torch.stack([row() for _ in range(90)] + [row(done=True)]))
    assert sampler.newest(buffer.storage) == 1  # longer than 10: k = 9, 100 · 0.995^900 = 1.1
    buffer.extend(episode(4))
    assert sampler.newest(buffer.storage) == 85  # K = 96, k = 3: 100 · 0.995^31.25 = 85.5; its own end does not count
    for expected in (100, 28, 8, 2, 2, 2):  # K = 4: 0.995^250 = 0.28557 a step, and k = 3 from there on
        buffer.extend(row()[None])
        assert sampler.newest(buffer.storage) == expected
    buffer.extend(torch.stack([row() for _ in range(100)]))
    assert sampler.newest(buffer.storage) == 1  # the episode of four is overwritten: K = 10 again, k = 9


def test_fewer_rows_than_c_k() -> None:
    sampler = EmphasizingRecentSampler(eta=0.99, c_min=10, n="capacity")
    sampler.episode_agent_steps = 10
    buffer = replay(sampler, capacity=100)
    buffer.extend(torch.stack([row()] * 3))
    assert sampler.newest(buffer.storage) == 3  # 100 · 0.99^200 = 13.4, of 3
    buffer.extend(torch.stack([row()] * 20))
    assert sampler.newest(buffer.storage) == 10  # below c_min: 0.99^900
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("covr_lightning.processes.count", lambda: 4)
        assert sampler.newest(buffer.storage) == 3  # 12 of the whole run
    of_rows = EmphasizingRecentSampler(eta=0.99, c_min=1, n="rows")
    of_rows.episode_agent_steps = 220
    assert of_rows.newest(buffer.storage) == 8  # 23 · 0.99^100 = 8.42


def test_a_run_shorter_or_longer_than_the_capacity() -> None:
    buffer = replay(EmphasizingRecentSampler(), capacity=100)
    buffer.extend(torch.stack([row()] * 100))
    for n, run_rows, expected in (("run", 40, 40), ("run", 4000, 100), ("capacity", 40, 100)):
        sampler = EmphasizingRecentSampler(eta=1.0, c_min=1, n=n)  # type: ignore[arg-type]
        sampler.run_rows = run_rows
        assert sampler.newest(buffer.storage) == expected


def test_the_newest_rows_environment_gives_k() -> None:
    sampler = EmphasizingRecentSampler(eta=0.99, c_min=1, n="capacity")
    sampler.episode_agent_steps = 1000
    buffer = replay(sampler, capacity=100)
    buffer.extend(torch.stack([row(env=env) for env in (0, 1) * 50]))
    buffer.extend(torch.stack([row(env=0, done=True), row(env=1)]))
    buffer.extend(torch.stack([row(env=0)]))
    assert sampler.newest(buffer.storage) == 100  # environment 0 has begun anew
    buffer.extend(torch.stack([row(env=1)]))
    assert sampler.newest(buffer.storage) == 59  # k = 51 of 1000: 0.99^51 = 0.5990
    buffer.extend(torch.stack([row(env=0)]))
    assert sampler.newest(buffer.storage) == 82  # k = 1 of 51: 0.99^19.6 = 0.8211


def test_eta_1_is_uniform_sampling_bit_for_bit() -> None:
    recent, uniform = (replay(s, 17, batch=50) for s in (EmphasizingRecentSampler(eta=1.0, c_min=1), RandomSampler()))
    for i in range(40):
        for buffer in (recent, uniform):
            buffer.extend(row(done=i % 7 == 6)[None])
        assert torch.equal(recent.sample()["index"], uniform.sample()["index"])


@pytest.mark.parametrize(("name", "value"), [("eta", 0.0), ("eta", 1.1), ("c_min", 0), ("n", "all")])
def test_wrong_values(name: str, value: float | str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.sampler\.{name} is {value!r}"):
        EmphasizingRecentSampler(**{name: value})  # type: ignore[arg-type]
