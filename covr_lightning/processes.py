"""What the processes of one run tell each other; every function here is trivial in a run of one process.

All of them have to call a function, in the same order. Values go over a group of their own (gloo), whose waits may take
as long as a fine-tune round does; gradients over that of the devices.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from covr_lightning.errors import RunFailed

T = TypeVar("T")

#: How long a process waits for another one: a round in a launch of its own may take hours.
LONGEST_WAIT = timedelta(days=7)

_values: tuple[Any, Any] = (None, None)  # the group, and the world it was made in


def count() -> int:
    """Processes W of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def number() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def _group() -> Any:
    global _values
    if _values[1] is not dist.group.WORLD:
        _values = dist.new_group(backend="gloo", timeout=LONGEST_WAIT), dist.group.WORLD
    return _values[0]


@atexit.register
def leave() -> None:
    """Leave the others, as far as gloo connects them: whoever waits there for this process hears that it is gone.

    gloo's threads end with their group, and that when nothing holds it any more. They have to end before the
    interpreter: one that lets go of a tensor while it ends aborts the process.
    """
    global _values
    group, world = _values
    _values = (None, None)
    if not dist.is_initialized():
        return
    if group is not None and world is dist.group.WORLD:
        dist.destroy_process_group(group)
    if dist.get_backend() == "gloo":
        dist.destroy_process_group()


@contextmanager
def _waiting_for_others() -> Iterator[None]:
    """Say in one sentence that another process is gone; it has said itself why."""
    try:
        yield
    except RuntimeError as error:
        raise _gone(error) from error


def gather(value: T) -> list[T]:
    """Every process's value, in the order of their numbers, on every process."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    with _waiting_for_others():
        dist.all_gather_object(values, value, group=_group())
    return values


def gather_on_first(value: T) -> list[T] | None:
    """Every process's value on the first process; None on the others."""
    if count() == 1:
        return [value]
    values: list[Any] | None = [None] * count() if number() == 0 else None
    with _waiting_for_others():
        dist.gather_object(value, values, dst=0, group=_group())
    return values


def from_first(value: T) -> T:
    """The first process's value."""
    if count() == 1:
        return value
    values: list[Any] = [value]
    with _waiting_for_others():
        dist.broadcast_object_list(values, src=0, group=_group())
    return values[0]


def largest(value: int) -> int:
    """The largest of the processes' values."""
    if count() == 1:
        return value
    tensor = torch.tensor(value)
    with _waiting_for_others():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_group())
    return int(tensor)


@contextmanager
def waits_of_others_end_in_one_sentence() -> Iterator[None]:
    """For waits that are not this module's, as Lightning's barriers and PyTorch's DDP have them.

    Raises:
        OtherProcessFailed: Another process was gone in such a wait.
    """
    try:
        yield
    except RuntimeError as error:
        if count() > 1 and (isinstance(error, dist.DistError) or "/gloo/transport/" in str(error)):
            raise _gone(error) from error
        raise


def _gone(error: RuntimeError) -> OtherProcessFailed:
    return OtherProcessFailed(f"Another process of this run is gone ({str(error).splitlines()[0]})")


class OtherProcessFailed(RunFailed):
    """Another process of this run failed, and says why itself.

    Args:
        message: What is known of it.
        could_not_write: Whether it was an OSError.
    """

    def __init__(self, message: str, could_not_write: bool = False) -> None:
        super().__init__(message)
        self.could_not_write = could_not_write


@contextmanager
def failing_together() -> Iterator[None]:
    """What fails inside in one process fails in all, so that none waits for another one forever.

    Raises:
        OtherProcessFailed: It failed in another process.
    """
    if count() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as failure:
        error = failure
    worst = largest(0 if error is None else 1 if isinstance(error, OSError) else 2)
    if worst:
        raise error or OtherProcessFailed("Another process of this run failed", could_not_write=worst == 1)


def mean(value: Tensor) -> Tensor:
    """The mean of the processes' values, on the device that they are on."""
    if count() == 1:
        return value
    total = value.detach().clone()
    with _waiting_for_others():
        dist.all_reduce(total)
    return total / count()


def share_buffers(buffers: Iterable[Tensor]) -> None:
    """Replace what networks have beside weights, such as a BatchNorm's averages, by the first process's."""
    if count() == 1:
        return
    with _waiting_for_others():
        for buffer in buffers:
            if buffer.numel():
                sent = buffer.contiguous()  # what is sent is memory from its beginning on
                dist.broadcast(sent.reshape(-1).view(torch.uint8), src=0)  # of any type
                if sent is not buffer and not torch.equal(sent, buffer):
                    buffer.copy_(sent)


def average_gradients(parameters: Iterable[Tensor], loss: Tensor) -> Tensor:
    """Replace each gradient by its mean over the processes, in one message.

    Args:
        parameters: Those with the gradients.
        loss: This process's, scalar.

    Returns:
        The loss's mean over the processes: not finite in all of them if it is not in one.
    """
    if count() == 1:
        return loss
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), loss.reshape(1)])
    with _waiting_for_others():
        dist.all_reduce(flat)
    flat /= count()
    *parts, mean = flat.split([*(g.numel() for g in gradients), 1])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return mean.view_as(loss)
