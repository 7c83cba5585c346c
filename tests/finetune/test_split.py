"""Held-out rows are of episodes, or of stretches of one, that the VLM is not trained on."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from covr_lightning.finetune.episodes import EpisodeBuffer, joined
from covr_lightning.finetune.split import GAP, hold_out


def split(kept: Tensor, share: float, episode: Tensor | None, seed: int = 0) -> tuple[set[int], set[int]]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        held_out, training = hold_out(kept, share, episode)
    assert len(held_out.unique()) == len(held_out)
    assert len(training.unique()) == len(training)
    return set(held_out.tolist()), set(training.tolist())


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("episodes", [1, 2, 8])
def test_no_row_beside_a_held_out_one_is_trained_on(episodes: int, seed: int) -> None:
    episode = torch.arange(400) * episodes // 400
    kept = torch.arange(400)[torch.rand(400, generator=torch.Generator().manual_seed(seed)) < 0.6]
    held_out, training = split(kept, 0.2, episode, seed)
    assert len(held_out) == round(0.2 * len(kept))
    assert held_out | training <= set(kept.tolist())
    assert not held_out & training
    left_out = set(kept.tolist()) - held_out - training
    assert len(left_out) <= 2 * GAP
    for row in training:
        assert not any(episode[row] == episode[one] and abs(row - one) <= GAP for one in held_out)


def test_whole_episodes_go_first_and_the_last_one_is_cut() -> None:
    episode = torch.arange(100) // 20  # five of 20 rows
    held_out, training = split(torch.arange(100), 0.5, episode)
    counts = sorted(sum(int(episode[row]) == e for row in held_out) for e in range(5))
    assert counts == [0, 0, 10, 20, 20]
    (cut,) = (e for e in range(5) if sum(int(episode[row]) == e for row in held_out) == 10)
    stretch = sorted(row for row in held_out if int(episode[row]) == cut)
    assert stretch == [*range(stretch[0], stretch[0] + 10)]
    rest = {row for row in range(20 * cut, 20 * cut + 20) if not stretch[0] - GAP <= row <= stretch[-1] + GAP}
    assert training == rest | {
        row for row in range(100) if int(episode[row]) not in {int(episode[o]) for o in held_out}
    }


def test_a_stretch_may_be_anywhere_in_its_episode() -> None:
    begins = {min(split(torch.arange(40), 0.25, torch.zeros(40, dtype=torch.int64), seed)[0]) for seed in range(60)}
    assert begins <= {*range(31)}
    assert min(begins) < 5
    assert max(begins) > 25


def test_a_stretch_may_be_the_first_or_the_last_of_its_episode() -> None:
    begins = {min(split(torch.arange(12), 0.25, torch.zeros(12, dtype=torch.int64), seed)[0]) for seed in range(100)}
    assert begins == {*range(10)}  # three of twelve rows


@pytest.mark.parametrize("rows", [1, 2, 3, 10])
def test_few_rows_are_not_all_taken_from_training(rows: int) -> None:
    held_out, training = split(torch.arange(rows), 0.1, torch.zeros(rows, dtype=torch.int64))
    assert len(held_out) == min(1, rows - 1)
    assert len(training) == rows - len(held_out)  # a gap would leave less than half


def test_without_episodes_rows_are_drawn_one_by_one() -> None:
    held_out, training = split(torch.arange(50), 0.1, None)
    assert len(held_out) == 5
    assert held_out | training == set(range(50))
    assert split(torch.arange(50), 0.0, torch.zeros(50))[0] == set()


def test_remembering_does_not_look_like_skill() -> None:
    """Actions that drift through an episode: the nearest training row answers well only where it is a neighbour."""
    g = torch.Generator().manual_seed(0)
    episode, time = torch.arange(1000) // 100, (torch.arange(1000) % 100).float()
    action = torch.cat([torch.randn(100, generator=g).cumsum(0) / 10 for _ in range(10)])
    picture = torch.stack([1000.0 * episode, time], -1)  # only a neighbour in time looks alike

    def skill(episode: Tensor | None) -> float:
        skills = []
        for seed in range(20):
            held_out, training = (torch.tensor([*s]) for s in split(torch.arange(1000), 0.1, episode, seed))
            nearest = torch.cdist(picture[held_out], picture[training]).argmin(1)
            error = (action[training][nearest] - action[held_out]).abs().mean()
            skills.append(1 - error / (action[training].median() - action[held_out]).abs().mean())
        return float(torch.stack(skills).mean())

    assert skill(None) > 0.5
    assert skill(episode) < 0.1


def transition(value: int, last: bool) -> TensorDict:
    frame, no = torch.full((9, 4, 4), value, dtype=torch.uint8), torch.zeros(1, dtype=torch.bool)
    after = {"reward": torch.ones(1), "terminated": no, "truncated": no | last}
    return TensorDict({"pixels": frame, "action": torch.zeros(2), "next": after}, [])


def test_rows_know_their_episode_across_environments_and_processes() -> None:
    parts = []
    for lengths in ((2, 3), (1,)):
        buffer, value = EpisodeBuffer(), 0
        for env, length in enumerate(lengths):
            for step in range(length):
                buffer.add(transition(value := value + 1, step == length - 1), env=env)
        resumed = EpisodeBuffer()
        resumed.load_state_dict(buffer.state_dict())
        assert torch.equal(resumed.rows()["episode"], buffer.rows()["episode"])
        parts.append(buffer.rows())
    assert joined(parts)["episode"].tolist() == [0, 0, 1, 1, 1, 2]
    assert "episode" not in joined([parts[0].exclude("episode"), parts[1]])
