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


def test_a_run_tells_it_how_long_an_episode_is() -> None:
    spec = EnvSpec("cartpole-swingup", 4, 4, 3, 1, 7, 1000)  # 1,000 environment steps, 7 an agent step
    sampler = EmphasizingRecentSampler()
    make_replay(100, 4, spec, sampler, torch.device("cpu"), 0)
    assert sampler.episode_agent_steps == 143


def test_c_k_of_an_episode_by_hand() -> None:
    # N = 100, K = 10, η = 0.99 + ½ · 0.01 = 0.995 half of the way: 0.995^100 = 0.605770 a step, so 100, 60, 36, 22, 13,
    # 8 of 100, never below 10.
    sampler = EmphasizingRecentSampler(eta=0.99, c_min=10)
    sampler.progress, sampler.episode_agent_steps = 0.5, 10
    buffer = replay(sampler, capacity=100)
    for _ in range(3):  # three episodes of 50; the ring is full
        buffer.extend(torch.stack([row(done=i == 49) for i in range(50)]))
    expected = [100, 60, 36, 22, 13, 10]
    for k in range(6):
        buffer.extend(row()[None])
        assert sampler.newest(buffer.storage) == expected[k]
        drawn = buffer.storage.column("row_id")[buffer.sample()["index"]]
        newest = 150 + k
        assert set(drawn.tolist()) == set(range(newest - expected[k] + 1, newest + 1))
    buffer.extend(row(done=True)[None])
    buffer.extend(row()[None])  # a new episode begins with all rows
    assert sampler.newest(buffer.storage) == 100


def test_fewer_rows_than_c_k() -> None:
    sampler = EmphasizingRecentSampler(eta=0.99, c_min=10)
    sampler.episode_agent_steps = 10
    buffer = replay(sampler, capacity=100)
    buffer.extend(torch.stack([row()] * 3))
    assert sampler.newest(buffer.storage) == 3  # 100 · 0.99^200 = 13.4, of 3
    buffer.extend(torch.stack([row()] * 20))
    assert sampler.newest(buffer.storage) == 10  # below c_min: 0.99^2200
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("covr_lightning.processes.count", lambda: 4)
        assert sampler.newest(buffer.storage) == 3  # 12 of the whole run
    of_rows = EmphasizingRecentSampler(eta=0.99, c_min=1, n="rows")
    of_rows.episode_agent_steps = 220
    assert of_rows.newest(buffer.storage) == 8  # 23 · 0.99^100 = 8.42


def test_the_newest_rows_environment_gives_k() -> None:
    sampler = EmphasizingRecentSampler(eta=0.99, c_min=1)
    sampler.episode_agent_steps = 10
    buffer = replay(sampler, capacity=100)
    buffer.extend(torch.stack([row(env=env) for env in (0, 1) * 50]))
    buffer.extend(torch.stack([row(env=0, done=True), row(env=1)]))
    buffer.extend(torch.stack([row(env=0)]))
    assert sampler.newest(buffer.storage) == 100  # environment 0 has begun anew
    buffer.extend(torch.stack([row(env=1)]))
    assert sampler.newest(buffer.storage) == 1  # k = 51


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
