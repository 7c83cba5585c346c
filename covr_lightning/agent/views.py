"""Which views of a batch feed the critics, their target and the actor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from covr_lightning.agent.augmentations import Augmentation


@dataclass(frozen=True)
class BatchViews:
    """The images that one update works on; each entry (B, C, H, W) uint8.

    Attributes:
        critic: K views of o that Q is fitted on.
        critic_weights: Weight of each view's squared error.
        target: M views of o'; the target y is the mean over them.
        actor: The view of o that the actor's loss uses.
    """

    critic: tuple[Tensor, ...]
    critic_weights: tuple[float, ...]
    target: tuple[Tensor, ...]
    actor: Tensor


class Views(ABC):
    """Makes the views of one update."""

    @abstractmethod
    def __call__(
        self, pixels: Tensor, next_pixels: Tensor, augmentation: Augmentation, generator: torch.Generator | None
    ) -> BatchViews:
        """Augment o and o' (each (B, C, H, W) uint8) into the views of one update."""


class OneView(Views):
    """One augmented view of each observation for everything: SAC and RAD."""

    def __call__(
        self, pixels: Tensor, next_pixels: Tensor, augmentation: Augmentation, generator: torch.Generator | None
    ) -> BatchViews:
        """Augment o and o', with one draw for both where the augmentation asks for it."""
        if augmentation.same_for_next:
            both = augmentation(torch.cat([pixels, next_pixels], dim=1), generator)
            o, o_next = both.chunk(2, dim=1)
        else:
            o, o_next = augmentation(pixels, generator), augmentation(next_pixels, generator)
        return BatchViews(critic=(o,), critic_weights=(1.0,), target=(o_next,), actor=o)
