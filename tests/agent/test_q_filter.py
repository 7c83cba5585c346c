"""Guidance on those rows alone where the critics think more of the VLM's action."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from covr_lightning.agent import AheadPrior, AnnealedPrior, ConstantPrior, DelayedPrior, NoPrior, SkilledPrior
from covr_lightning.agent.priors import imitation_error
from tests.agent.small_agents import agent, batch, parameters, same


def test_rows_that_do_not_count_add_0_to_the_same_mean() -> None:
    # Squared distances 1, (no label), 5 and 9. With the first not counted: (0 + 5 + 9) / 3 labelled rows.
    a_r = torch.tensor([[0.0, 0.0], [9.0, 9.0], [0.0, -1.0], [0.0, 0.0]], requires_grad=True)
    a_v = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [3.0, 0.0]])
    valid = torch.tensor([[True], [False], [True], [True]])
    counted = torch.tensor([[False], [True], [True], [True]])
    error = imitation_error(a_r, a_v, valid, counted=counted)
    assert error.item() == pytest.approx(14 / 3)
    error.backward()
    assert a_r.grad is not None
    assert a_r.grad.tolist() == [[0.0, 0.0], [0.0, 0.0], pytest.approx([-2 / 3, -4 / 3]), pytest.approx([-2.0, 0.0])]
    assert imitation_error(a_r, a_v, valid, "batch", counted).item() == pytest.approx(14 / 4)
    assert imitation_error(a_r, a_v, valid, "batch", counted & False).item() == 0.0
    prior = ConstantPrior(2.0, q_filter=True)
    assert prior.loss(a_r, a_v, valid, 2.0, counted).item() == pytest.approx(28 / 3)


@pytest.mark.parametrize("action", ["sample", "mean"])
def test_an_update_counts_the_rows_whose_answer_the_critics_prefer(action: str) -> None:
    seen: dict[str, torch.Tensor] = {}

    class Noted(ConstantPrior):
        def loss(self, a_r: torch.Tensor, a_v: torch.Tensor, valid: torch.Tensor, *rest: Any) -> torch.Tensor:
            lam, preferred = rest
            seen["preferred"], seen["loss"] = preferred, super().loss(a_r, a_v, valid, lam, preferred)
            with torch.no_grad():
                module.generator.set_state(drawn)
                h = module.trunk(data["pixels"])
                drew = module.actor.sample(module.actor_projection(h), module.generator, None)[0]
                z = module.critic_projection(h)
                value = lambda i, a: min(q.item() for q in module.critic(z[i : i + 1], a[i : i + 1]))  # noqa: E731
                seen["naive"] = torch.tensor([[value(i, a_v) > value(i, drew)] for i in range(len(a_v))])
                squared = [sum((a_v[i] - a_r[i]).square().tolist()) for i in range(len(a_v))]
            counts = [s * float(p) for s, p, v in zip(squared, seen["naive"], valid, strict=True) if v]
            seen["by hand"] = lam * torch.tensor(sum(counts) / len(counts))
            return seen["loss"]

    prior = Noted(2.0, action, q_filter=True)  # type: ignore[arg-type]
    module, data = agent(prior=prior, actor_every_grad_steps=1), batch(32)
    sample, logged = module.actor.sample, {}

    def noting(*arguments: Any) -> Any:
        nonlocal drawn
        drawn = module.generator.get_state()
        return sample(*arguments)

    drawn = module.generator.get_state()
    module.actor.sample = noting  # type: ignore[method-assign]
    module.log_update = logged.update  # type: ignore[method-assign, assignment]
    module.training_step(data)
    assert torch.equal(seen["preferred"], seen["naive"])
    assert 0 < seen["naive"].sum() < 32
    assert seen["loss"].item() == pytest.approx(seen["by hand"].item(), rel=1e-5)
    of_labelled = seen["naive"][data["a_v_valid"]].float().mean()
    assert logged["train/preferred"].item() == pytest.approx(of_labelled.item())


def test_without_it_every_answer_counts() -> None:
    priors = [ConstantPrior(1.0), ConstantPrior(1.0, q_filter=True), NoPrior()]
    modules = [agent(prior=prior, actor_every_grad_steps=1) for prior in priors]
    for module in modules:
        module.training_step(batch())
    plain, filtered, unguided = map(parameters, modules)
    assert not same(plain, filtered, "actor.")
    assert not same(filtered, unguided, "actor.")
    for prefix in ("critic.", "trunk."):  # the actor alone is guided
        assert same(plain, filtered, prefix)


@pytest.mark.parametrize("kind", [ConstantPrior, DelayedPrior, SkilledPrior, AheadPrior, AnnealedPrior])
def test_every_prior_has_the_setting(kind: type) -> None:
    assert kind(q_filter=True).q_filter
    assert not kind().q_filter
