"""DrQ's and SVEA's views: their losses against naive sums, and what they become when there is nothing to augment."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from covr_lightning.agent import (
    Augmentation,
    DrQViews,
    NoAugmentation,
    OneView,
    RandomConvolution,
    RandomCrop,
    RandomShift,
    RandomTranslate,
    SACModule,
    SVEAViews,
)
from covr_lightning.errors import ConfigError
from tests.agent.small_agents import agent, batch, parameters, same


def assert_same_after_updates(a: SACModule, b: SACModule, updates: int = 12) -> None:
    for update in range(updates):
        for module in (a, b):
            module.training_step(batch(seed=update))
    assert same(parameters(a), parameters(b))


@pytest.mark.parametrize("augmentation", [RandomShift(2), RandomCrop(16), RandomTranslate(24)])
def test_drq_with_one_view_of_each_is_the_base_agent_bit_for_bit(augmentation: Augmentation) -> None:
    assert_same_after_updates(
        agent(augmentation=augmentation), agent(augmentation=augmentation, views=DrQViews(k=1, m=1))
    )


def test_drq_with_one_view_and_shift_0_is_sac_bit_for_bit() -> None:
    assert_same_after_updates(agent(), agent(augmentation=RandomShift(0), views=DrQViews(k=1, m=1)))


@pytest.mark.parametrize("augmentation", [NoAugmentation(), RandomCrop(16), RandomTranslate(24)])
def test_svea_with_nothing_strong_is_the_base_agent_bit_for_bit(augmentation: Augmentation) -> None:
    # Halves are exact: ½L + ½L is L, and so are the gradients of the two passes.
    views = SVEAViews(strong=NoAugmentation(), alpha=0.5, beta=0.5)
    assert_same_after_updates(agent(augmentation=augmentation), agent(augmentation=augmentation, views=views))


def naive_loss(module: SACModule, critic_views: list, weights: list[float], target_views: list, b) -> torch.Tensor:
    """Σ_views w · (1/B) Σ_b Σ_i (Q_i − y)², with y a plain mean over the target's views; one row at a time."""
    alpha = module.log_alpha.exp().item()
    ys = []
    for view in target_views:
        a, log_pi, _ = module.actor.sample(module.actor_projection(module.trunk(view)), module.generator)
        q1, q2 = module.target_critic(module.target_projection(module.target_trunk(view)), a)
        ys.append(
            [
                b["next", "reward"][i].item()
                + (0.0 if b["next", "terminated"][i] else 0.99)
                * (min(q1[i].item(), q2[i].item()) - alpha * log_pi[i].item())
                for i in range(len(b))
            ]
        )
    y = [sum(column) / len(ys) for column in zip(*ys, strict=True)]
    total = torch.zeros(())
    for view, weight in zip(critic_views, weights, strict=True):
        q1, q2 = module.critic(module.critic_projection(module.trunk(view)), b["action"])
        for i in range(len(b)):
            total = total + weight * ((q1[i, 0] - y[i]) ** 2 + (q2[i, 0] - y[i]) ** 2) / len(b)
    return total


def assert_gradients_are(module: SACModule, b, expected: dict[str, torch.Tensor]) -> None:
    critic_opt, *_ = module.optimizers()
    critic_opt.step = lambda *a, **k: None
    module.training_step(b)  # the actor's turn comes with the second update
    for name, gradient in expected.items():
        torch.testing.assert_close(module.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)


def gradients(module: SACModule, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [n for n, _ in module.named_parameters() if n.startswith(("trunk.", "critic.", "critic_projection."))]
    return dict(zip(names, torch.autograd.grad(loss, [module.get_parameter(n) for n in names]), strict=True))


@pytest.mark.parametrize(("k", "m"), [(2, 2), (3, 1), (1, 2)])
def test_drq_loss_by_naive_sums(k: int, m: int) -> None:
    module, b = agent(augmentation=RandomShift(3), views=DrQViews(k=k, m=m)), batch()
    state = module.generator.get_state()
    shift, critic_views, target_views = RandomShift(3), [], []
    for _ in range(max(k, m)):
        critic_views += [shift(b["pixels"], module.generator)]
        target_views += [shift(b["next", "pixels"], module.generator)]
    expected = gradients(module, naive_loss(module, critic_views[:m], [1.0] * m, target_views[:k], b))
    module.generator.set_state(state)
    assert_gradients_are(module, b, expected)


def test_svea_loss_by_naive_sums() -> None:
    module, b = agent(augmentation=RandomShift(3), views=SVEAViews(alpha=0.7, beta=0.2)), batch()
    state = module.generator.get_state()
    o, o_next = (RandomShift(3)(b[key], module.generator) for key in ("pixels", ("next", "pixels")))
    strong = RandomConvolution()(o, module.generator)
    expected = gradients(module, naive_loss(module, [o, strong], [0.7, 0.2], [o_next], b))
    module.generator.set_state(state)
    assert_gradients_are(module, b, expected)


def test_sveas_target_and_actor_see_plain_views() -> None:
    b = batch()
    plain = OneView()(b["pixels"], b["next", "pixels"], RandomShift(3), torch.Generator().manual_seed(4))
    views = SVEAViews()(b["pixels"], b["next", "pixels"], RandomShift(3), torch.Generator().manual_seed(4))
    assert torch.equal(views.actor, plain.actor)
    assert torch.equal(views.critic[0], plain.actor)
    assert torch.equal(views.target[0], plain.target[0])
    assert len(views.target) == 1
    assert (views.critic[1] != plain.actor).float().mean() > 0.9


def test_drqs_views_are_independent_but_a_pair_is_placed_alike() -> None:
    b = batch()
    views = DrQViews(k=2, m=2)(b["pixels"], b["pixels"], RandomTranslate(40), torch.Generator().manual_seed(0))
    assert not torch.equal(views.critic[0], views.critic[1])
    assert all(torch.equal(o, o_next) for o, o_next in zip(views.critic, views.target, strict=True))
    views = DrQViews(k=2, m=2)(b["pixels"], b["pixels"], RandomCrop(10), torch.Generator().manual_seed(0))
    assert not torch.equal(views.critic[0], views.target[0])


def test_drqs_actor_sees_the_first_of_the_critics_views() -> None:
    b = batch()
    views = DrQViews(k=1, m=3)(b["pixels"], b["next", "pixels"], RandomShift(3), torch.Generator().manual_seed(0))
    assert torch.equal(views.actor, views.critic[0])
    assert not torch.equal(views.actor, views.critic[-1])


def test_random_convolution_by_plain_loops() -> None:
    images = torch.randint(0, 256, (3, 6, 7, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    out = RandomConvolution()(images, torch.Generator().manual_seed(2))
    kernels = torch.randn(9, 3, 3, 3, generator=torch.Generator().manual_seed(2)).reshape(3, 3, 3, 3, 3)
    assert (out.shape, out.dtype) == (images.shape, torch.uint8)
    padded = F.pad(images.double() / 255, (1, 1, 1, 1), mode="replicate").tolist()
    for b, t, channel, y, x in [(0, 0, 0, 0, 0), (0, 1, 2, 3, 4), (1, 0, 1, 6, 4), (2, 1, 0, 2, 2), (2, 0, 2, 6, 0)]:
        total = sum(
            kernels[b, channel, c, dy, dx].item() * padded[b][3 * t + c][y + dy][x + dx]
            for c in range(3)
            for dy in range(3)
            for dx in range(3)
        )
        assert out[b, 3 * t + channel, y, x].item() == pytest.approx(255 / (1 + math.exp(-total)), abs=0.501)


def test_random_convolution_is_one_for_all_frames_and_another_for_each_image() -> None:
    frame = torch.randint(0, 256, (1, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = frame.repeat(4, 3, 1, 1)
    out = RandomConvolution()(images, torch.Generator().manual_seed(2))
    assert torch.equal(out[:, :3], out[:, 3:6])
    assert torch.equal(out[:, :3], out[:, 6:])
    assert not torch.equal(out[0], out[1])
    assert torch.equal(RandomConvolution().centre(images), images)


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError, match=r"model\.views\.k is 0; it must be at least 1"):
        DrQViews(k=0)
    with pytest.raises(ConfigError, match=r"model\.views\.beta is -1"):
        SVEAViews(beta=-1)
    with pytest.raises(ConfigError, match=r"RandomCrop .* changes the images' size"):
        agent(views=SVEAViews(strong=RandomCrop(10)))
