"""SPR's loss against plain loops, what it may and may not move, and that it learns to foretell."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict

from covr_lightning.agent import SPR, NoAugmentation, RandomCrop, RandomIntensity, SACModule
from covr_lightning.errors import ConfigError
from tests.agent import small_agents
from tests.agent.small_agents import SPEC, parameters, same
from tests.agent.test_deepmdp import hidden_layer, linear


def agent(*objectives: SPR, **settings) -> SACModule:
    return small_agents.agent(objectives=objectives, **settings)


def batch(seed: int = 0, sequences: int = 5, length: int = 4) -> TensorDict:
    """Transitions, and sequences of them."""
    b, g = small_agents.batch(seed=seed), torch.Generator().manual_seed(seed + 1000)
    b.batch_size = []
    shape = (sequences, length + 1, SPEC.channels, SPEC.frame_height, SPEC.frame_width)
    b["sequences"] = TensorDict(
        {
            "pixels": torch.randint(0, 256, shape, dtype=torch.uint8, generator=g),
            "action": torch.rand(sequences, length, SPEC.action_dim, generator=g) * 2 - 1,
        },
        [sequences],
    )
    return b


def loss(objective: SPR, module: SACModule, b: TensorDict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    views = module.views(b["pixels"], b["next", "pixels"], module.augmentation, module.generator)
    return objective.loss(b, views, module)


def mlp(net: torch.nn.Sequential, x: list[float]) -> list[float]:
    return linear(net[2], [max(0.0, v) for v in linear(net[0], x)])


def normalised(x: list[float]) -> list[float]:
    length = max(math.sqrt(sum(v * v for v in x)), 1e-3)
    return [v / length for v in x]


def test_loss_by_plain_loops() -> None:
    objective = SPR(jumps=3, sequences=4, weight=5.0, hidden=12, projection=7)  # fewer and shorter than those drawn
    module, b = agent(objective, augmentation=RandomCrop(16)), batch()
    for p in (*objective.parameters(), *module.target_trunk.parameters(), *module.target_projection.parameters()):
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    views = module.views(b["pixels"], b["next", "pixels"], module.augmentation, module.generator)
    state = module.generator.get_state()
    total, metrics = objective.loss(b, views, module)

    module.generator.set_state(state)
    crop, intensity = RandomCrop(16), RandomIntensity()
    s = b["sequences"]["pixels"][:4, :4]
    came = intensity(crop(s[:, 1:].flatten(0, 1), module.generator), module.generator)
    first = intensity(crop(s[:, 0], module.generator), module.generator)
    z_0 = module.critic_projection(module.trunk(first)).tolist()
    z_bar = module.target_projection(module.target_trunk(came)).unflatten(0, (4, 3)).tolist()
    terms, cosines = [], []
    for i in range(4):
        z = z_0[i]
        for k in range(1, 4):
            za = z + b["sequences"]["action"][i, k - 1].tolist()
            z = linear(objective.transition.mu, hidden_layer(objective.transition.trunk, za))
            y = normalised(mlp(objective.predictor, mlp(objective.projector, z)))
            target = normalised(mlp(objective.target_projector, z_bar[i][k - 1]))
            terms.append(sum((p - q) ** 2 for p, q in zip(y, target, strict=True)))
            cosines.append(sum(p * q for p, q in zip(y, target, strict=True)))
    assert len(terms) == 12
    assert total.item() == pytest.approx(5 * sum(terms) / 12, rel=1e-4)
    assert metrics["train/spr_cosine"].item() == pytest.approx(sum(cosines) / 12, abs=1e-4)


def test_vectors_that_are_nearly_0_are_not_stretched() -> None:
    objective = SPR(jumps=2, sequences=4)
    module, b = agent(objective), batch(length=2)
    for net, value in ((objective.predictor, -1e-5), (objective.target_projector, 1e-5)):
        weight, bias = net[2].parameters()
        weight.data.zero_()
        bias.data.fill_(value)
    total, _ = loss(objective, module, b)
    # Opposite vectors of eight times 1e-5, over 1e-3: (2 · 1e-2)² · 8.
    assert total.item() == pytest.approx(8 * 0.02**2, rel=1e-4)


def test_gradient_reaches_what_foretells_alone() -> None:
    objective = SPR(jumps=4, sequences=5)
    module = agent(objective)
    total, _ = loss(objective, module, batch())
    total.backward()
    got = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.split(".")[0] for name in got} == {"trunk", "critic_projection", "objectives"}
    parts = {name.split(".")[2] for name in got if name.startswith("objectives")}
    assert parts == {"transition", "projector", "predictor"}


def test_its_optimizer_steps_the_encoder_at_three_times_the_rate() -> None:
    objective = SPR()
    module = agent(objective)
    own, encoder = module.configure_optimizers()[-1].param_groups
    assert (own["lr"], own["weight_decay"], encoder["lr"]) == (1e-3, 0, pytest.approx(3e-3))
    learnt = [*objective.transition.parameters(), *objective.projector.parameters(), *objective.predictor.parameters()]
    assert {id(p) for p in own["params"]} == {id(p) for p in learnt}
    assert {id(p) for p in encoder["params"]} == {
        id(p) for p in (*module.trunk.parameters(), *module.critic_projection.parameters())
    }


def test_its_target_moves_when_the_agents_do() -> None:
    objective = SPR(jumps=4, sequences=5, tau=0.25)
    module = agent(objective)
    before = parameters(objective)
    assert same(before, {k.replace("projector", "target_projector"): v for k, v in before.items()}, "target_projector")
    module.training_step(batch())
    assert same(before, parameters(objective), "target_projector.")
    module.training_step(batch(1))
    after = parameters(objective)
    for name in (n for n in before if n.startswith("target_projector.")):
        p = after[name.removeprefix("target_")]
        torch.testing.assert_close(after[name], 0.75 * before[name] + 0.25 * p)


def test_weight_0_leaves_the_base_agent_bit_for_bit() -> None:
    # Without a draw of its own: with one, the noise of the updates that follow would be another.
    base = agent(augmentation=RandomCrop(20))
    module = agent(SPR(4, sequences=5, weight=0.0, augmentation=NoAugmentation()), augmentation=RandomCrop(20))
    for update in range(20):
        for m in (base, module):
            m.training_step(batch(seed=update))
    assert same(parameters(base), parameters(module))


def test_one_update_moves_what_it_should() -> None:
    late = {"actor_every_grad_steps": 100, "target_every_grad_steps": 100, "augmentation": RandomCrop(14)}
    with_it, without = agent(SPR(4, sequences=5), **late), agent(**late)
    for module in (with_it, without):
        module.training_step(batch())
    state = parameters(with_it)
    differ = {name.split(".")[0] for name, value in parameters(without).items() if not torch.equal(value, state[name])}
    assert differ == {"trunk", "critic_projection"}


def test_updates_learn_to_foretell() -> None:
    objective = SPR(4, sequences=8, hidden=64)
    module, b = agent(objective, augmentation=RandomCrop(18), latent=16, filters=8), batch(sequences=8)
    # The colour of the next frame is the action.
    colours = (b["sequences"]["action"][..., 0] * 100 + 120).to(torch.uint8)
    b["sequences"]["pixels"][:, 1:] = colours[..., None, None, None]
    before, first = loss(objective, module, b)
    for _ in range(60):
        module.training_step(b)
    after, last = loss(objective, module, b)
    assert after < 0.5 * before
    assert last["train/spr_cosine"] > first["train/spr_cosine"]


def test_without_sequences_the_loss_is_0() -> None:
    objective = SPR(4, sequences=5)
    module, b = agent(objective, augmentation=RandomCrop(16)), batch()
    b["sequences"] = b["sequences"][:0]
    total, _ = loss(objective, module, b)
    total.backward()
    assert total.item() == 0
    assert not any(p.grad.any() for p in module.trunk.parameters() if p.grad is not None)
    for _ in range(2):
        module.training_step(b)
    assert all(p.isfinite().all() for p in module.parameters())


def test_intensity() -> None:
    images = torch.arange(0, 256, dtype=torch.uint8).view(1, 1, 16, 16).expand(3000, 3, 16, 16)
    bright = RandomIntensity(0.1)(images, torch.Generator().manual_seed(0))
    factors = bright[:, 0, 6, 4].float() / 100  # pixel 100, to within half of a hundredth
    n = torch.randn(3000, 1, 1, 1, generator=torch.Generator().manual_seed(0)).flatten().clamp(-2, 2)
    assert (factors - (1 + 0.1 * n)).abs().max() <= 0.005 + 1e-6
    assert bright[factors > 1.05, :, 15, 15].min() == 255  # no wrap beyond white
    assert torch.equal(RandomIntensity(0.0)(images[:2]), images[:2])
    with pytest.raises(ConfigError, match=r"scale is 0\.7"):
        RandomIntensity(0.7)


@pytest.mark.parametrize(
    ("name", "value"), [("jumps", 0), ("sequences", 0), ("weight", -1.0), ("tau", 1.5), ("hidden", 0)]
)
def test_wrong_values(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"SPR's {name} is {value}"):
        SPR(**{name: value})  # type: ignore[arg-type]


def test_an_augmentation_that_changes_the_size() -> None:
    with pytest.raises(ConfigError, match=r"RandomCrop .* changes the images' size"):
        agent(SPR(augmentation=RandomCrop(12)))
