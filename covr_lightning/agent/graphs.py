"""The update as CUDA graphs: a GPU repeats what it was shown once; Python does not start kernel by kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

if TYPE_CHECKING:
    from covr_lightning.agent.sac import Due, SACModule

#: Updates of a kind that are made as usual before one is captured: libraries choose their kernels and Adam makes its
#: moments meanwhile.
WARM_UP = 3


@dataclass(frozen=True)
class _Captured:
    """A captured update.

    Attributes:
        replay: Makes the update again, on what the inputs now hold.
        errors: Where it leaves each row's |δ|.
        metrics: Where it leaves its metrics.
        seen: Where it leaves what the finite guard looks at, with its name, for each optimizer step.
    """

    replay: Callable[[], None]
    errors: Tensor
    metrics: dict[str, Tensor]
    seen: list[tuple[str, Tensor]]


class _Inputs:
    """A batch whose memory stays where it is.

    An observation and the one after it are views of the same frames, so memory is copied, not views: each piece once,
    from end to end.

    Args:
        like: A batch such as :meth:`take` will get.
    """

    def __init__(self, like: TensorDictBase) -> None:
        self.batch = like.clone(recurse=False)
        pieces: dict[int, tuple[Any, Tensor]] = {}  # by the place of a piece: an entry that lies in it, and its copy
        for key, value in like.items(True, True):
            place = value.untyped_storage().data_ptr()
            if place not in pieces:
                pieces[place] = key, _whole(value).clone()
            memory = pieces[place][1].view(value.dtype)
            self.batch[key] = memory.as_strided(value.shape, value.stride(), value.storage_offset())
        self._pieces = list(pieces.values())

    def take(self, batch: TensorDictBase) -> None:
        """Copy a batch in."""
        for key, memory in self._pieces:
            memory.copy_(_whole(batch[key]), non_blocking=True)


def _layout(batch: TensorDictBase) -> tuple[Any, ...]:
    """How a batch's entries lie in memory, and which of them lie together."""
    pieces: dict[int, int] = {}
    layout = []
    for key, value in batch.items(True, True):
        storage = value.untyped_storage()
        piece = pieces.setdefault(storage.data_ptr(), len(pieces))
        view = value.dtype, value.shape, value.stride(), value.storage_offset()
        layout.append((key, *view, piece, storage.nbytes()))
    return tuple(layout)


def _whole(value: Tensor) -> Tensor:
    """All memory of which a tensor is a view, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=value.device).set_(value.untyped_storage())


class UpdateGraphs:
    """Makes an agent's updates by CUDA graphs, of which every kind of update has its own.

    Kinds differ in what is due, in whether λ is 0, and in the batch's entries and how they lie in memory. λ, noise and
    batch are inputs, so that one graph serves all their values: λ and batch are copied to where it reads them, and the
    agent's generator is known to it. The numbers are those of an update without graphs, kernel for kernel.

    What a part decides in Python, it decides once for each kind. Lightning's hooks around backward passes and optimizer
    steps are not called in a replay.

    The graphs hold the memory of their kernels' results for good; they share it, since no two run at a time.

    Args:
        agent: On a GPU, in a process of its own.
    """

    def __init__(self, agent: SACModule) -> None:
        self._agent = agent
        self._made: Counter[Any] = Counter()
        self._captured: dict[Any, _Captured] = {}
        self._inputs: dict[Any, _Inputs] = {}
        self._lam = torch.zeros((), device=agent.device)
        self._memory: Any = None

    def update(self, batch: TensorDictBase, due: Due, lam: float) -> tuple[Tensor, dict[str, Tensor]]:
        """One update, as :meth:`covr_lightning.agent.SACModule.update` makes it.

        Args:
            batch: See there.
            due: Likewise.
            lam: λ.

        Returns:
            |δ| (B,) and metrics, which the next update overwrites.
        """
        agent = self._agent
        layout = _layout(batch)
        kind = due, lam == 0, layout
        if kind not in self._captured:
            if self._made[kind] < WARM_UP:
                self._made[kind] += 1
                return agent.update(batch, due, lam, agent.all_optimizers())
            if layout not in self._inputs:
                self._inputs[layout] = _Inputs(batch)
            self._captured[kind] = self._capture(self._inputs[layout].batch, due, 0.0 if lam == 0 else self._lam)
        captured = self._captured[kind]
        self._inputs[layout].take(batch)
        self._lam.fill_(lam)
        counted = agent.all_optimizers()[0]  # in Lightning's wrapper, which counts its steps
        getattr(counted, "_on_before_step", _nothing)()
        captured.replay()
        getattr(counted, "_on_after_step", _nothing)()
        for name, values in captured.seen:
            agent.finite.seen(name, agent.counters, values)
        return captured.errors, captured.metrics

    def _capture(self, batch: TensorDictBase, due: Due, lam: float | Tensor) -> _Captured:
        """Show the GPU an update, which is not carried out meanwhile."""
        agent = self._agent
        optimizers = [getattr(optimizer, "optimizer", optimizer) for optimizer in agent.all_optimizers()]
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(agent.generator)
        if self._memory is None:
            # All captures of a process run on one stream, whose workspace of cuBLAS would lie in another agent's pool.
            torch._C._cuda_clearCublasWorkspaces()
            self._memory = torch.cuda.graph_pool_handle()
        # Other threads of this process may use the GPU, to render or to label.
        with (
            _capturable(optimizers),
            torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"),
            agent.finite.recording() as seen,
        ):
            errors, metrics = agent.update(batch, due, lam, optimizers)
        return _Captured(graph.replay, errors, metrics, seen)


@contextmanager
def _capturable(optimizers: list[torch.optim.Optimizer]) -> Iterator[None]:
    """Let optimizers be captured; afterwards they are as they were, since a step outside of a graph warns of it."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    before = [group["capturable"] for group in groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
            group["capturable"] = value


def _nothing() -> None:
    """Without Lightning's wrapper there is nothing to count."""
