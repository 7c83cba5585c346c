"""The drivers that the driving benchmark compares."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.driving_reference import play, vlm_acts
from covr_lightning.envs import Road
from covr_lightning.finetune.vlm_alone import Answers
from covr_lightning.vlm.vlm import Proposals


class FullBrake:
    """Answers each frame with a full brake."""

    frames = 1

    def ask(self, frames: torch.Tensor) -> Proposals:
        n, yes = len(frames), torch.ones(len(frames), dtype=torch.bool)
        return Proposals(torch.tensor([[0.0, -1.0]]).expand(n, 2), yes, yes)


def test_the_vlm_is_asked_at_every_step() -> None:
    counts = Answers()
    env = Road("highway").make(0)
    policy = vlm_acts(FullBrake(), counts)  # type: ignore[arg-type]
    assert policy(env, np.zeros((128, 128, 3), np.uint8)) == (0.0, -1.0)
    played = play(env, policy, 1)
    env.close()
    # The car never moves, which is seen after 100 ticks, 25 agent steps of four.
    assert (played["DD"], played["ends"]) == (0.0, "stuck 1")
    assert (counts.asked, counts.unparsable, counts.unanswered) == (1 + 100 // env.env_spec.action_repeat, 0, 0)
