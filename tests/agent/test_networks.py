"""The networks behind the encoder by hand, and how they begin."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from covr_lightning.agent import GaussianActor
from covr_lightning.agent.networks import Projection, TwinQ
from tests.agent.small_agents import agent, parameters


def perceptron(x: Tensor, net: nn.Sequential) -> Tensor:
    """Three linear layers with a ReLU between each two, by their matrices."""
    first, second, last = (layer for layer in net if isinstance(layer, nn.Linear))
    hidden = (x @ first.weight.T + first.bias).clamp(min=0)
    hidden = (hidden @ second.weight.T + second.bias).clamp(min=0)
    return hidden @ last.weight.T + last.bias


@pytest.mark.parametrize("tanh", [False, True])
def test_a_projection_is_linear_then_normalised(tanh: bool) -> None:
    torch.manual_seed(0)
    projection, h = Projection(6, 4, tanh), 3 * torch.randn(5, 6)
    nn.init.normal_(projection.norm.weight)
    nn.init.normal_(projection.norm.bias)
    x = h @ projection.linear.weight.T + projection.linear.bias
    centred = x - x.mean(1, keepdim=True)
    x = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * projection.norm.weight + projection.norm.bias
    torch.testing.assert_close(projection(h), x.tanh() if tanh else x)


def test_two_critics_with_weights_of_their_own() -> None:
    torch.manual_seed(0)
    critic, z, a = TwinQ(3, 2, 8), torch.randn(5, 3), torch.randn(5, 2)
    q1, q2 = critic(z, a)
    assert not torch.equal(q1, q2)
    za = torch.stack([torch.tensor([*z[i].tolist(), *a[i].tolist()]) for i in range(5)])
    torch.testing.assert_close(q1, perceptron(za, critic.q1))
    torch.testing.assert_close(q2, perceptron(za, critic.q2))


def test_an_actors_outputs() -> None:
    torch.manual_seed(0)
    head, z = GaussianActor(log_std_bounds=(-5.0, 1.0)), 4 * torch.randn(64, 3)
    head.build(3, 2, 8)
    mu, log_std = head(z)
    out = perceptron(z, head.mlp)
    torch.testing.assert_close(mu, out[:, :2])
    torch.testing.assert_close(log_std, -5 + 6 * (out[:, 2:].tanh() + 1) / 2)  # −1 to 1 becomes −5 to 1
    assert GaussianActor().log_std_bounds == (-10.0, 2.0)


def test_layers_begin_orthogonal_and_without_biases() -> None:
    module = agent()
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert len(layers) > 10
    for layer in layers:
        assert layer.bias is not None
        assert not layer.bias.any()
        if isinstance(layer, nn.Linear):
            weight = layer.weight if layer.in_features >= layer.out_features else layer.weight.T
            torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), atol=1e-5, rtol=0)


def test_targets_begin_as_what_they_follow() -> None:
    state = parameters(agent())
    for target, online in (("trunk", "trunk"), ("projection", "critic_projection"), ("critic", "critic")):
        names = [name for name in state if name.startswith(f"target_{target}.")]
        assert names
        for name in names:
            assert torch.equal(state[name], state[name.replace(f"target_{target}", online, 1)]), name
    assert math.isclose(state["log_alpha"].exp().item(), 0.1, rel_tol=1e-6)
