"""A replay on a GPU gives what one on the CPU gives, draw by draw, whichever sampler draws."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torchrl.data.replay_buffers.samplers import Sampler

from covr_lightning.data import EmphasizingRecentSampler, ProportionalSampler, ReturnSampler
from covr_lightning.data.replay import make_replay
from covr_lightning.data.sequences import SequenceSampler
from tests.data.episodes import Episodes
from tests.data.test_sequences import SPEC, steps

SAMPLERS: dict[str, Callable[[], Sampler | None]] = {
    "uniform": lambda: None,
    "proportional": ProportionalSampler,
    "recent": EmphasizingRecentSampler,
    "return": ReturnSampler,
}


def drawn(name: str, device: str) -> list[torch.Tensor]:
    """All that eight draws give, with the ring gone round and a label written between, on the CPU."""
    replay = make_replay(60, 16, SPEC, SAMPLERS[name](), torch.device(device), seed=0)
    episodes = Episodes(seed=1, mean_length=7, envs=2)
    windows = SequenceSampler(replay.storage, 3, 8, seed=0)
    seen = []
    for _ in range(8):
        replay.extend(torch.stack(steps(episodes, 15)))
        replay.storage.write_column("action", torch.tensor([3]), torch.full((1, 2), 9.0))
        batch = replay.sample()
        if name == "proportional":
            replay.update_priority(batch["index"], torch.arange(16.0, device=device))
        seen += [value.cpu() for _, value in sorted(batch.items(True, True), key=str)]
        seen += [value.cpu() for _, value in sorted(windows.sample().items())]
        seen.append(replay.storage.newest_frames(torch.arange(4)).cpu())
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAMPLERS)
def test_on_a_gpu(name: str) -> None:
    assert all(torch.equal(a, b) for a, b in zip(drawn(name, "cuda"), drawn(name, "cpu"), strict=True))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_twice(name: str) -> None:
    once, twice = drawn(name, "cpu"), drawn(name, "cpu")
    assert len(once) > 50
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
