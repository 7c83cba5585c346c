"""Random states as plain values and tensors, which a checkpoint can hold without pickled objects."""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from covr_lightning.errors import ConfigError

log = logging.getLogger(__name__)

#: Seeds are 0 to this: what the environments' generators take.
LARGEST_SEED = 2**31 - 1


def check_seed(name: str, seed: int) -> int:
    """A seed that every generator takes.

    Args:
        name: Its YAML key.
        seed: The seed.

    Raises:
        ConfigError: It is negative or above :data:`LARGEST_SEED`.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(f"{name} is {seed}; it can be 0 to {LARGEST_SEED}.")
    return seed


def global_state() -> dict[str, Any]:
    """The states of PyTorch's (CPU and CUDA), NumPy's and Python's global random numbers."""
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": twister_state(np.random.mtrand._rand),
        "python": [version, list(numbers), gauss],
    }


def set_global_state(state: dict[str, Any]) -> None:
    """Set what :func:`global_state` gave; CUDA's only if there are as many devices as then."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    set_twister_state(np.random.mtrand._rand, state["numpy"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed PyTorch for what runs inside, and leave the global random numbers outside as they were.

    So a VLM's fine-tuning (dropout, adapter initialisation) does not change what the agent draws. NumPy's and Python's
    are seeded by a Trainer of several processes, though nothing here draws from them.
    """
    before = global_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_global_state(before)


def new_generator(device: torch.device, seed: int, state: torch.Tensor | None = None) -> torch.Generator:
    """A generator on a device, in the state that a checkpoint brought, if one did.

    Where the state is of another kind of device, the generator begins anew with draws that have not been, and a warning
    says so.

    Args:
        device: Where it draws.
        seed: What it begins with without a state.
        state: Of the same generator before.
    """
    generator = torch.Generator(device).manual_seed(seed)
    if state is None:
        return generator
    if len(state) == len(generator.get_state()):
        generator.set_state(state)
        return generator
    _say_once(device.type)
    return generator.manual_seed(derived_seed(seed, int(state.long().sum())))


@functools.cache
def _say_once(device: str) -> None:
    log.warning(
        "The checkpoint's random numbers are of another kind of device than %s: the run goes on with others, not as it "
        "would have.", device,
    )  # fmt: skip


def derived_seed(seed: int, *which: int) -> int:
    """A seed of 31 bits, so that small numbers can be added to it, whose draws have nothing to do with those of `seed`.

    Args:
        seed: Of the run.
        which: Numbers ≥ 0 that tell one derived seed from another.
    """
    return int(np.random.SeedSequence([seed % 2**32, *which]).generate_state(1)[0]) >> 1


def seed_of(seed: int, number: int) -> int:
    """The seed of the n-th process or environment of a run, counted from 0: the first has the run's own.

    Runs with neighbouring seeds share none, as they would with `seed` + `number`.
    """
    return derived_seed(seed, number, 1) if number else seed


def generator_state(generator: np.random.Generator) -> dict[str, Any]:
    """The state of a NumPy generator whose state is made of integers (PCG64, NumPy's default)."""
    return dict(generator.bit_generator.state)


def set_generator_state(generator: np.random.Generator, state: dict[str, Any]) -> None:
    """Set what :func:`generator_state` gave."""
    generator.bit_generator.state = state


def twister_state(twister: np.random.RandomState) -> dict[str, Any]:
    """The state of a NumPy RandomState (a Mersenne Twister)."""
    state = twister.get_state(legacy=False)
    key = torch.from_numpy(state["state"]["key"].astype(np.int64))
    return {**state, "state": {"key": key, "pos": int(state["state"]["pos"])}}


def set_twister_state(twister: np.random.RandomState, state: dict[str, Any]) -> None:
    """Set what :func:`twister_state` gave."""
    key = state["state"]["key"].numpy().astype(np.uint32)
    twister.set_state({**state, "state": {**state["state"], "key": key}})
