"""Windows of consecutive transitions against a naive version that knows every row."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tensordict import TensorDict

from covr_lightning.agent import CURL, SPR
from covr_lightning.data.frame_storage import FrameStackStorage
from covr_lightning.data.sequences import SequenceSampler
from covr_lightning.envs import EnvSpec
from covr_lightning.errors import ConfigError
from tests.data.episodes import Episodes

SPEC = EnvSpec("cartpole-swingup", 6, 6, 3, 2, 100, 1000)


def steps(episodes: Episodes, n: int) -> list[TensorDict]:
    rows = [episodes.step() for _ in range(n)]
    for row in rows:
        row["next", "terminated"] = row["next", "done"] & (row["action"][:1] % 2 == 0)
        row["next", "truncated"] = row["next", "done"] & ~row["next", "terminated"]
    return rows


def naive_windows(rows: list[TensorDict], capacity: int, length: int) -> list[list[int]]:
    """Running numbers of every window: each environment's rows one after another, episode by episode."""
    windows = []
    for env in {int(row["env"]) for row in rows}:
        episode: list[int] = []
        for number, row in enumerate(rows):
            if int(row["env"]) != env:
                continue
            episode.append(number)
            window = episode[-length:]
            if len(window) == length and window[0] >= len(rows) - capacity:
                windows.append(window)
            if bool(row["next", "done"]):
                episode = []
    return sorted(windows, key=lambda window: window[-1])


@pytest.mark.parametrize(("capacity", "envs", "length"), [(200, 1, 4), (40, 1, 4), (40, 3, 3), (40, 2, 1)])
def test_windows_are_those_of_a_naive_version(capacity: int, envs: int, length: int) -> None:
    episodes, storage = Episodes(seed=3, mean_length=6, envs=envs), FrameStackStorage(capacity)
    rows: list[TensorDict] = []
    sampler = SequenceSampler(storage, length, 16, seed=0)
    for _ in range(30):
        new = steps(episodes, 4)
        storage.set([(len(rows) + i) % capacity for i in range(4)], torch.stack(new))
        rows += new
        windows = naive_windows(rows, capacity, length)
        position = sampler.ends()
        assert sorted(storage.column("row_id")[position].tolist()) == [window[-1] for window in windows]
        got = storage.column("row_id")[sampler._windows(position)].tolist()
        assert sorted(got, key=lambda window: window[-1]) == windows
    assert len(windows) > 10


def test_what_a_window_holds() -> None:
    episodes, storage = Episodes(seed=1, mean_length=6, envs=2), FrameStackStorage(40)
    rows = steps(episodes, 70)
    for i, row in enumerate(rows):
        storage.set(i % 40, row)
    drawn = SequenceSampler(storage, 3, 200, seed=0).sample()
    assert drawn["pixels"].dtype == torch.uint8
    assert drawn["pixels"].shape == (200, 4, 9, 6, 6)
    starts = set()
    for window in drawn.unbind(0):
        first = int(window["reward"][0]) - 1  # rewards are numbered
        own = [row for row in rows[first:] if row["env"] == rows[first]["env"]][:3]
        for t, row in enumerate(own):
            assert torch.equal(window["pixels"][t], row["pixels"])
            assert torch.equal(window["pixels"][t + 1], row["next", "pixels"])
            assert torch.equal(window["action"][t], row["action"])
            assert torch.equal(window["reward"][t], row["next", "reward"])
            assert torch.equal(window["terminated"][t], row["next", "terminated"])
        assert not any(row["next", "done"] for row in own[:2])
        starts.add(first)
    assert starts == {window[0] for window in naive_windows(rows, 40, 3)}


@pytest.mark.parametrize(("mean_length", "most_rows_end_one"), [(30, True), (4, False)])
def test_all_windows_are_as_likely_and_the_generator_decides(mean_length: float, most_rows_end_one: bool) -> None:
    episodes, storage = Episodes(seed=5, mean_length=mean_length), FrameStackStorage(60)
    rows = steps(episodes, 60)
    storage.set(range(60), torch.stack(rows))
    sampler = SequenceSampler(storage, 4, 20_000, seed=7)
    count = torch.bincount(sampler.sample()["reward"][:, 0, 0].long() - 1, minlength=60)
    windows = naive_windows(rows, 60, 4)
    assert (len(windows) > 35) == most_rows_end_one  # above half, twice as many draws as are needed hold enough
    assert most_rows_end_one or len(windows) < 25
    expected = 20_000 / len(windows)
    chi2 = sum((int(count[w[0]]) - expected) ** 2 / expected for w in windows)
    degrees = len(windows) - 1
    assert int(count.sum()) == sum(int(count[w[0]]) for w in windows)
    assert abs(chi2 - degrees) < 4 * (2 * degrees) ** 0.5  # mean and standard deviation of χ²

    resumed = SequenceSampler(storage, 4, 20_000, seed=0)
    resumed.load_state_dict(sampler.state_dict())
    second = sampler.sample()["reward"]
    assert torch.equal(resumed.sample()["reward"], second)
    assert not torch.equal(sampler.sample()["reward"], second)


def test_a_cut_episode_ends_windows() -> None:
    storage = FrameStackStorage(20)
    rows = steps(Episodes(0, 1e9), 8)
    storage.set(range(4), torch.stack(rows[:4]))
    storage.cut_episode()
    storage.set(range(4, 8), torch.stack(rows[4:]))
    assert SequenceSampler(storage, 3, 4, seed=0).ends().tolist() == [2, 3, 6, 7]


def test_no_window_yet() -> None:
    storage = FrameStackStorage(20)
    storage.set(range(3), torch.stack(steps(Episodes(0, 1e9), 3)))
    drawn = SequenceSampler(storage, 4, 5, seed=0).sample()
    assert drawn.batch_size == (0,)
    assert drawn["pixels"].shape == (0, 5, 9, 6, 6)


def test_the_most_demanding_objective_decides() -> None:
    storage = FrameStackStorage(20)
    assert SequenceSampler.needed_by([CURL()], storage, SPEC, 0) is None
    sampler = SequenceSampler.needed_by([CURL(), SPR(3, sequences=8), SPR(5, sequences=2)], storage, SPEC, 0)
    assert sampler is not None
    assert (sampler.length, sampler.count) == (5, 8)
    with pytest.raises(ConfigError, match=r"SPR .* looks at 11 agent steps in a row, but an episode has 10 \(data"):
        SequenceSampler.needed_by([SPR(11)], storage, SPEC, 0)
    long = dataclasses.replace(SPEC, episode_env_steps=10_000)
    with pytest.raises(ConfigError, match=r"21 agent steps in a row, but a process's replay holds 20 \(data\.rep"):
        SequenceSampler.needed_by([SPR(21)], storage, long, 0)
