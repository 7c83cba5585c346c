"""How an episode's end is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from tests.envs.puppet import PLAIN, Puppet, PuppetEnv


@pytest.mark.parametrize("terminated", [False, True])
@pytest.mark.parametrize("truncated", [False, True])
def test_what_ends_by_itself_is_not_cut_by_the_time_limit(terminated: bool, truncated: bool) -> None:
    class Ends(PuppetEnv):
        def simulator_step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
            return self.frame(), 1.0, terminated, truncated

    env = Ends(Puppet(), 0)
    env.reset()
    after = env.step(TensorDict({"action": torch.full((1,), PLAIN)}))["next"]
    told = [bool(after[key]) for key in ("done", "terminated", "truncated")]
    assert told == [terminated or truncated, terminated, truncated and not terminated]
