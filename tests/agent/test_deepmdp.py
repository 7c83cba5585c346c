"""DeepMDP's loss against plain loops, and what it may and may not move."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from covr_lightning.agent import DeepMDP, RandomCrop, SACModule
from covr_lightning.errors import ConfigError
from tests.agent import small_agents
from tests.agent.small_agents import batch


def agent(*objectives: DeepMDP, **settings) -> SACModule:
    return small_agents.agent(objectives=objectives, **settings)


def loss(objective: DeepMDP, module: SACModule, b: TensorDict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    views = module.views(b["pixels"], b["next", "pixels"], module.augmentation, module.generator)
    return objective.loss(b, views, module)


def linear(layer: torch.nn.Module, x: list[float]) -> list[float]:
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def hidden_layer(trunk: torch.nn.Sequential, x: list[float]) -> list[float]:
    """Linear, LayerNorm (ε = 1e-5, biased variance) and ReLU, one number at a time."""
    y = linear(trunk[0], x)
    mean = sum(y) / len(y)
    std = math.sqrt(sum((v - mean) ** 2 for v in y) / len(y) + 1e-5)
    scale, shift = trunk[1].weight.tolist(), trunk[1].bias.tolist()
    return [max(0.0, (v - mean) / std * s + b) for v, s, b in zip(y, scale, shift, strict=True)]


@pytest.mark.parametrize("stochastic", [False, True])
def test_loss_by_plain_loops(stochastic: bool) -> None:
    objective = DeepMDP(hidden=12, stochastic=stochastic)
    module, b = agent(objective), batch()
    for p in objective.parameters():  # LayerNorm's scales and shifts too
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    total, metrics = loss(objective, module, b)

    z = module.critic_projection(module.trunk(b["pixels"])).tolist()
    z_next = module.critic_projection(module.trunk(b["next", "pixels"])).tolist()
    terms, squares = [], []
    for i in range(len(b)):
        za = z[i] + b["action"][i].tolist()
        h = hidden_layer(objective.transition.trunk, za)
        mu = linear(objective.transition.mu, h)
        sigma = [1.0] * 8
        if stochastic:
            sigma = [1e-4 + (10 - 1e-4) / (1 + math.exp(-v)) for v in linear(objective.transition.sigma, h)]
        terms += [0.5 * ((mu[d] - z_next[i][d]) / sigma[d]) ** 2 + math.log(sigma[d]) for d in range(8)]
        (r,) = linear(objective.reward[3], hidden_layer(objective.reward[:3], za))
        squares.append((r - b["next", "reward"][i].item()) ** 2)
    assert metrics["train/transition_loss"].item() == pytest.approx(np.mean(terms), rel=1e-4)
    assert metrics["train/reward_loss"].item() == pytest.approx(np.mean(squares), rel=1e-4)
    assert total.item() == pytest.approx(np.mean(terms) + np.mean(squares), rel=1e-4)


def test_gradient_reaches_the_encoder_through_s_alone() -> None:
    objective = DeepMDP(hidden=12)
    module, b = agent(objective), batch()
    total, _ = loss(objective, module, b)
    total.backward()
    got = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    moved = {"trunk", "critic_projection", "objectives"}
    assert {name.split(".")[0] for name in got} == moved
    assert all(got[name].abs().sum() > 0 for name in got if name.endswith("weight"))

    # The same loss with z' as a constant has the same gradient: none comes through s'.
    constant = module.critic_projection(module.trunk(b["next", "pixels"])).detach()
    za = torch.cat([module.critic_projection(module.trunk(b["pixels"])), b["action"]], -1)
    mu, _ = objective.transition(za)
    error = (0.5 * (mu - constant) ** 2).mean() + ((objective.reward(za) - b["next", "reward"]) ** 2).mean()
    names = [name for name in got if not name.startswith("objectives")]
    parameters = dict(module.named_parameters())
    for name, expected in zip(names, torch.autograd.grad(error, [parameters[n] for n in names]), strict=True):
        torch.testing.assert_close(got[name], expected)


def test_the_next_latent_is_of_the_encoder_that_learns() -> None:
    objective = DeepMDP(hidden=12)
    module, b = agent(objective), batch()
    before, _ = loss(objective, module, b)
    for p in (*module.target_trunk.parameters(), *module.target_projection.parameters()):
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    assert torch.equal(loss(objective, module, b)[0], before)


def test_learning_rates_and_weight_decay_of_its_optimizer() -> None:
    module = agent(DeepMDP(lr=1e-2, encoder_lr_multiplier=0.5, weight_decay=1e-3))
    own, encoder = module.configure_optimizers()[-1].param_groups
    assert (own["lr"], own["weight_decay"]) == (1e-2, 1e-3)
    assert (encoder["lr"], encoder["weight_decay"]) == (5e-3, 0)
    assert {id(p) for p in own["params"]} == {id(p) for p in module.objectives.parameters()}
    expected = [*module.trunk.parameters(), *module.critic_projection.parameters()]
    assert {id(p) for p in encoder["params"]} == {id(p) for p in expected}
    defaults = agent(DeepMDP()).configure_optimizers()[-1].param_groups
    assert [(g["lr"], g["weight_decay"]) for g in defaults] == [(1e-3, 1e-7), (1e-3, 0)]


def test_one_update_moves_what_it_should() -> None:
    # Actor and targets do not update in the first step, so the objective is all that can differ beside the critics.
    late = {"actor_every_grad_steps": 100, "target_every_grad_steps": 100}
    with_it, without = agent(DeepMDP(), **late), agent(**late)
    for module in (with_it, without):
        module.training_step(batch())
    state = with_it.state_dict()
    differ = {name.split(".")[0] for name, value in without.state_dict().items() if not torch.equal(value, state[name])}
    assert differ == {"trunk", "critic_projection"}


def test_an_objective_that_leaves_the_encoder_alone_gives_the_base_agent_bit_for_bit() -> None:
    base = agent(augmentation=RandomCrop(16))
    module = agent(DeepMDP(encoder_lr_multiplier=0.0), augmentation=RandomCrop(16))
    for update in range(20):
        for m in (base, module):
            m.training_step(batch(seed=update))
    state = module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("stochastic", [False, True])
def test_updates_on_a_fixed_batch_reduce_the_loss(stochastic: bool) -> None:
    objective = DeepMDP(hidden=64, stochastic=stochastic)
    module, b = agent(objective), batch()
    before, _ = loss(objective, module, b)
    for _ in range(40):
        module.training_step(b)
    after, metrics = loss(objective, module, b)
    assert after < before - 0.5 * abs(before)
    assert metrics["train/reward_loss"] < 0.05


def test_sigma_stays_within_its_bounds() -> None:
    objective = DeepMDP(hidden=4, stochastic=True)
    agent(objective)
    with torch.no_grad():
        objective.transition.sigma.bias.copy_(torch.tensor([-1e4, 1e4] * 4))
    _, sigma = objective.transition(torch.zeros(1, 10))
    torch.testing.assert_close(sigma[0, :2], torch.tensor([1e-4, 10.0]))


def test_wrong_width() -> None:
    with pytest.raises(ConfigError, match="hidden is 0"):
        DeepMDP(hidden=0)
