"""Parts of somebody's own that give something else than they should."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from covr_lightning.agent import SPR, Augmentation, Prior, RandomShift, SVEAViews
from covr_lightning.agent.actors import GaussianActor
from covr_lightning.agent.encoders import Encoder
from covr_lightning.agent.networks import soft_update
from covr_lightning.agent.objectives import Objective
from covr_lightning.agent.own_parts import try_parts
from covr_lightning.agent.views import BatchViews, OneView
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


class OwnEncoder(Encoder):
    """Averages of each channel, or what it is told to make of them; counts its calls in a buffer."""

    def __init__(self, make: Callable[[Tensor], Any] = lambda h: h, features: Any = 9) -> None:
        super().__init__()
        self.make, self.number = make, features
        self.register_buffer("calls", torch.zeros(()))

    def build(self, channels: int, image_size: tuple[int, int], filters: int, strides: Sequence[int]) -> None:
        if self.number is not None:
            self.features = self.number

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.make(images.float().mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda h: h[:, :5], "gave float32 of shape (2, 5) as features of two images; it must give floating-point"),
        (lambda h: h.long(), "gave int64 of shape (2, 9) as features"),
        (lambda h: (h, h), "gave a tuple as features"),
        (lambda h: h[None], "gave float32 of shape (1, 2, 9) as features"),
    ],
)
def test_what_an_encoder_gives(make: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"OwnEncoder (model.encoder) {told}")):
        try_parts(agent(encoder=OwnEncoder(make)))


def test_features_may_be_counted_by_numpy() -> None:
    assert agent(encoder=OwnEncoder(features=np.prod((3, 3)))).trunk.number == 9


@pytest.mark.parametrize("features", [None, 0, 4.5])
def test_an_encoder_says_how_many_features_it_has(features: Any) -> None:
    with pytest.raises(ConfigError, match=rf"OwnEncoder\.build \(model\.encoder\) left features = {features}; it must"):
        agent(encoder=OwnEncoder(features=features))


class OwnActor(GaussianActor):
    """The default one, or what it is told to make of its answers."""

    def __init__(self, forward: Any = None, sample: Any = None) -> None:
        super().__init__()
        self.of_forward, self.of_sample = forward or (lambda given: given), sample or (lambda given: given)

    def forward(self, z: Tensor, previous_action: Tensor | None = None) -> Any:
        return self.of_forward(super().forward(z, previous_action))

    def sample(self, *arguments: Any) -> Any:
        return self.of_sample(super().sample(*arguments))


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (OwnActor(lambda given: given[0]), "forward (model.actor_head) gave float32 of shape (2, 2); it must give a "
                                           "tuple of 2: mean, log σ."),
        (OwnActor(lambda given: (given[0], given[1][:, :1])), "forward (model.actor_head) gave float32 of shape (2, 1) "
                                                              "as log σ of two images"),
        (OwnActor(sample=lambda given: given[:2]), "sample (model.actor_head) gave a tuple of 2; it must give a tuple "
                                                   "of 3: action, log π, tanh μ."),
        (OwnActor(sample=lambda given: (given[0], given[1][:, 0], given[2])), "sample (model.actor_head) gave float32 "
                                                                              "of shape (2,) as log π"),
    ],
)  # fmt: skip
def test_what_an_actor_head_gives(head: OwnActor, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"OwnActor.{told}")):
        try_parts(agent(actor_head=head))


def test_log_sigma_may_be_one_for_all_states() -> None:
    try_parts(agent(actor_head=OwnActor(lambda given: (given[0], given[1][0]))))


class OwnViews(OneView):
    """The default ones, or what it is told to make of them."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __call__(self, *arguments: Any) -> BatchViews:
        return self.make(super().__call__(*arguments))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda made: made.critic, "made a tuple; it must make BatchViews."),
        (lambda made: replace(made, critic=()), "made none as views for critic; it must make a tuple of at least one."),
        (lambda made: replace(made, target=made.target[0]), "made uint8 of shape (2, 9, 20, 20) as views for target"),
        (lambda made: replace(made, actor=made.actor / 255), "made float32 of shape (2, 9, 20, 20) as a view for a"),
        (lambda made: replace(made, target=(made.actor[..., :8],)), "made uint8 of shape (2, 9, 20, 8) as a view for"),
        (lambda made: replace(made, critic_weights=(0.5, 0.5)), "gave critic_weights = (0.5, 0.5) for 1 views; each"),
        (lambda made: replace(made, critic_weights=(math.nan,)), "gave critic_weights = (nan,) for 1 views; each"),
    ],
)  # fmt: skip
def test_what_views_are_made(make: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"OwnViews (model.views) {told}")):
        try_parts(agent(views=OwnViews(make)))


def test_trying_parts_changes_nothing_that_a_run_goes_on_with() -> None:
    module = agent(encoder=OwnEncoder(), augmentation=RandomShift(2))
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    torchs, own = torch.get_rng_state(), module.generator.get_state()
    try_parts(module)
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), torchs)
    assert torch.equal(module.generator.get_state(), own)
    assert module.training


def test_parts_are_tried_before_a_run_begins() -> None:
    """The Trainer calls this when weights are where they compute."""
    module = agent(encoder=OwnEncoder(lambda h: h[:, :5]))
    with pytest.raises(ConfigError, match="as features of two images"):
        L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False).fit(
            module, train_dataloaders=[batch()]
        )
