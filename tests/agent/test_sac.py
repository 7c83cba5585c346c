"""The SAC update against hand arithmetic and the rules that it must keep."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from covr_lightning.agent import (
    AheadPrior,
    AnnealedPrior,
    ConstantPrior,
    DeepMDP,
    DelayedPrior,
    GaussianActor,
    NoPrior,
    Objective,
    Prior,
    RandomTranslate,
    SACModule,
    SkilledPrior,
)
from covr_lightning.agent.checks import check_precision
from covr_lightning.agent.priors import imitation_error
from covr_lightning.counters import Counters
from covr_lightning.errors import ConfigError
from covr_lightning.random_state import _say_once, new_generator
from tests.agent.small_agents import agent, batch, parameters, same


@pytest.mark.parametrize("base", ["SAC", "DeepMDP", "RAD"])
def test_lambda_0_gives_the_base_agent_bit_for_bit_after_50_updates(base: str) -> None:
    def on_base(prior: Prior) -> SACModule:
        parts = {"SAC": {}, "DeepMDP": {"objectives": [DeepMDP()]}, "RAD": {"augmentation": RandomTranslate(24)}}
        return agent(**parts[base], prior=prior)

    plain, guided = on_base(NoPrior()), on_base(ConstantPrior(lam=1.0))
    others = [
        on_base(ConstantPrior(lam=0.0)),
        on_base(DelayedPrior(lam=0.0, after_rounds=0)),
        on_base(DelayedPrior(lam=3.0, after_rounds=1)),  # not started yet
    ]
    for update in range(50):
        b = batch(seed=update)
        for module in (plain, *others, guided):
            module.training_step(b.clone())
    for other in others:
        assert same(parameters(plain), parameters(other))
    assert not same(parameters(plain), parameters(guided), "actor.")


def test_critic_target_by_hand() -> None:
    module, b = agent(), batch()
    generator_state = module.generator.get_state()
    alpha = module.log_alpha.exp()
    y = module._target(b["next", "pixels"], b["action"], b["next", "reward"], (~b["next", "terminated"]).float(), alpha)
    module.generator.set_state(generator_state)
    h = module.trunk(b["next", "pixels"])
    a, log_pi, _ = module.actor.sample(module.actor_projection(h), module.generator)
    z = module.target_projection(module.target_trunk(b["next", "pixels"]))
    for i in range(len(b)):
        q1, q2 = module.target_critic(z[i : i + 1], a[i : i + 1])
        expected = b["next", "reward"][i].item()
        if not b["next", "terminated"][i]:
            expected += 0.99 * (min(q1.item(), q2.item()) - 0.1 * log_pi[i].item())
        assert y[i].item() == pytest.approx(expected, rel=1e-5)


def test_the_actor_moves_neither_encoder_nor_critics() -> None:
    module = agent(actor_every_grad_steps=1, target_every_grad_steps=10**6)
    before = parameters(module)
    critic_opt, *_ = module.optimizers()
    critic_opt.step = lambda *a, **k: None  # only actor and temperature step
    module.training_step(batch())
    after = parameters(module)
    for prefix in ("trunk.", "critic.", "critic_projection.", "target_"):
        assert same(before, after, prefix), prefix
    for prefix in ("actor.", "actor_projection.", "log_alpha"):
        assert not same(before, after, prefix), prefix
    assert all(p.requires_grad for p in module.critic.parameters())


def test_update_frequencies() -> None:
    module = agent(actor_every_grad_steps=2, target_every_grad_steps=3)
    changed: dict[str, list[int]] = {"actor.": [], "target_critic.": [], "critic.": []}
    for step in range(1, 7):
        before = parameters(module)
        module.training_step(batch(seed=step))
        after = parameters(module)
        for prefix in changed:
            if not same(before, after, prefix):
                changed[prefix].append(step)
    assert changed == {"actor.": [2, 4, 6], "target_critic.": [3, 6], "critic.": [1, 2, 3, 4, 5, 6]}


def test_targets_move_by_their_own_rates() -> None:
    module = agent(critic_tau=0.01, encoder_tau=0.05, target_every_grad_steps=1)
    before = parameters(module)
    module.training_step(batch())
    after = parameters(module)
    for part, tau in (("critic", 0.01), ("trunk", 0.05), ("projection", 0.05)):
        online = "critic_projection" if part == "projection" else part
        for name in [n for n in after if n.startswith(f"target_{part}.")]:
            source = after[name.replace(f"target_{part}", online, 1)]
            torch.testing.assert_close(after[name], (1 - tau) * before[name] + tau * source)


def test_log_pi_by_hand() -> None:
    actor = GaussianActor()
    actor.build(4, 2, 8)
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    a, log_pi, mean = actor.sample(z, torch.Generator().manual_seed(2))
    mu, log_std = actor(z)
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(2))
    for b in range(3):
        expected = 0.0
        for i in range(2):
            sigma = math.exp(log_std[b, i])
            u = float(mu[b, i]) + sigma * float(noise[b, i])
            gaussian = -((u - float(mu[b, i])) ** 2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
            expected += gaussian - math.log(1 - math.tanh(u) ** 2 + 1e-6)
            assert a[b, i].item() == pytest.approx(math.tanh(u), abs=1e-5)
        assert log_pi[b].item() == pytest.approx(expected, abs=1e-3)
    torch.testing.assert_close(mean, torch.tanh(mu))


def test_empty_batch_of_the_warm_up_changes_nothing() -> None:
    module = agent()
    before = parameters(module)
    module.training_step(TensorDict({}, []))
    assert same(before, parameters(module))
    assert module.counters.grad_steps == 0


def test_an_objective_moves_the_encoder_by_its_own_rate() -> None:
    class Shrink(Objective):
        def build(self, agent):
            self.scale = torch.nn.Parameter(torch.ones(()))

        def loss(self, batch, views, agent):
            loss = self.scale * agent.trunk(views.actor).square().mean()
            return loss, {"train/shrink": loss.detach()}

    module = agent(objectives=[Shrink(lr=1e-2, encoder_lr_multiplier=0.5)])
    optimizer = module.configure_optimizers()[-1]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 5e-3]
    plain = agent()
    for m in (module, plain):
        m.training_step(batch())
    assert not same(parameters(plain), parameters(module), "trunk.")


# -- priors ---------------------------------------------------------------------------------------------------------


def test_imitation_error_by_hand() -> None:
    # Rows: ‖(1, 0) − (0, 0)‖² = 1; masked; ‖(1, 1) − (0, −1)‖² = 1 + 4 = 5. Mean over the two labelled rows: 3.
    a_r = torch.tensor([[0.0, 0.0], [9.0, 9.0], [0.0, -1.0]], requires_grad=True)
    a_v = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    valid = torch.tensor([[True], [False], [True]])
    error = imitation_error(a_r, a_v, valid)
    assert error.item() == 3.0
    error.backward()
    # d/da_r = −2 (a_v − a_r) / 2 labelled rows.
    assert a_r.grad is not None
    assert a_r.grad.tolist() == [[-1.0, 0.0], [0.0, 0.0], [-1.0, -2.0]]
    assert imitation_error(a_r, a_v, torch.zeros(3, 1, dtype=torch.bool)).item() == 0.0
    assert imitation_error(a_r, a_v, valid, "batch").item() == 2.0  # 3 · 2 labelled rows / 3 rows
    assert imitation_error(a_r, a_v, torch.zeros(3, 1, dtype=torch.bool), "batch").item() == 0.0
    of_all = ConstantPrior(0.5, mean_over="batch")
    assert of_all.loss(a_r, a_v, valid, 0.5).item() == 1.0
    with pytest.raises(ConfigError, match=r"model\.prior\.mean_over is 'rows'; it can be 'labelled' or 'batch'"):
        ConstantPrior(mean_over="rows")  # type: ignore[arg-type]


def test_weights_of_the_priors() -> None:
    at = lambda env_steps=0, rounds=0: Counters(env_steps=env_steps, rounds=rounds)  # noqa: E731
    assert NoPrior().weight(at()) == 0
    assert not NoPrior().uses_vlm
    assert ConstantPrior(1.5).weight(at()) == 1.5
    delayed = DelayedPrior(lam=2.0, after_rounds=2)
    assert [delayed.weight(at(rounds=r)) for r in range(4)] == [0, 0, 2, 2]
    assert [delayed.wants_labels(at(rounds=r)) for r in range(4)] == [False, False, True, True]
    apl = AnnealedPrior()
    # 2 − 0.01·⌊t/200⌋: 2 at 0 and 199, 1.99 at 200, 1 at 20,000, the floor 0.1 from 38,000 on.
    weights = [apl.weight(at(env_steps=t)) for t in (0, 199, 200, 20_000, 38_000, 99_000)]
    assert weights == pytest.approx([2.0, 2.0, 1.99, 1.0, 0.1, 0.1])
    with pytest.raises(ConfigError, match=r"prior\.lam is -1"):
        ConstantPrior(-1)
    with pytest.raises(ConfigError, match=r"prior\.every_env_steps is 0; it must be 1 or more"):
        AnnealedPrior(every_env_steps=0)
    for wrong in (math.nan, math.inf):
        with pytest.raises(ConfigError, match=rf"prior\.lam is {wrong}; it must be 0 or more, and a number"):
            ConstantPrior(wrong)
    with pytest.raises(ConfigError, match=r"prior\.after_rounds is nan"):
        DelayedPrior(after_rounds=math.nan)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"prior\.floor is 0\.1; it must not be above model\.prior\.start, 0\.05"):
        AnnealedPrior(start=0.05)


def test_a_skilled_prior_guides_as_much_as_the_vlm_beats_a_constant() -> None:
    prior = SkilledPrior(lam=2.0, after_rounds=1)
    before, after = Counters(rounds=0), Counters(rounds=1)
    assert not prior.wants_labels(after)  # nothing was measured yet
    prior.measured(0.3, 0.4)  # 2 · (1 − 0.3 / 0.4) = 0.5
    assert (prior.weight(before), prior.weight(after)) == (0.0, pytest.approx(0.5))
    assert (prior.wants_labels(before), prior.wants_labels(after)) == (False, True)
    prior.measured(math.nan, math.nan)  # a round without training: as before
    assert prior.weight(after) == pytest.approx(0.5)
    prior.measured(0.3, 0.4, 0.75)  # three of four answers are no actions
    assert prior.weight(after) == pytest.approx(0.125)
    prior.measured(math.nan, 0.4, math.nan)  # nobody answered: as before
    assert prior.weight(after) == pytest.approx(0.125)
    prior.measured(math.nan, 0.4, 1.0)  # all answered, and none with an action
    assert prior.weight(after) == 0
    for error, constant in ((0.4, 0.4), (0.5, 0.4), (0.0, 0.0)):
        prior.measured(error, constant)
        assert prior.weight(after) == 0
        assert not prior.wants_labels(after)
    assert SkilledPrior(label_early=True).wants_labels(before)


def test_an_ahead_prior_guides_while_the_vlm_returns_more() -> None:
    prior = AheadPrior(lam=2.0)
    before, after = Counters(rounds=0), Counters(rounds=1)
    prior.evaluated(10.0)
    assert (prior.weight(after), prior.wants_labels(after)) == (0.0, False)  # the VLM has not acted yet
    prior.vlm_acted(30.0)
    assert [prior.weight(at) for at in (before, after)] == [0.0, 2.0]
    assert [prior.wants_labels(at) for at in (before, after)] == [False, True]
    for policy_return, lam in ((30.0, 0.0), (29.0, 2.0), (31.0, 0.0)):
        prior.evaluated(policy_return)
        assert (prior.weight(after), prior.wants_labels(after)) == (lam, lam > 0)
    prior.vlm_acted(-5.0)
    prior.evaluated(-6.0)  # returns may be negative
    assert prior.weight(after) == 2.0
    assert AheadPrior(label_early=True).wants_labels(before)


def test_impossible_sizes_are_refused_in_one_sentence() -> None:
    with pytest.raises(ConfigError, match="shrinks to nothing"):
        agent(strides=(2, 2, 2, 2))
    with pytest.raises(ConfigError, match=r"model\.gamma is 2"):
        agent(gamma=2)


def test_a_checkpoint_of_another_task_is_refused() -> None:
    module = agent()
    checkpoint: dict = {}
    module.on_save_checkpoint(checkpoint)
    other = copy.deepcopy(checkpoint)
    other["covr_spec"]["task"] = "walker-walk"
    with pytest.raises(ConfigError, match="of task 'walker-walk', this run's task is 'cartpole-swingup'"):
        module.on_load_checkpoint(other)
    with pytest.raises(ConfigError, match="names no task"):
        module.on_load_checkpoint({})
    module.on_load_checkpoint(checkpoint)


def test_a_checkpoint_whose_weights_mean_something_else_is_refused() -> None:
    module = agent()
    checkpoint: dict = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint.pop("covr_networks") == 2
    with pytest.raises(ConfigError, match="by another version of covr_lightning, whose networks read their features"):
        module.on_load_checkpoint(checkpoint)


def test_a_checkpoint_of_other_networks_is_refused() -> None:
    module, other = agent(hidden=8), agent(hidden=16)
    checkpoint: dict = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    module.on_load_checkpoint(checkpoint)
    sentence = r"critic\.q1\.0\.weight is \(8, \d+\) there, \(16, \d+\) here and \d+ more; set model as the config.yaml"
    with pytest.raises(ConfigError, match=sentence):
        other.on_load_checkpoint(checkpoint)
    del checkpoint["state_dict"]["log_alpha"]
    with pytest.raises(ConfigError, match=r"log_alpha is missing there, \(\) here; set"):
        module.on_load_checkpoint(checkpoint)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true", "64-true"])
def test_precisions_that_an_agent_cannot_train_in(precision: str) -> None:
    with pytest.raises(ConfigError, match=f"trainer.precision is '{precision}'; of an agent it can be '32-true' or"):
        check_precision(SimpleNamespace(precision=precision))  # type: ignore[arg-type]


def test_random_numbers_of_another_kind_of_device_are_replaced(caplog: pytest.LogCaptureFixture) -> None:
    cpu, there = torch.device("cpu"), torch.arange(16, dtype=torch.uint8)  # as long as that of a GPU
    _say_once.cache_clear()
    first, again, later = (torch.rand(3, generator=new_generator(cpu, 1, state)) for state in (there, there, there + 1))
    assert caplog.text.count("another kind of device than cpu") == 1
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    beginning = new_generator(cpu, 1)
    state = beginning.get_state()
    assert not torch.equal(first, torch.rand(3, generator=beginning))
    taken_over, seeded = new_generator(cpu, 2, state), new_generator(cpu, 1)
    assert torch.equal(torch.rand(3, generator=taken_over), torch.rand(3, generator=seeded))
