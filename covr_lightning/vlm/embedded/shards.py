"""One optimizer step on two halves of a batch at once, each in a thread of its own.

The model is small: its operations are too short for PyTorch to share out among cores. Two replicas that each work
through half of the batch use two cores almost fully. Each half runs single-threaded and the gradients are added in a
fixed order, so the result does not depend on how many cores there are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

SHARDS = 2


class Shards(Generic[M]):
    """A module and its replica.

    Args:
        module: what is trained; its parameters take the gradients.
    """

    def __init__(self, module: M) -> None:
        self.replicas: list[M] = [module, *(copy.deepcopy(module) for _ in range(SHARDS - 1))]
        self._pool = ThreadPoolExecutor(SHARDS, initializer=torch.set_num_threads, initargs=(1,))

    def backward(self, losses: Sequence[Callable[[M], tuple[Tensor, T]]]) -> list[T]:
        """Adds up the gradients of one loss per shard, in place of the gradients before.

        Args:
            losses: one function per shard, from its replica to a scalar and whatever else shall be handed back.

        Returns:
            What else the losses gave.
        """
        module = self.replicas[0]
        for replica in self.replicas:
            replica.zero_grad()
        for replica in self.replicas[1:]:
            with torch.no_grad():
                torch._foreach_copy_([*replica.parameters()], [*module.parameters()])

        def run(shard: int) -> T:
            loss, more = losses[shard](self.replicas[shard])
            loss.backward()
            return more

        handed_back = list(self._pool.map(run, range(len(losses))))
        for replica in self.replicas[1:]:
            for total, part in zip(module.parameters(), replica.parameters(), strict=True):
                if part.grad is not None:
                    total.grad = part.grad if total.grad is None else total.grad.add_(part.grad)
        return handed_back


@contextmanager
def sharded(module: M) -> Iterator[Shards[M]]:
    """Replicas of a module, with PyTorch's own threads switched off meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shards = Shards(module)
    try:
        yield shards
    finally:
        shards._pool.shutdown()
        torch.set_num_threads(threads)
