"""Items of a data module as Lightning takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import TensorDictBase
from torch.utils.data import DataLoader, IterableDataset


class Stream(IterableDataset):
    """A stream of batches with a length: without one, Lightning would fetch an item ahead of the update.

    Args:
        begin: Begins the stream.
        length: Items that are left, at most.
    """

    def __init__(self, begin: Callable[[], Iterator[TensorDictBase]], length: Callable[[], int]) -> None:
        self._begin = begin
        self._length = length

    def __len__(self) -> int:
        return self._length()

    def __iter__(self) -> Iterator[TensorDictBase]:
        return self._begin()


def loader(items: Any) -> DataLoader:
    """A loader that hands the items on, one at a time, as they are.

    It has a generator of its own: otherwise each one would draw from the global random numbers.
    """
    return DataLoader(items, batch_size=None, num_workers=0, collate_fn=_as_is, generator=torch.Generator())


def _as_is(item: Any) -> Any:
    return item
