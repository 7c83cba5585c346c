"""What makes the update fast leaves it what it is: compiled networks, bfloat16, nothing read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import SGD

from covr_lightning.agent import CURL, SPR, ConstantPrior, DeepMDP, RandomCrop, SACModule
from covr_lightning.agent.finite import FiniteGuard
from covr_lightning.agent.networks import OutputLinear, TwinQ
from covr_lightning.agent.objectives import Objective
from covr_lightning.envs import EnvSpec
from covr_lightning.errors import ConfigError
from tests.agent.small_agents import SPEC, agent, batch, parameters, same
from tests.agent.test_spr import batch as with_sequences
from tests.short_runs import fit


def test_compiled_networks_make_the_same_updates() -> None:
    plain, compiled = agent(), agent(torch_compile="eager")  # traced, and run as it is
    compiled.compile_networks()
    for update in range(4):
        for module in (plain, compiled):
            module.training_step(batch(seed=update))
    assert compiled.trunk._compiled_call_impl is not None
    assert same(parameters(plain), parameters(compiled))


def test_only_updates_are_compiled() -> None:
    sizes: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    plain, compiled = agent(), agent()
    compiled.trunk.compile(backend=backend, dynamic=False)
    compiled.actor_projection.compile(backend=backend, dynamic=False)
    for n in (1, 3, 5):
        frames, actions = batch(n)["pixels"], batch(n)["action"]
        assert torch.equal(plain.act(frames, deterministic=True), compiled.act(frames, deterministic=True))
        assert plain.spread(frames) == compiled.spread(frames)
        assert torch.equal(plain.min_q(frames, actions), compiled.min_q(frames, actions))
        assert torch.equal(plain.state_value(frames), compiled.state_value(frames))
    assert not sizes
    compiled.training_step(batch())
    assert sizes


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.torch_compile is 'fast'; it can be null or one of .*inductor"):
        SACModule(SPEC, torch_compile="fast")


def test_in_bfloat16_the_losses_and_the_policys_density_are_still_float32() -> None:
    plain, half = agent(), agent()
    for update in range(4):
        plain.training_step(batch(32, seed=update))
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # as Lightning sets it
            assert half.trunk(batch()["pixels"]).dtype == torch.bfloat16
            assert {v.dtype for v in half.actor.sample(torch.zeros(2, 8))} == {torch.float32}
            assert {v.dtype for v in half.critic(torch.zeros(2, 8), torch.zeros(2, 2))} == {torch.float32}
            half.training_step(batch(32, seed=update))
    a, b = parameters(plain), parameters(half)
    assert not same(a, b)
    assert all(torch.isfinite(value).all() for value in b.values())
    # Adam moves each weight by about its learning rate a step; bfloat16 keeps 8 bits of a gradient.
    assert all((a[name] - b[name]).abs().max() <= 2 * 4 * 1e-3 for name in a)


@pytest.mark.parametrize(
    "objective", [DeepMDP(), DeepMDP(stochastic=True), SPR(jumps=4), CURL()], ids=lambda o: type(o).__name__
)
def test_in_bfloat16_what_an_objective_compares_is_subtracted_in_float32(objective: Objective) -> None:
    module, transitions = agent(objectives=[objective]), with_sequences()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        views = module.views(
            transitions["pixels"], transitions["next", "pixels"], module.augmentation, module.generator
        )
        loss, metrics = objective.loss(transitions, views, module)
    assert {value.dtype for value in (loss, *metrics.values())} == {torch.float32}


def test_in_bfloat16_values_of_hundreds_are_not_rounded_to_steps_of_two() -> None:
    """Against the same hidden layers, with the last one by hand in float64."""
    torch.manual_seed(0)
    critic = TwinQ(8, 2, hidden=256)
    for q in (critic.q1, critic.q2):
        q[-1].bias.data.fill_(400.0)
    g = torch.Generator().manual_seed(0)
    z, a = torch.randn(512, 8, generator=g), torch.rand(512, 2, generator=g)
    with torch.autocast("cpu", torch.bfloat16):
        values = torch.cat(critic(z, a), -1)
        hidden = [q[:-1](torch.cat([z, a], -1)).double() for q in (critic.q1, critic.q2)]
    exact = torch.cat(
        [h @ q[-1].weight.double().T + q[-1].bias for h, q in zip(hidden, (critic.q1, critic.q2), strict=True)], -1
    )
    assert hidden[0].unique().numel() > 2
    assert (values - exact).abs().max() < 1e-3
    told_apart = (exact[:, 0] - exact[:, 1]).abs() > 2e-3  # twice the error above
    assert told_apart.sum() > 400
    assert ((values[:, 0] < values[:, 1]) == (exact[:, 0] < exact[:, 1]))[told_apart].all()


def test_in_bfloat16_a_last_layer_learns_in_float32_too() -> None:
    """Against its weights' gradient by hand in float64, through the step of an update."""
    module, seen = agent(), []
    last, optimizer = module.critic.q1[-1], SGD(module.critic.parameters(), lr=0.0)
    last.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    g = torch.Generator().manual_seed(0)
    z, a, pull = (torch.randn(256, n, generator=g) for n in (8, 2, 1))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        module._descend(optimizer, (pull * module.critic(z, a)[0]).sum(), "loss")
    exact = pull.double().T @ seen[0].double()
    assert seen[0].dtype == torch.bfloat16
    assert (last.weight.grad - exact).norm() < 1e-5 * exact.norm()


def test_under_a_gpus_autocast_a_last_layer_after_a_norm_is_float32() -> None:
    """There a LayerNorm gives float32, on a CPU bfloat16; tensors without values show which kernels would run."""
    no_values = FakeTensorMode(allow_non_fake_inputs=True)
    layers = torch.nn.Sequential(torch.nn.LayerNorm(8), OutputLinear(8, 1)).requires_grad_(False)
    for layer in layers:
        for name, p in list(layer.named_parameters()):
            layer._parameters[name] = FakeTensor(no_values, p.to("meta"), torch.device("cuda:0"))
    h = FakeTensor(no_values, torch.empty(4, 8, device="meta"), torch.device("cuda:0"))
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)  # torch.autocast does not do it where no GPU is
    try:
        with no_values:
            assert (h @ h.T).dtype == torch.bfloat16
            assert layers[0](h).dtype == torch.float32
            assert layers(h).dtype == torch.float32
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", torch.float16)  # PyTorch's own


def test_in_bfloat16_a_mean_action_keeps_its_digits() -> None:
    actor = agent().actor
    actor.mlp[-1].bias.data[0] = 1.0  # bfloat16's next is 1.0078
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * 1e-2
    with torch.autocast("cpu", torch.bfloat16):
        mu, _ = actor(z)
    assert mu[:, 0].unique().numel() > 32


def test_crops_are_drawn_on_the_generators_device_and_stay_there() -> None:
    images = torch.zeros(4, 9, 20, 20, dtype=torch.uint8, device="meta")  # a device whose values nobody can read
    assert RandomCrop(16)(images, torch.Generator().manual_seed(0)).device.type == "meta"


def test_an_update_reads_nothing_back_from_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device nothing has a value, so whatever waited for one would fail."""
    spec, guard = EnvSpec("cartpole-swingup", 20, 20, 3, 2, 8, 1000), []
    module = agent(spec, augmentation=RandomCrop(16), prior=ConstantPrior(1.0)).to("meta")
    optimizers = [SGD(group["params"]) for o in module.configure_optimizers() for group in o.param_groups]
    module.optimizers = lambda *a, **k: optimizers  # type: ignore[method-assign]
    monkeypatch.setattr(SACModule, "generator", None)  # there are none of this device
    # What goes to the host there does so on its own time; it is tested in test_finite.py.
    monkeypatch.setattr(FiniteGuard, "step_on_device", lambda self, optimizer, name, *a: guard.append(name))
    for update in range(2):
        module.training_step(batch(seed=update).to("meta"))
    assert guard == ["critics' loss", "critics' loss", "actor's loss", "temperature's loss"]


def test_a_run_with_all_of_it(untrained_vlm: Path, tmp_path: Path) -> None:
    settings = ["--trainer.precision", "bf16-mixed", "--model.torch_compile", "eager", "--data.replay_device", "agent"]
    assert fit(tmp_path, untrained_vlm, *settings, "--data.max_env_steps", "3000") == 0
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert all("_orig_mod" not in name and torch.isfinite(value).all() for name, value in saved.items())
