"""How an episode's end is told."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from covr_lightning.envs.base import EnvSpec
from covr_lightning.envs.process import EnvProcess
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


@dataclass
class Endless(Puppet):
    """Its episodes have no end of their own; 7 environment steps, 2 an agent step."""

    @property
    def spec(self) -> EnvSpec:
        return replace(super().spec, action_repeat=2, episode_env_steps=7)

    def make(self, seed: int) -> PuppetEnv:
        return EndlessEnv(self, seed)


class EndlessEnv(PuppetEnv):
    def simulator_step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        return self.frame(), 1.0, False, False


@pytest.mark.parametrize("apart", [False, True])
def test_what_does_not_end_is_cut_by_its_time(apart: bool) -> None:
    factory = Endless()
    env = EnvProcess(factory, 0) if apart else factory.make(0)
    for _ in range(2):
        env.reset()
        steps = [env.step(TensorDict({"action": torch.full((1,), PLAIN)}))["next"] for _ in range(4)]
        assert [bool(step["truncated"]) for step in steps] == [False, False, False, True]
        assert [bool(step["done"]) for step in steps] == [False, False, False, True]
        assert not any(bool(step["terminated"]) for step in steps)
        if isinstance(env, EnvProcess):
            env._child.kill()  # between two episodes: none is lost
    assert env.lost_episodes == 0
    env.close()
