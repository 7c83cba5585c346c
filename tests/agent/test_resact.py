"""ResAct's encoder and head by hand, where the previous action goes, and what is left when there is none."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict

from covr_lightning.agent import DeepMDP, RandomTranslate, ResActEncoder, ResidualActor, SACModule
from covr_lightning.envs import EnvSpec
from covr_lightning.errors import ConfigError
from tests.agent.small_agents import agent, batch, parameters, same

FOUR = EnvSpec("cartpole-swingup", 20, 20, 4, 2, 8, 1000)


def resact(**settings) -> SACModule:
    return agent(spec=FOUR, **{"encoder": ResActEncoder(), "actor_head": ResidualActor(), **settings})


def test_encoder_by_its_two_halves() -> None:
    encoder = ResActEncoder()
    encoder.build(12, (20, 20), 4, (2, 1))
    images = batch(spec=FOUR)["pixels"]
    frames = images.split(3, dim=1)  # oldest first
    now, before = torch.cat(frames[1:], dim=1), torch.cat(frames[:3], dim=1)
    convolve = lambda net, x: net.layers(x.float() / 255).permute(0, 2, 3, 1).flatten(1)  # noqa: E731
    torch.testing.assert_close(encoder(images), convolve(encoder.now, now) - convolve(encoder.before, before))
    assert encoder(images).shape == (8, encoder.features)
    assert not torch.equal(encoder.now.layers[0].weight, encoder.before.layers[0].weight)


def test_head_by_hand() -> None:
    actor = ResidualActor()
    actor.build(4, 2, 8)
    g = torch.Generator().manual_seed(1)
    z, a_prev = torch.randn(3, 4, generator=g), torch.rand(3, 2, generator=g) * 2 - 1
    mu, log_std = actor(z, a_prev)
    raw, _ = actor.mlp(torch.cat([z, a_prev], dim=1)).chunk(2, dim=1)
    torch.testing.assert_close(mu, a_prev + raw)
    a, log_pi, mean = actor.sample(z, torch.Generator().manual_seed(2), a_prev)
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(2))
    for b in range(3):
        expected = 0.0
        for i in range(2):
            sigma, centre = math.exp(log_std[b, i].item()), a_prev[b, i].item() + raw[b, i].item()
            u = centre + sigma * noise[b, i].item()
            gaussian = -((u - centre) ** 2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
            expected += gaussian - math.log(1 - math.tanh(u) ** 2 + 1e-6)
            assert a[b, i].item() == pytest.approx(math.tanh(u), abs=1e-5)
            assert mean[b, i].item() == pytest.approx(math.tanh(centre), abs=1e-5)
        assert log_pi[b].item() == pytest.approx(expected, abs=1e-3)


def test_the_next_states_previous_action_is_the_action() -> None:
    module, b = resact(), batch(spec=FOUR)
    o_next, r, not_done = b["next", "pixels"], b["next", "reward"], (~b["next", "terminated"]).float()
    state = module.generator.get_state()
    y = module._target(o_next, b["action"], r, not_done, module.log_alpha.exp())
    module.generator.set_state(state)
    z = module.actor_projection(module.trunk(o_next))
    a_next, log_pi, _ = module.actor.sample(z, module.generator, b["action"])
    q = torch.minimum(*module.target_critic(module.target_projection(module.target_trunk(o_next)), a_next))
    torch.testing.assert_close(y, r + 0.99 * not_done * (q - 0.1 * log_pi))

    seen = []
    module.actor.register_forward_hook(lambda net, inputs, output: seen.append(inputs[1]))
    for _ in range(2):  # the actor's turn comes with the second update
        module.training_step(b)
    for a_prev, key in zip(seen, ("action", "action", "previous_action"), strict=True):
        assert torch.equal(a_prev, b[key])


def test_the_actors_update_reads_the_previous_action_and_the_critics_does_not() -> None:
    modules = [resact(objectives=[DeepMDP()], target_every_grad_steps=100) for _ in range(2)]
    for update in range(2):
        b = batch(seed=update, spec=FOUR)
        modules[0].training_step(b)
        modules[1].training_step(b.set("previous_action", -b["previous_action"]))
    one, other = map(parameters, modules)
    for prefix in ("trunk.", "critic.", "critic_projection.", "objectives."):
        assert same(one, other, prefix), prefix
    for prefix in ("actor.", "actor_projection."):
        assert not same(one, other, prefix), prefix


def test_both_towers_learn_and_have_targets() -> None:
    module = resact(augmentation=RandomTranslate(24))
    before = parameters(module)
    for update in range(2):
        module.training_step(batch(seed=update, spec=FOUR))
    after = parameters(module)
    for prefix in ("trunk.now.", "trunk.before.", "target_trunk.now.", "target_trunk.before.", "actor.mlp.0."):
        assert not same(before, after, prefix), prefix


def still(b: TensorDict) -> TensorDict:
    """The same transitions with every action zero."""
    zero = torch.zeros_like(b["action"])
    return b.set("action", zero).set("previous_action", zero)


def test_without_previous_action_and_second_tower_it_is_the_plain_agent() -> None:
    plain, module = agent(), resact()
    state = parameters(plain)
    for name in [name for name in state if name.startswith(("trunk.", "target_trunk."))]:
        value = state.pop(name)
        state[name.replace("trunk.", "trunk.now.")] = value
        state[name.replace("trunk.", "trunk.before.")] = torch.zeros_like(value)
    first = parameters(module)["actor.mlp.0.weight"]
    state["actor.mlp.0.weight"] = torch.cat([state["actor.mlp.0.weight"], first[:, 8:]], dim=1)
    module.load_state_dict(state)
    module.trunk.before.requires_grad_(False)
    for update in range(12):
        b = still(batch(seed=update, spec=FOUR))
        module.training_step(b)
        newest = b.clone()
        newest["pixels"], newest["next", "pixels"] = b["pixels"][:, 3:], b["next", "pixels"][:, 3:]
        plain.training_step(newest)
    after, expected = parameters(module), parameters(plain)
    for name, value in expected.items():
        got = after[name.replace("trunk.", "trunk.now.")]
        if name == "actor.mlp.0.weight":
            assert torch.equal(got[:, 8:], first[:, 8:])  # the weights of a₋ = 0 have no gradient
            got = got[:, :8]
        # Two columns of zeros more change the order in which the first layer's sums are rounded.
        torch.testing.assert_close(got, value, rtol=0, atol=1e-6, msg=name)
    assert not after["trunk.before.layers.0.weight"].any()
    pixels = b["pixels"]
    torch.testing.assert_close(module.act(pixels, True), plain.act(pixels[:, 3:], True), rtol=0, atol=1e-6)


def test_acting_and_values_take_the_previous_action() -> None:
    module, b = resact(), batch(spec=FOUR)
    pixels, a_prev = b["pixels"], b["previous_action"]
    assert module.needs_previous_action
    assert not agent().needs_previous_action
    first = module.act(pixels, deterministic=True)
    assert torch.equal(first, module.act(pixels, deterministic=True, previous_action=torch.zeros(8, 2)))
    then = module.act(pixels, deterministic=True, previous_action=a_prev)
    z = module.actor_projection(module.trunk(pixels))
    torch.testing.assert_close(then, torch.tanh(module.actor(z, a_prev)[0]).detach())
    assert not torch.equal(first, then)
    generator = torch.Generator().manual_seed(0)
    action, log_pi, _ = module.actor.sample(z, generator, a_prev)
    entropy, noise = module.spread(pixels, a_prev)
    assert entropy == pytest.approx(-log_pi.mean().item() / 2, rel=1e-4)
    assert noise == pytest.approx((action - then).abs().mean().item(), rel=1e-4)
    assert module.state_value(pixels, a_prev).shape == (8,)
    for ask in (module.spread, module.state_value):
        with pytest.raises(TypeError, match="previous action, and none was given"):
            ask(pixels)
    with pytest.raises(KeyError, match="previous_action"):
        module.training_step(b.exclude("previous_action"))


def test_one_frame_is_too_few() -> None:
    with pytest.raises(ConfigError, match=r"ResActEncoder compares frames, but data\.env\.frame_stack is 1"):
        agent(spec=EnvSpec("x", 20, 20, 1, 2, 8, 1000), encoder=ResActEncoder())
