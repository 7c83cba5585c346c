"""Random numbers of a part of a run, which change nothing of the rest."""

from __future__ import annotations

import random

import numpy as np
import torch
from lightning.pytorch import seed_everything

from covr_lightning.random_state import own_randomness


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002 (the global ones)


def test_own_randomness_leaves_all_global_random_numbers_as_they_were() -> None:
    seed_everything(3, verbose=False)
    undisturbed = [draws() for _ in range(3)]
    seed_everything(3, verbose=False)
    disturbed, inside = [], []
    for seed in (1, 2, 1):
        with own_randomness(seed):
            inside.append(float(torch.rand(())))
            seed_everything(7, verbose=False)  # as a Trainer of several processes does
            draws()
        disturbed.append(draws())
    assert disturbed == undisturbed
    assert inside[0] == inside[2] != inside[1]
