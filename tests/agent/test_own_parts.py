"""Augmentations and priors of somebody's own that give something else than they should."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from covr_lightning.agent import SPR, Augmentation, Prior, SVEAViews
from covr_lightning.agent.networks import soft_update
from covr_lightning.agent.objectives import Objective
from covr_lightning.counters import Counters
from covr_lightning.errors import ConfigError
from tests.agent.small_agents import agent, batch


class Odd(Augmentation):
    """Changes type and size as it is told."""

    def __init__(self, dtype: torch.dtype = torch.uint8, rows: int = 20, acted_rows: int = 20) -> None:
        self.dtype, self.rows, self.acted_rows = dtype, rows, acted_rows

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return images[:, :, : self.rows].to(self.dtype)

    def centre(self, images: Tensor) -> Tensor:
        return images[:, :, : self.acted_rows]


@pytest.mark.parametrize(
    ("odd", "sentence"),
    [
        (
            Odd(torch.float32),
            "Odd (model.augmentation) made float32 of shape (2, 9, 20, 20) of images (2, 9, 20, 20); ",
        ),
        (Odd(rows=16), "Odd (model.augmentation) made uint8 of shape (2, 9, 16, 20) of images (2, 9, 20, 20); "),
        (Odd(acted_rows=16), "Odd.centre (model.augmentation) made uint8 of shape (2, 9, 16, 20) of images"),
    ],
)
def test_an_augmentation_is_tried_before_the_run(odd: Odd, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)) as refused:
        agent(augmentation=odd)
    assert str(refused.value).endswith("it must make uint8 of shape (2, 9, 20, 20), as its output_size tells.")


def test_so_are_those_of_spr_and_svea() -> None:
    with pytest.raises(ConfigError, match=re.escape("Odd (SPR's augmentation, model.objectives) made float32")):
        agent(objectives=[SPR(augmentation=Odd(torch.float32))])
    with pytest.raises(ConfigError, match=re.escape("Odd (model.views.strong) made float32")):
        agent(views=SVEAViews(strong=Odd(torch.float32)))


def test_what_is_no_image_at_all() -> None:
    class Forgets(Augmentation):
        def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return None  # type: ignore[return-value]

    with pytest.raises(ConfigError, match=r"Forgets \(model\.augmentation\) made a NoneType of images"):
        agent(augmentation=Forgets())


def test_trying_it_leaves_torchs_random_numbers_alone() -> None:
    class Noise(Augmentation):
        def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return torch.randint(0, 256, images.shape, dtype=torch.uint8)  # not from the generator

    agent()
    expected = torch.rand(3)
    agent(augmentation=Noise())
    assert torch.equal(torch.rand(3), expected)


class Told(Prior):
    """λ as it is told."""

    lam = 1.0

    def weight(self, counters: Counters) -> float:
        return self.lam


@pytest.mark.parametrize("lam", [-0.1, math.nan, math.inf, None])
def test_a_weight_of_the_guidance_is_a_number_from_0_on(lam: Any) -> None:
    prior = Told()
    module = agent(prior=prior)
    module.training_step(batch())
    prior.lam = lam
    with pytest.raises(ConfigError, match=rf"Told\.weight \(model\.prior\) gave λ = {lam}; it must be a finite number"):
        module.training_step(batch())


@pytest.mark.parametrize("method", ["__call__", "centre"])
def test_an_augmentation_leaves_what_it_is_given_as_it_is(method: str) -> None:
    class InPlace(Augmentation):
        def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return images

    def blacken(self: InPlace, images: Tensor, *generator: Any) -> Tensor:
        images[:, :, :4] = 0
        return images

    setattr(InPlace, method, blacken)
    with pytest.raises(ConfigError, match=r"InPlace \(model\.augmentation\) changed the images that it was given"):
        agent(augmentation=InPlace())


def test_a_prior_that_does_not_call_its_bases_init_is_as_the_paper_has_it() -> None:
    class Forgets(Prior):
        def __init__(self, lam: float) -> None:
            self.lam = lam

        def weight(self, counters: Counters) -> float:
            return self.lam

    plain = Forgets(1.0)
    assert (plain.action, plain.mean_over, plain.q_filter) == ("sample", "labelled", False)
    agent(prior=plain).training_step(batch())


def test_targets_without_parameters_need_not_move() -> None:
    soft_update(torch.nn.Flatten(), torch.nn.Flatten(), 0.5)


@pytest.mark.parametrize(
    ("give", "told"),
    [
        (lambda loss: loss, "gave float32 of shape (); it must give a tuple of two"),
        (lambda loss: (loss.detach(), {}), "gave a loss that is float32 of shape () without a gradient"),
        (lambda loss: (loss.expand(3), {}), "gave a loss that is float32 of shape (3,); it must be a scalar"),
        (lambda loss: (0.5, {}), "gave a loss that is a float; it must be a scalar"),
        (lambda loss: (loss, None), "gave a NoneType to log; it must be a dict"),
        (lambda loss: (loss, {"train/x": "far"}), "gave a str to log as 'train/x'"),
        (lambda loss: (loss, {"train/x": loss.expand(3)}), "gave float32 of shape (3,) to log as 'train/x'"),
    ],
)
def test_what_an_objective_gives(give: Any, told: str) -> None:
    class Own(Objective):
        def build(self, agent: Any) -> None:
            self.layer = torch.nn.Linear(1, 1)

        def loss(self, batch: Any, views: Any, agent: Any) -> Any:
            return give(self.layer(torch.ones(1)).sum())

    with pytest.raises(ConfigError, match=re.escape(f"Own.loss (model.objectives) {told}")):
        agent(objectives=[Own()]).training_step(batch())
