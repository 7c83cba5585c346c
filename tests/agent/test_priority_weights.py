"""What a prioritising sampler changes of the update: the critics' loss, and that it is told of |δ|."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from covr_lightning.agent import DrQViews, RandomShift
from covr_lightning.agent.networks import squared_error
from tests.agent.small_agents import agent, batch, parameters, same


def test_weighted_squares_by_hand() -> None:
    # (½ · 1² + 2 · 3²) / 2 = 9.25
    q, y = torch.tensor([[1.0], [5.0]]), torch.tensor([[2.0], [2.0]])
    assert squared_error(q, y, torch.tensor([0.5, 2.0])).item() == 9.25
    assert squared_error(q, y, torch.tensor([[0.5], [2.0]])).item() == 9.25
    assert squared_error(q, y).item() == 5.0


def test_weights_multiply_each_rows_squared_error_and_delta_is_told() -> None:
    module, told = agent(), []
    module.td_error_listener = lambda index, delta: told.append((index, delta))
    b = batch()
    b["index"] = torch.arange(8) * 3
    b["priority_weight"] = torch.linspace(0.1, 1, 8)
    losses: list[Tensor] = []
    module.manual_backward = lambda loss: (losses.append(loss.detach()), loss.backward())  # type: ignore[method-assign]

    noise = module.generator.get_state()
    alpha = module.log_alpha.exp()
    with torch.no_grad():
        q = torch.cat(module.critic(module.critic_projection(module.trunk(b["pixels"])), b["action"]), 1)
        y = module._target(b["next", "pixels"], b["action"], b["next", "reward"], ~b["next", "terminated"], alpha)
    module.generator.set_state(noise)
    module.training_step(b)
    squares = [b["priority_weight"][i].item() * (q[i, j] - y[i, 0]).item() ** 2 for i in range(8) for j in range(2)]
    assert losses[0].item() == pytest.approx(sum(squares) / 8, rel=1e-5)
    [(index, delta)] = told
    assert torch.equal(index, b["index"])
    torch.testing.assert_close(delta, (q - y).abs().mean(1))


def test_of_several_views_delta_is_the_mean() -> None:
    module, told = agent(views=DrQViews(2, 2), augmentation=RandomShift(2)), []
    module.td_error_listener = lambda index, delta: told.append(delta)
    b = batch().set("index", torch.arange(8))
    noise = module.generator.get_state()
    views = module.views(b["pixels"], b["next", "pixels"], module.augmentation, module.generator)
    rest = (b["action"], b["next", "reward"], ~b["next", "terminated"], module.log_alpha.exp())
    with torch.no_grad():
        y = (module._target(views.target[0], *rest) + module._target(views.target[1], *rest)) / 2
        q = [q for view in views.critic for q in module.critic(module.critic_projection(module.trunk(view)), rest[0])]
    module.generator.set_state(noise)
    module.training_step(b)
    torch.testing.assert_close(told[0], sum((one - y).abs() for one in q)[:, 0] / 4)


def test_without_weights_a_listener_changes_nothing() -> None:
    plain, heard = agent(), agent()
    heard.td_error_listener = lambda index, delta: None
    for update in range(6):
        plain.training_step(batch(seed=update))
        heard.training_step(batch(seed=update).set("index", torch.arange(8)))
    assert same(parameters(plain), parameters(heard))
