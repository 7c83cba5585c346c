"""CURL's loss against plain loops, what it may and may not move, and that it learns to tell images apart."""

from __future__ import annotations

import math

import pytest
import torch

from covr_lightning.agent import CURL, OneView, RandomCrop, SACModule
from tests.agent.small_agents import agent, batch, parameters


def loss(objective: CURL, module: SACModule, b) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    views = OneView()(b["pixels"], b["next", "pixels"], module.augmentation, module.generator)
    return objective.loss(b, views, module)


def test_loss_by_plain_loops() -> None:
    objective = CURL()
    module, b = agent(objectives=[objective], augmentation=RandomCrop(14)), batch()
    for p in (*module.target_trunk.parameters(), *module.target_projection.parameters()):
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    state = module.generator.get_state()
    total, metrics = loss(objective, module, b)

    module.generator.set_state(state)
    crop = RandomCrop(14)
    query_view, _, key_view = (crop(b[key], module.generator) for key in ("pixels", ("next", "pixels"), "pixels"))
    assert not torch.equal(query_view, key_view)
    q = module.critic_projection(module.trunk(query_view)).tolist()
    k = module.target_projection(module.target_trunk(key_view)).tolist()
    w = objective.w.tolist()
    terms, hits = [], 0
    for i in range(len(b)):
        similar = [sum(q[i][d] * w[d][e] * k[j][e] for d in range(8) for e in range(8)) for j in range(len(b))]
        terms.append(math.log(sum(math.exp(s) for s in similar)) - similar[i])
        hits += similar[i] == max(similar)
    assert total.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert metrics["train/curl_accuracy"].item() == pytest.approx(hits / len(b))


def test_one_pair_by_hand() -> None:
    # Two images whose latents are the unit vectors q_i = k_i = e_i, W = [[2, 0], [1, 1]]: logits [[2, 0], [1, 1]],
    # so L = ½ (log(1 + e⁻²) + log 2) = ½ (0.126928 + 0.693147).
    objective = CURL()
    module = agent(objectives=[objective], latent=2)
    objective.w.data = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    module.trunk = module.target_trunk = torch.nn.Identity()
    module.critic_projection = module.target_projection = torch.nn.Identity()
    b = batch(2)
    b["pixels"] = torch.eye(2)
    views = OneView()(b["pixels"], b["pixels"], module.augmentation, module.generator)
    total, metrics = objective.loss(b, views, module)
    assert total.item() == pytest.approx(0.4100375, abs=1e-6)
    assert metrics["train/curl_loss"].item() == total.item()


def test_gradient_reaches_w_and_the_online_encoder_alone() -> None:
    objective = CURL()
    module = agent(objectives=[objective], augmentation=RandomCrop(14))
    total, _ = loss(objective, module, batch())
    total.backward()
    got = {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert got == {"trunk", "critic_projection", "objectives"}


def test_its_optimizer_steps_the_encoder_at_twice_the_rate() -> None:
    module = agent(objectives=[CURL()])
    own, encoder = module.configure_optimizers()[-1].param_groups
    assert (own["lr"], encoder["lr"]) == (1e-3, 2e-3)
    assert [p.shape for p in own["params"]] == [(8, 8)]
    expected = [*module.trunk.parameters(), *module.critic_projection.parameters()]
    assert {id(p) for p in encoder["params"]} == {id(p) for p in expected}
    w = module.objectives[0].w.detach()
    assert 0 <= w.min() < w.max() < 1


def test_one_update_moves_what_it_should() -> None:
    late = {"actor_every_grad_steps": 100, "target_every_grad_steps": 100, "augmentation": RandomCrop(14)}
    with_it, without = agent(objectives=[CURL()], **late), agent(**late)
    for module in (with_it, without):
        module.training_step(batch())
    state = parameters(with_it)
    differ = {name.split(".")[0] for name, value in parameters(without).items() if not torch.equal(value, state[name])}
    assert differ == {"trunk", "critic_projection"}


def test_updates_learn_to_tell_images_apart() -> None:
    objective = CURL()
    module, b = agent(objectives=[objective], augmentation=RandomCrop(18), latent=16, filters=8), batch(16)
    colours = torch.randint(0, 250, (16, 9, 1, 1), generator=torch.Generator().manual_seed(3))
    b["pixels"] = (colours + b["pixels"] % 6).to(torch.uint8)  # what a crop leaves as it is
    before, _ = loss(objective, module, b)
    for _ in range(100):
        module.training_step(b)
    after, metrics = loss(objective, module, b)
    assert after < 0.5 * before
    assert metrics["train/curl_accuracy"] > 0.8
