"""Random episodes as full transitions, for tests of the replay."""

from __future__ import annotations

import torch
from tensordict import TensorDict

K = 3


class Episodes:
    """Random episodes of random frames, as full transitions, of environments in a random order."""

    def __init__(self, seed: int, mean_length: float, size: int = 6, envs: int = 1) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.p_end = 1 / mean_length
        self.size = size
        self.stacks: list[list[torch.Tensor]] = [[] for _ in range(envs)]
        self.t = 0

    def _frame(self) -> torch.Tensor:
        return torch.randint(0, 256, (3, self.size, self.size), dtype=torch.uint8, generator=self.generator)

    def step(self) -> TensorDict:
        env = 0
        if len(self.stacks) > 1:
            env = int(torch.randint(0, len(self.stacks), (), generator=self.generator))
        stack = self.stacks[env] or [self._frame()] * K
        before = torch.cat(stack)
        stack = [*stack[1:], self._frame()]
        after = torch.cat(stack)
        done = bool(torch.rand((), generator=self.generator) < self.p_end)
        self.stacks[env] = [] if done else stack
        self.t += 1
        return TensorDict(
            {
                "pixels": before,
                "env": torch.tensor(env),
                "action": torch.full((2,), float(self.t)),
                "next": TensorDict(
                    {"pixels": after, "reward": torch.tensor([float(self.t)]), "done": torch.tensor([done])}
                ),
            }
        )


def assert_same(stored: TensorDict, reference: TensorDict) -> None:
    for key in ("pixels", ("next", "pixels"), "env", "action", ("next", "reward"), ("next", "done")):
        assert torch.equal(stored[key], reference[key]), key
