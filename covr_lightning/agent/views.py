"""Which views of a batch feed the critics, their target and the actor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from covr_lightning.agent.augmentations import Augmentation, RandomConvolution
from covr_lightning.agent.own_parts import check_keeps_size
from covr_lightning.errors import ConfigError, check_not_negative


@dataclass(frozen=True)
class BatchViews:
    """The images that one update works on; each entry (B, C, H, W) uint8.

    Attributes:
        critic: Views of o that Q is fitted on.
        critic_weights: Weight of each view's squared error.
        target: Views of o'; the target y is the mean over them.
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

    def check(self, channels: int, size: tuple[int, int]) -> None:  # noqa: B027 (most have nothing to check)
        """Check what the views are made with beside the agent's augmentation, before a run.

        Args:
            channels: Of the images.
            size: Height and width that come out of the agent's augmentation.

        Raises:
            ConfigError: It does not fit.
        """


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


class DrQViews(Views):
    """DrQ: critics and target look at several independent augmentations (Kostrikov et al., 2021, Eqs. 1 and 3).

    y = 1/K Σ_k y(aug_k(s')), each with a next action of its own; L_Q = Σ_m Σ_i mean (Q_i(aug_m(s), a) − y)². The actor
    sees the first view of s. The sum over m is the authors' code's (``drq.py``); the paper has the mean, which Adam
    hardly tells apart. With K = M = 1 this is :class:`OneView`, bit for bit.

    Args:
        k: K, views of s' for the target.
        m: M, views of s for the critics.

    Raises:
        ConfigError: One is below 1.
    """

    def __init__(self, k: int = 2, m: int = 2) -> None:
        for name, value in (("k", k), ("m", m)):
            if value < 1:
                raise ConfigError(f"model.views.{name} is {value}; it must be at least 1.")
        self.k, self.m = k, m
        self._one = OneView()

    def __call__(
        self, pixels: Tensor, next_pixels: Tensor, augmentation: Augmentation, generator: torch.Generator | None
    ) -> BatchViews:
        """Augment o M times and o' K times; the i-th of both with one draw where the augmentation asks for it."""
        pairs = [self._one(pixels, next_pixels, augmentation, generator) for _ in range(max(self.k, self.m))]
        critic = tuple(pair.actor for pair in pairs[: self.m])
        target = tuple(pair.target[0] for pair in pairs[: self.k])
        return BatchViews(critic, (1.0,) * self.m, target, actor=critic[0])


class SVEAViews(Views):
    """SVEA: the critics learn from a plain and a strongly augmented view, their target from a plain one alone.

    L_Q = α Σ_i mean (Q_i(s, a) − y)² + β Σ_i mean (Q_i(φ(s), a) − y)², with y and the actor's loss on plain views
    (Hansen et al., 2021; dmcontrol-generalization-benchmark, ``algorithms/svea.py``). Plain are s and s' as the agent's
    augmentation makes them (in that code: shifted); φ(s) is the strong augmentation of the same s. With an φ that
    changes nothing and α = β = ½ this is :class:`OneView`, bit for bit.

    Args:
        strong: φ; it must keep the images' size.
        alpha: Weight of the plain view, α.
        beta: Weight of the strongly augmented view, β.

    Raises:
        ConfigError: A weight is negative or no number.
    """

    def __init__(self, strong: Augmentation | None = None, alpha: float = 0.5, beta: float = 0.5) -> None:
        for name, value in (("alpha", alpha), ("beta", beta)):
            check_not_negative(f"model.views.{name}", value)
        self.strong = strong or RandomConvolution()
        self.alpha, self.beta = alpha, beta
        self._one = OneView()

    def check(self, channels: int, size: tuple[int, int]) -> None:
        """Try φ."""
        check_keeps_size(self.strong, channels, size, "model.views.strong")

    def __call__(
        self, pixels: Tensor, next_pixels: Tensor, augmentation: Augmentation, generator: torch.Generator | None
    ) -> BatchViews:
        """Augment o and o' as :class:`OneView` does, and the view of o strongly in addition."""
        plain = self._one(pixels, next_pixels, augmentation, generator)
        o = plain.actor
        return BatchViews((o, self.strong(o, generator)), (self.alpha, self.beta), plain.target, actor=o)
