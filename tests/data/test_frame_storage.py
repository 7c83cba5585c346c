"""The frame ring against a slow reference that stores both full stacks of every transition."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import RandomSampler, TensorDictReplayBuffer

from covr_lightning.data.frame_storage import FrameStackStorage
from tests.data.episodes import Episodes, assert_same


@pytest.mark.parametrize(("mean_length", "envs"), [(2.5, 1), (30.0, 1), (2.5, 3), (30.0, 16)])
def test_equals_a_reference_of_full_stacks_over_20k_pushes(mean_length: float, envs: int) -> None:
    capacity, episodes = 500, Episodes(seed=1, mean_length=mean_length, envs=envs)
    replay = TensorDictReplayBuffer(
        storage=FrameStackStorage(capacity), sampler=RandomSampler(), batch_size=64,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    reference: list[TensorDict] = [None] * capacity  # type: ignore[list-item]
    chunk_sizes = torch.Generator().manual_seed(2)
    pushed = checks = 0
    while pushed < 20_000:
        n = int(torch.randint(1, 8, (), generator=chunk_sizes))
        chunk = [episodes.step() for _ in range(n)]
        for i, row in enumerate(chunk):
            reference[(pushed + i) % capacity] = row
        replay.extend(torch.stack(chunk))
        pushed += n
        if pushed % 50 < n:
            sample = replay.sample()
            assert_same(sample, torch.stack([reference[i] for i in sample["index"].tolist()]))
            checks += 64
    filled = replay.storage.get(torch.arange(capacity))
    assert_same(filled, torch.stack(reference))
    assert checks > 20_000


def test_stack_of_a_hand_made_episode() -> None:
    # Frames 0, 1, 2 (episode A, two transitions), 3, 4 (episode B, one): every stack written out.
    def stack(*numbers: int) -> torch.Tensor:
        return torch.cat([torch.full((3, 2, 2), n, dtype=torch.uint8) for n in numbers])

    def row(before: torch.Tensor, after: torch.Tensor, done: bool) -> TensorDict:
        return TensorDict({"pixels": before, "next": TensorDict({"pixels": after, "done": torch.tensor([done])})})

    storage = FrameStackStorage(10)
    rows = [
        row(stack(0, 0, 0), stack(0, 0, 1), False),
        row(stack(0, 0, 1), stack(0, 1, 2), True),
        row(stack(3, 3, 3), stack(3, 3, 4), False),
    ]
    storage.set(range(3), torch.stack(rows))
    got = storage.get([0, 1, 2])
    assert torch.equal(got["pixels"], torch.stack([r["pixels"] for r in rows]))
    assert torch.equal(got["next", "pixels"], torch.stack([r["next", "pixels"] for r in rows]))
    assert storage.newest_frames(torch.tensor([1, 2]))[:, 0, 0, 0].tolist() == [1, 3]
    assert storage.newest_frames(torch.tensor([1, 2]), 2)[:, ::3, 0, 0].tolist() == [[0, 1], [3, 3]]
    assert storage._written == 5  # five frames for three transitions


def test_bytes_per_transition_stays_below_one_and_a_half_frames(capsys: pytest.CaptureFixture[str]) -> None:
    storage = FrameStackStorage(1000)
    pixels = torch.zeros(125, 9, 84, 84, dtype=torch.uint8)
    done = torch.zeros(125, 1, dtype=torch.bool)
    done[-1] = True
    nested = TensorDict({"pixels": pixels, "done": done, "reward": torch.zeros(125, 1)}, [125])
    storage.set(range(125), TensorDict({"pixels": pixels, "action": torch.zeros(125, 6), "next": nested}, [125]))
    frame = 3 * 84 * 84
    with capsys.disabled():
        print(f"\nreplay: {storage.bytes_per_transition():.0f} bytes a transition at 84×84; one frame is {frame}")
    assert storage.bytes_per_transition() <= 1.5 * frame


def test_late_labels_find_their_row_or_find_it_overwritten() -> None:
    episodes, storage = Episodes(0, 10), FrameStackStorage(4)
    for t in range(6):
        row = episodes.step()
        row["label"] = torch.zeros(1)
        storage.set(t % 4, row)
    position, alive = storage.position_of(torch.tensor([1, 2, 5]))
    assert alive.tolist() == [False, True, True]  # rows 0 and 1 gave way to 4 and 5
    storage.write_column("label", position[alive], torch.ones(2, 1))
    assert storage.get(range(4))["label"].flatten().tolist() == [0.0, 1.0, 1.0, 0.0]  # slots 4→0, 5→1, 2→2, 3→3


def test_cutting_an_episode_leaves_those_of_other_environments_alone() -> None:
    def row(env: int, number: int, done: bool = False) -> TensorDict:
        def frames(n: int) -> torch.Tensor:
            return torch.full((9, 2, 2), n, dtype=torch.uint8)

        flags = {"done": torch.tensor([done]), "truncated": torch.tensor([False])}
        after = TensorDict({"pixels": frames(number + 1), **flags})
        return TensorDict({"env": torch.tensor(env), "pixels": frames(number), "next": after})

    storage = FrameStackStorage(6)
    storage.set(range(3), torch.stack([row(0, 10), row(1, 20), row(0, 11)]))
    storage.cut_episode(1)
    storage.cut_episode(7)  # has none
    storage.set(range(3, 5), torch.stack([row(1, 30), row(0, 12)]))
    assert storage.get(range(5))["next", "truncated"].flatten().tolist() == [False, True, False, False, False]
    assert storage.get(range(5))["pixels"][:, ::3, 0, 0].tolist() == [
        [10, 10, 10], [20, 20, 20], [10, 10, 11], [30, 30, 30], [10, 11, 12]
    ]  # fmt: skip


def test_an_environment_that_rests_keeps_its_frames() -> None:
    # Environment 1 has one open episode, while 0 goes on until the ring of frames has turned several times.
    episodes, storage = Episodes(0, 1e9), FrameStackStorage(8)
    first = episodes.step()
    first["env"] = torch.tensor(1)
    storage.set(0, first)
    episodes.stacks = [[]]
    for t in range(1, 60):
        storage.set(t % 8, episodes.step())
    frame = torch.full((3, 6, 6), 9, dtype=torch.uint8)
    nested = TensorDict({"pixels": torch.cat([first["next", "pixels"][3:], frame]), "done": torch.tensor([True])})
    reward = torch.zeros(1)
    nested["reward"] = reward
    last = TensorDict({"env": torch.tensor(1), "pixels": first["next", "pixels"], "action": torch.zeros(2)})
    storage.set(60 % 8, last.set("next", nested))
    assert_same(storage.get(torch.tensor([60 % 8])), last[None])


def test_an_episode_whose_beginning_is_elsewhere_keeps_its_stacks() -> None:
    episodes, storage = Episodes(0, 1e9), FrameStackStorage(8)
    rows = [episodes.step() for _ in range(6)]
    storage.set(range(4), torch.stack(rows[2:]))
    assert_same(storage.get(range(4)), torch.stack(rows[2:]))
    assert storage._written == 3 + 4


def test_an_episode_that_begins_elsewhere_may_begin_and_end_its_stack_alike() -> None:
    stack = torch.tensor([1, 2, 1], dtype=torch.uint8).repeat_interleave(3)[:, None, None].expand(9, 2, 2)
    following = {"pixels": torch.full((9, 2, 2), 3, dtype=torch.uint8), "done": torch.tensor([False])}
    storage = FrameStackStorage(4)
    storage.set(0, TensorDict({"pixels": stack, "next": following}))
    assert torch.equal(storage.get(torch.tensor([0]))["pixels"][0], stack)


def test_only_frames_are_on_another_device() -> None:
    """Nothing on the meta device has a value, so whatever waited for one would fail."""
    here, there = FrameStackStorage(30), FrameStackStorage(30, device="meta")
    for storage in (here, there):
        episodes = Episodes(seed=0, mean_length=2)  # so short that the ring of frames grows
        for step in range(60):
            storage.set(step % 30, episodes.step())
        storage.write_column("action", torch.tensor([3, 4]), torch.zeros(2, 2))
    position = torch.arange(30)
    assert there.position_of(torch.tensor([29, 30, 59]))[1].tolist() == [False, True, True]
    a, b = here.get(position), there.get(position)
    for key in a.keys(True, True):
        if "pixels" in key:
            assert b[key].device.type == "meta"
            assert b[key].shape == a[key].shape
        else:
            assert torch.equal(a[key], b[key])
    assert there.newest_frames(position).device.type == "meta"
    moved = b.to("meta", non_blocking=True)
    assert {value.device.type for value in moved.values(True, True)} == {"meta"}
