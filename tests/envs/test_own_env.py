"""An environment of somebody's own that gives something else than it should."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from covr_lightning.envs.base import PixelEnv
from covr_lightning.envs.process import EnvProcess
from covr_lightning.errors import ConfigError
from tests.envs.puppet import PLAIN, SIZE, Puppet, PuppetEnv

FRAME = np.zeros((SIZE, SIZE, 3), np.uint8)
SHAPE = f"it must be uint8 of shape ({SIZE}, {SIZE}, 3)."
FRAMES: dict[str, tuple[Any, str]] = {
    "float": (FRAME.astype(np.float32), "float32 of shape (6, 6, 3)"),
    "channels first": (FRAME.transpose(2, 0, 1), "uint8 of shape (3, 6, 6)"),
    "grey": (FRAME[..., :1], "uint8 of shape (6, 6, 1)"),
    "tensor": (torch.zeros(SIZE, SIZE, 3, dtype=torch.uint8), "a Tensor"),
}
STEPS: dict[str, Any] = {
    "as gymnasium": (FRAME, 1.0, False, False, {}),
    "two rewards": (FRAME, np.ones(2), False, False),
    "no reward": (FRAME, None, False, False),
    "as gym had it": (FRAME, 1.0, False, {}),
    "a flag in a tensor": (FRAME, 1.0, torch.zeros(2, dtype=torch.bool), False),
    "a flag as a number": (FRAME, 1.0, 0, False),
    "nothing": None,
}


@dataclass
class Odd(Puppet):
    """Builds an environment that gives this as its first frame, and this after a step."""

    first: Any = None
    after: Any = None
    state: Any = field(default_factory=dict)

    def make(self, seed: int) -> PuppetEnv:
        return OddEnv(self, seed)


class OddEnv(PuppetEnv):
    factory: Odd

    def simulator_reset(self) -> np.ndarray:
        return self.factory.first

    def simulator_step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        return self.factory.after

    def random_state(self) -> dict[str, Any]:
        return self.factory.state


def made(factory: Odd, apart: bool) -> PixelEnv:
    return EnvProcess(factory, 0) if apart else factory.make(0)


def step(env: PixelEnv) -> TensorDict:
    return env.step(TensorDict({"action": torch.full((1,), PLAIN)}))["next"]


@pytest.mark.parametrize(("kind", "apart"), [*((kind, False) for kind in FRAMES), ("float", True)])
def test_a_frame_of_another_kind(kind: str, apart: bool) -> None:
    frame, described = FRAMES[kind]
    env = made(Odd(first=frame), apart)
    sentence = f"OddEnv.simulator_reset (data.env) gave {described} as a frame; {SHAPE}"
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        env.reset()
    env.close()

    env = made(Odd(first=FRAME, after=(frame, 1.0, False, False)), apart)
    env.reset()
    sentence = f"OddEnv.simulator_step (data.env) gave {described} as a frame; {SHAPE}"
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        step(env)
    env.close()


@pytest.mark.parametrize(("kind", "apart"), [*((kind, False) for kind in STEPS), ("as gymnasium", True)])
def test_a_step_of_another_form(kind: str, apart: bool) -> None:
    env = made(Odd(first=FRAME, after=STEPS[kind]), apart)
    env.reset()
    with pytest.raises(ConfigError, match=r"OddEnv\.simulator_step .* must give a frame, the reward as"):
        step(env)
    env.close()


@pytest.mark.parametrize("apart", [False, True])
def test_no_random_state(apart: bool) -> None:
    env = made(Odd(first=FRAME, after=(FRAME, 1.0, False, False), state=None), apart)
    with pytest.raises(ConfigError, match=r"OddEnv\.random_state .* gave a NoneType; it must be a dict"):
        env.reset()
    env.close()


def test_numbers_of_other_types_are_taken() -> None:
    env = Odd(first=FRAME, after=(FRAME, np.float64(0.5), np.False_, True)).make(0)
    env.reset()
    after = step(env)
    assert after["reward"].dtype == torch.float32
    assert (float(after["reward"]), bool(after["terminated"]), bool(after["truncated"])) == (0.5, False, True)
    assert after["truncated"].dtype == after["done"].dtype == torch.bool


@pytest.mark.parametrize("field", ["frame_height", "frame_stack", "action_dim", "action_repeat", "episode_env_steps"])
def test_a_spec_with_nothing_in_it(field: str) -> None:
    sentence = f"{field} of puppet's EnvSpec (data.env) is 0; it must be at least 1."
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        replace(Puppet().spec, **{field: 0})
