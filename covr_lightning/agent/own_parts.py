"""What parts of somebody's own give, looked at where it is cheap, so that a wrong one ends in a sentence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from covr_lightning.errors import ConfigError, WrongResult, described

if TYPE_CHECKING:
    from covr_lightning.agent.augmentations import Augmentation
    from covr_lightning.agent.objectives import Objective
    from covr_lightning.agent.priors import Prior


def augmented_size(augmentation: Augmentation, channels: int, size: tuple[int, int], key: str) -> tuple[int, int]:
    """The size of what an augmentation, which may be somebody's own, makes of images; tried on two of noise.

    Args:
        augmentation: The augmentation.
        channels: Of the images.
        size: Their height and width.
        key: Its YAML key.

    Returns:
        Height and width.

    Raises:
        WrongResult: It makes something else than uint8 images of the size that its ``output_size`` tells, or changes
            the images that it is given, which are still used.
    """
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, channels, *size), dtype=torch.uint8, generator=noise)
    before = images.clone()
    height, width = augmentation.output_size(size)
    shape = (2, channels, height, width)
    with torch.random.fork_rng(devices=[]):
        made = {"": augmentation(images, torch.Generator().manual_seed(0)), ".centre": augmentation.centre(images)}
    if not torch.equal(images, before):
        raise WrongResult(
            f"{type(augmentation).__name__} ({key}) changed the images that it was given; it must return others."
        )
    for name, given in made.items():
        if isinstance(given, Tensor) and given.dtype == torch.uint8 and given.shape == shape:
            continue
        raise WrongResult(
            f"{type(augmentation).__name__}{name} ({key}) made {described(given, Tensor)} of images "
            f"{tuple(images.shape)}; it must make uint8 of shape {shape}, as its output_size tells."
        )
    return height, width


def check_keeps_size(augmentation: Augmentation, channels: int, size: tuple[int, int], key: str) -> None:
    """The same for an augmentation that must leave images as large as they are.

    Args:
        augmentation: The augmentation.
        channels: Of the images.
        size: Their height and width.
        key: Its YAML key.

    Raises:
        ConfigError: It does not, or it makes something else than it should.
    """
    if augmented_size(augmentation, channels, size, key) != size:
        raise ConfigError(f"{type(augmentation).__name__} ({key}) changes the images' size; it must keep it.")


def checked_loss(objective: Objective, given: Any) -> tuple[Tensor, dict[str, Any]]:
    """What an objective, which may be somebody's own, gave for a batch: its loss, and what to log.

    Args:
        objective: The objective.
        given: What its ``loss`` gave.

    Raises:
        WrongResult: It is no pair of a scalar with a gradient and numbers by their names.
    """
    name = type(objective).__name__
    if not isinstance(given, tuple) or len(given) != 2:
        raise WrongResult(f"{name}.loss (model.objectives) gave {described(given, Tensor)}; it must give a tuple of two"
                          ": the loss, and a dict of what to log.")  # fmt: skip
    loss, logged = given
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        without = " without a gradient" if isinstance(loss, Tensor) and not loss.requires_grad else ""
        raise WrongResult(f"{name}.loss (model.objectives) gave a loss that is {described(loss, Tensor)}{without}; it "
                          "must be a scalar tensor with a gradient.")  # fmt: skip
    if not isinstance(logged, dict):
        raise WrongResult(f"{name}.loss (model.objectives) gave {described(logged, Tensor)} to log; it must be a dict.")
    for key, value in logged.items():
        if not isinstance(value, float | int) and not (isinstance(value, Tensor) and value.numel() == 1):
            raise WrongResult(f"{name}.loss (model.objectives) gave {described(value, Tensor)} to log as {key!r}; it "
                              "must be a number or a scalar tensor.")  # fmt: skip
    return loss, logged


def check_weight(prior: Prior, lam: float) -> None:
    """Check λ, which a prior of somebody's own may have made.

    Args:
        prior: The prior.
        lam: What its ``weight`` gave.

    Raises:
        WrongResult: It is negative or no finite number.
    """
    if not isinstance(lam, float | int) or not 0 <= lam < math.inf:
        raise WrongResult(
            f"{type(prior).__name__}.weight (model.prior) gave λ = {lam!r}; it must be a finite number from 0 on."
        )
