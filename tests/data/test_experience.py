"""What of a run's experience goes into the replay."""

from __future__ import annotations

from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import TensorDictReplayBuffer

from covr_lightning.agent import NoPrior
from covr_lightning.agent.finite import FiniteGuard
from covr_lightning.counters import Counters
from covr_lightning.data import FrameStackStorage
from covr_lightning.data.experience import Experience, Listener
from covr_lightning.data.replay_parts import ReplayParts
from covr_lightning.step_times import StepTimes


def of_one_environment(
    storage: FrameStackStorage, counters: Counters, listeners: list[Listener], returns: list[float]
) -> Experience:
    return Experience(
        TensorDictReplayBuffer(storage=storage, batch_size=1), None, None, ReplayParts(Path("never written")),
        range(1), counters, NoPrior(), FiniteGuard("stop"), listeners, returns, StepTimes(),
    )  # fmt: skip


def add(experience: Experience, t: int, done: bool, lost: bool = False) -> None:
    """One step with reward 1; where it is lost its frame is the one before."""
    pixels, over = torch.full((1, 9, 2, 2), t, dtype=torch.uint8), torch.tensor([[done]])
    following = {"pixels": pixels + (not lost), "reward": torch.ones(1, 1), "done": over, "truncated": over}
    following["lost"] = torch.tensor([[lost]])
    row = {"pixels": pixels, "action": torch.zeros(1, 1), "env": torch.zeros(1, dtype=torch.long), "next": following}
    experience.add(*experience.prepare(TensorDict(row, [1])))


def test_an_episode_that_is_cut_leaves_its_rewards_to_none() -> None:
    returns: list[float] = []
    experience = of_one_environment(FrameStackStorage(100), Counters(), [], returns)
    for t in range(3):
        add(experience, t, done=False)
    experience.cut(0)
    for t in range(3, 5):
        add(experience, t, done=t == 4)
    assert returns == [2.0]


def test_a_step_in_which_the_simulator_was_lost_is_left_out() -> None:
    heard: list[int | None] = []
    returns: list[float] = []

    def listen(env: int, transition: TensorDictBase | None) -> None:
        heard.append(None if transition is None else int(transition["pixels"][0, 0, 0]))

    storage, counters = FrameStackStorage(100), Counters()
    experience = of_one_environment(storage, counters, [listen], returns)
    for t in range(6):
        add(experience, t, done=t == 3, lost=t == 3)
    rows = storage.get(range(5))
    assert rows["pixels"][:, -1, 0, 0].tolist() == [0, 1, 2, 4, 5]
    assert rows["next", "done"].flatten().tolist() == [False, False, True, False, False]  # cut where it was still whole
    assert heard == [0, 1, 2, None, 4, 5]
    assert (counters.episodes, experience.last_training_return) == (1, 3.0)
    assert returns == [3.0]
