"""Random episodes as full transitions, for tests of the replay."""

from __future__ import annotations

import torch
from tensordict import TensorDict

K = 3


class Episodes:
    """Random episodes of random frames, as full transitions."""

    def __init__(self, seed: int, mean_length: float, size: int = 6) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.p_end = 1 / mean_length
        self.size = size
        self.stack: list[torch.Tensor] = []
        self.t = 0

    def _frame(self) -> torch.Tensor:
        return torch.randint(0, 256, (3, self.size, self.size), dtype=torch.uint8, generator=self.generator)

    def step(self) -> TensorDict:
        if not self.stack:
            self.stack = [self._frame()] * K
        before = torch.cat(self.stack)
        self.stack = [*self.stack[1:], self._frame()]
        after = torch.cat(self.stack)
        done = bool(torch.rand((), generator=self.generator) < self.p_end)
        if done:
            self.stack = []
        self.t += 1
        return TensorDict(
            {
                "pixels": before,
                "action": torch.full((2,), float(self.t)),
                "next": TensorDict(
                    {"pixels": after, "reward": torch.tensor([float(self.t)]), "done": torch.tensor([done])}
                ),
            }
        )


def assert_same(stored: TensorDict, reference: TensorDict) -> None:
    for key in ("pixels", ("next", "pixels"), "action", ("next", "reward"), ("next", "done")):
        assert torch.equal(stored[key], reference[key]), key
