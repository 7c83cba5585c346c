"""What parts of somebody's own give, looked at where it is cheap, so that a wrong one ends in a sentence."""

from __future__ import annotations

import math
import operator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from covr_lightning.agent.networks import only_asked
from covr_lightning.errors import ConfigError, WrongResult, described

if TYPE_CHECKING:
    from covr_lightning.agent.actors import GaussianActor
    from covr_lightning.agent.augmentations import Augmentation
    from covr_lightning.agent.encoders import Encoder
    from covr_lightning.agent.objectives import Objective
    from covr_lightning.agent.priors import Prior
    from covr_lightning.agent.sac import SACModule


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


def feature_count(encoder: Encoder) -> int:
    """How many features an encoder, which may be somebody's own, says that it has.

    Args:
        encoder: One that is built.

    Raises:
        WrongResult: It says none.
    """
    features = getattr(encoder, "features", None)
    with suppress(TypeError):
        features = operator.index(features)  # type: ignore[arg-type]
    if not isinstance(features, int) or features < 1:
        raise WrongResult(f"{type(encoder).__name__}.build (model.encoder) left features = {features!r}; it must be "
                          "how many an image has, a whole number from 1 on.")  # fmt: skip
    return features


def try_parts(agent: SACModule) -> None:
    """Try views, encoder and actor head on two images of noise, where the agent's weights are.

    Random numbers and what networks have beside weights, such as a BatchNorm's averages, are afterwards as before.

    Args:
        agent: The agent.

    Raises:
        WrongResult: One of them gives something of another type or shape than it should.
    """
    spec, device = agent.spec, agent.device
    noise = torch.Generator().manual_seed(0)
    frame = (2, spec.channels, spec.frame_height, spec.frame_width)
    images = [torch.randint(256, frame, dtype=torch.uint8, generator=noise).to(device) for _ in range(2)]
    own_rng = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with own_rng, only_asked(agent):
        generator = torch.Generator(device).manual_seed(0)
        h = _tried_encoder(agent.trunk, _tried_views(agent, images[0], images[1], generator))
        _try_actor(agent.actor, agent.actor_projection(h), spec.action_dim, generator)


def _tried_views(agent: SACModule, o: Tensor, o_next: Tensor, generator: torch.Generator) -> Tensor:
    """The actor's view of images (2, C, H, W), if all views are what they must be."""
    name, shape = f"{type(agent.views).__name__} (model.views)", agent.augmentation.centre(o).shape
    given = agent.views(o, o_next, agent.augmentation, generator)
    if not all(hasattr(given, one) for one in ("critic", "critic_weights", "target", "actor")):
        raise WrongResult(f"{name} made {described(given, Tensor)}; it must make BatchViews.")
    for of in ("critic", "target"):
        views = getattr(given, of)
        if not isinstance(views, tuple | list) or not views:
            made = "none" if isinstance(views, tuple | list) else described(views, Tensor)
            raise WrongResult(f"{name} made {made} as views for {of}; it must make a tuple of at least one.")
    for of, view in [*(("critic", v) for v in given.critic), *(("target", v) for v in given.target),
                     ("actor", given.actor)]:  # fmt: skip
        if not isinstance(view, Tensor) or view.dtype != torch.uint8 or view.shape != shape:
            raise WrongResult(f"{name} made {described(view, Tensor)} as a view for {of}, of images {tuple(o.shape)}; "
                              f"it must make uint8 of shape {tuple(shape)}.")  # fmt: skip
    weights = given.critic_weights
    if len(weights) != len(given.critic) or not all(0 <= weight < math.inf for weight in weights):
        raise WrongResult(f"{name} gave critic_weights = {weights!r} for {len(given.critic)} views; each must have "
                          "one, a number from 0 on.")  # fmt: skip
    return given.actor


def _tried_encoder(encoder: Encoder, images: Tensor) -> Tensor:
    """Features of images (2, C, H, W), if they are what they must be."""
    h = encoder(images)
    _check_shape(h, (2, encoder.features), f"{type(encoder).__name__} (model.encoder)", "features")
    return h


def _try_actor(actor: GaussianActor, z: Tensor, action_dim: int, generator: torch.Generator) -> None:
    """Try an actor head on latents (2, D)."""
    name = type(actor).__name__
    before = torch.zeros(2, action_dim, device=z.device) if actor.needs_previous_action else None
    for method, given, shapes in (
        ("forward", actor(z, before), {"mean": action_dim, "log σ": action_dim}),
        ("sample", actor.sample(z, generator, before), {"action": action_dim, "log π": 1, "tanh μ": action_dim}),
    ):
        whose = f"{name}.{method} (model.actor_head)"
        if not isinstance(given, tuple | list) or len(given) != len(shapes):
            many = f" of {len(given)}" if isinstance(given, tuple | list) else ""
            raise WrongResult(f"{whose} gave {described(given, Tensor)}{many}; it must give a tuple of {len(shapes)}: "
                              f"{', '.join(shapes)}.")  # fmt: skip
        for value, (what, size) in zip(given, shapes.items(), strict=True):
            of_all_states = what == "log σ" and isinstance(value, Tensor) and value.shape == (size,)
            _check_shape(value.expand(2, size) if of_all_states else value, (2, size), whose, what)


def _check_shape(given: Any, shape: tuple[int, int], whose: str, what: str) -> None:
    if not isinstance(given, Tensor) or not given.is_floating_point() or given.shape != shape:
        raise WrongResult(f"{whose} gave {described(given, Tensor)} as {what} of two images; it must give "
                          f"floating-point numbers of shape {shape}.")  # fmt: skip
