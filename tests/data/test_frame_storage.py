"""The frame ring against a slow reference that stores both full stacks of every transition."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import RandomSampler, TensorDictReplayBuffer

from covr_lightning.data.frame_storage import FrameStackStorage
from tests.data.episodes import Episodes, assert_same


@pytest.mark.parametrize("mean_length", [2.5, 30.0])
def test_equals_a_reference_of_full_stacks_over_20k_pushes(mean_length: float) -> None:
    capacity, episodes = 500, Episodes(seed=1, mean_length=mean_length)
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
