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
from covr_lightning.data.experience import Experience
from covr_lightning.data.replay_parts import ReplayParts
from covr_lightning.step_times import StepTimes


def test_a_step_in_which_the_simulator_was_lost_is_left_out() -> None:
    heard: list[int | None] = []
    returns: list[float] = []

    def listen(env: int, transition: TensorDictBase | None) -> None:
        heard.append(None if transition is None else int(transition["pixels"][0, 0, 0]))

    storage, counters = FrameStackStorage(100), Counters()
    experience = Experience(
        TensorDictReplayBuffer(storage=storage, batch_size=1), None, None, ReplayParts(Path("never written")),
        range(1), counters, NoPrior(), FiniteGuard("stop"), [listen], returns, StepTimes(),
    )  # fmt: skip
    for t in range(6):
        pixels, lost = torch.full((1, 9, 2, 2), t, dtype=torch.uint8), torch.tensor([[t == 3]])
        after = pixels + (t != 3)  # the frame before, again
        over = {"pixels": after, "reward": torch.ones(1, 1), "done": lost, "truncated": lost, "lost": lost}
        row = {"pixels": pixels, "action": torch.zeros(1, 1), "env": torch.zeros(1, dtype=torch.long), "next": over}
        experience.add(*experience.prepare(TensorDict(row, [1])))
    rows = storage.get(range(5))
    assert rows["pixels"][:, -1, 0, 0].tolist() == [0, 1, 2, 4, 5]
    assert rows["next", "done"].flatten().tolist() == [False, False, True, False, False]  # cut where it was still whole
    assert heard == [0, 1, 2, None, 4, 5]
    assert (counters.episodes, experience.last_training_return) == (1, 3.0)
    assert returns == [3.0]
