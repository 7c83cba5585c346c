"""Updates by CUDA graphs: the same as those without, in any order of kinds. What needs a GPU is marked so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from covr_lightning.agent import (
    CURL,
    SPR,
    AnnealedPrior,
    ConstantPrior,
    DeepMDP,
    DrQViews,
    Flare,
    RandomConvolution,
    RandomCrop,
    RandomCutout,
    RandomIntensity,
    RandomShift,
    RandomTranslate,
    ResActEncoder,
    ResidualActor,
    SACModule,
    SVEAViews,
)
from covr_lightning.agent.checks import check_graphs
from covr_lightning.agent.graphs import WARM_UP, UpdateGraphs, _Captured, _Inputs, _layout
from covr_lightning.errors import ConfigError, NonFiniteError
from tests.agent import small_agents, test_spr
from tests.agent.small_agents import agent, parameters, same
from tests.short_runs import fit

GPU = torch.device("cuda")


class Stepwise(UpdateGraphs):
    """Stands in for a GPU: a capture remembers where inputs and outputs lie, a replay computes on what is there."""

    def _capture(self, batch: TensorDict, due: Any, lam: Any) -> _Captured:
        self.captures = getattr(self, "captures", 0) + 1
        optimizers = self._agent.all_optimizers()
        errors, metrics, seen = torch.zeros(batch["action"].shape[0]), {}, [("critics' loss", torch.zeros(2))]

        def replay() -> None:
            new_errors, new_metrics = self._agent.update(batch, due, lam, optimizers)
            errors.copy_(new_errors)
            for name, value in new_metrics.items():
                metrics.setdefault(name, torch.zeros(())).copy_(value)

        return _Captured(replay, errors, metrics, seen)


def with_graphs(module: SACModule, graphs: UpdateGraphs, batches: list[TensorDict]) -> None:
    """What `training_step` does on a GPU."""
    for b in batches:
        step = module.counters.grad_steps + 1
        graphs.update(b, module.due(step), module.prior.weight(module.counters))
        module.counters.grad_steps = step


def test_every_kind_of_update_is_captured_once_and_reads_its_inputs_anew() -> None:
    prior = lambda: AnnealedPrior(start=2.0, decrement=0.5, every_env_steps=10, floor=0.0)  # noqa: E731
    plain, module = agent(prior=prior(), actor_every_grad_steps=3), agent(prior=prior(), actor_every_grad_steps=3)
    graphs = Stepwise(module)
    for update in range(80):
        for one in (plain, module):
            one.counters.env_steps = update  # λ falls to 0 in four steps
        b = small_agents.batch(8 if update != 50 else 5, seed=update)
        plain.training_step(b)
        with_graphs(module, graphs, [b])
    assert same(parameters(plain), parameters(module))
    # Of six steps, due are: targets, actor, targets, both, and twice nothing; before λ is 0 and after; the odd size
    # comes once, too seldom for a graph.
    assert graphs.captures == 2 * len({(step % 3 == 0, step % 2 == 0) for step in range(6)})
    assert plain.counters == module.counters


def test_a_batch_is_copied_piece_by_piece_of_memory() -> None:
    def batch(seed: int) -> TensorDict:
        frames = torch.randint(0, 256, (4, 12, 6, 6), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
        own = TensorDict({"pixels": frames[:, 3:], "flag": frames[:, 0, 0, :1] > 99}, [4])
        return TensorDict({"pixels": frames[:, :9], "row": torch.arange(4) + seed, "next": own}, [4])

    inputs = _Inputs(batch(0))
    places = {value.data_ptr() for value in inputs.batch.values(True, True)}
    inputs.take(batch(1))
    assert all(torch.equal(value, batch(1)[key]) for key, value in inputs.batch.items(True, True))
    assert {value.data_ptr() for value in inputs.batch.values(True, True)} == places
    shared = {inputs.batch[key].untyped_storage().data_ptr() for key in ("pixels", ("next", "pixels"))}
    assert len(shared) == 1
    assert _layout(batch(0)) == _layout(batch(1)) != _layout(batch(1).clone())


def test_whoever_counts_steps_and_looks_for_nan_is_told_of_each() -> None:
    module, counted = agent(), []
    critic, *rest = module.all_optimizers()
    counted_critic = SimpleNamespace(
        optimizer=critic, step=critic.step, zero_grad=critic.zero_grad, param_groups=critic.param_groups,
        _on_before_step=lambda: counted.append("before"), _on_after_step=lambda: counted.append("after"),
    )  # fmt: skip
    module.optimizers = lambda *a, **k: [counted_critic, *rest]  # type: ignore[method-assign]
    graphs = Stepwise(module)
    with_graphs(module, graphs, [small_agents.batch(seed=i) for i in range(2 * WARM_UP + 3)])
    assert counted == ["before", "after"] * 3
    for captured in graphs._captured.values():
        captured.seen[0] = ("critics' loss", torch.full((2,), torch.nan))
    with pytest.raises(NonFiniteError, match=rf"critics' loss is nan .*\(gradient step {2 * WARM_UP + 4}\)"):
        with_graphs(module, graphs, [small_agents.batch(seed=i) for i in range(20)])


def test_where_graphs_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=GPU), _detect_anomaly=False)
    check_graphs(True, trainer)  # type: ignore[arg-type]
    monkeypatch.setattr("covr_lightning.processes.count", lambda: 2)
    with pytest.raises(ConfigError, match=r"model.cuda_graphs is true, and the run has 2 processes"):
        check_graphs(True, trainer)  # type: ignore[arg-type]
    monkeypatch.undo()
    trainer._detect_anomaly = True
    with pytest.raises(ConfigError, match=r"model.cuda_graphs is true, and so is trainer.detect_anomaly"):
        check_graphs(True, trainer)  # type: ignore[arg-type]
    check_graphs(False, trainer)  # type: ignore[arg-type]
    trainer.strategy.root_device = torch.device("cpu")
    check_graphs(True, trainer)  # type: ignore[arg-type]


def test_on_a_cpu_it_changes_nothing() -> None:
    plain, module = agent(), agent(cuda_graphs=True)
    for update in range(6):
        for one in (plain, module):
            one.training_step(small_agents.batch(seed=update))
    assert same(parameters(plain), parameters(module))


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "guided": lambda: {"prior": ConstantPrior(1.0)},
    "annealed": lambda: {"prior": AnnealedPrior(2.0, 0.01, 1, 0.0)},
    "Q filter": lambda: {"prior": ConstantPrior(1.0, q_filter=True)},
    "crop": lambda: {"augmentation": RandomCrop(16)},
    "translate": lambda: {"augmentation": RandomTranslate(24)},
    "shift": lambda: {"augmentation": RandomShift(2)},
    "cutout": lambda: {"augmentation": RandomCutout(2, 5)},
    "intensity": lambda: {"augmentation": RandomIntensity()},
    "convolution": lambda: {"augmentation": RandomConvolution()},
    "DrQ": lambda: {"augmentation": RandomShift(2), "views": DrQViews()},
    "SVEA": lambda: {"augmentation": RandomShift(2), "views": SVEAViews()},
    "Flare": lambda: {"encoder": Flare()},
    "ResAct": lambda: {"encoder": ResActEncoder(), "actor_head": ResidualActor(), "objectives": [DeepMDP()]},
    "CURL": lambda: {"augmentation": RandomCrop(16), "objectives": [CURL()]},
    "DeepMDP": lambda: {"objectives": [DeepMDP(stochastic=True)]},
    "SPR": lambda: {"augmentation": RandomCrop(16), "objectives": [SPR(jumps=3, sequences=4)]},
    "compiled": lambda: {"augmentation": RandomCrop(16), "torch_compile": "inductor"},
}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("part", PARTS)
def test_on_a_gpu_the_parameters_are_those_without_graphs(
    part: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.compiler.reset()  # or what earlier tests have compiled is counted too, and beyond the limit nothing is
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    half = torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)  # as Lightning does
    make = test_spr.batch if part == "SPR" else lambda seed: small_agents.batch(seed=seed)
    ends, errors = [], []
    for cuda_graphs in (False, True):
        module = agent(**PARTS[part](), cuda_graphs=cuda_graphs).to(GPU)
        small_agents.without_trainer(module)
        module.compile_networks()
        module.td_error_listener = lambda index, error: errors.append(error.clone())
        for update in range(16):
            module.counters.env_steps = update
            b = make(update).to(GPU)
            with half:
                module.training_step(b.set("index", torch.arange(8, device=GPU)))
        module.finite.settle()
        ends.append(parameters(module) | {"noise": module.generator.get_state()})
    assert module._graphs is not None
    assert module._graphs._captured
    assert same(*ends)
    assert all(torch.equal(one, other) for one, other in zip(errors[:16], errors[16:], strict=True))


@pytest.mark.gpu
def test_on_a_gpu_a_gradient_that_is_not_finite_is_left_out_of_a_replay_too() -> None:
    module = small_agents.without_trainer(agent(cuda_graphs=True, on_non_finite="skip").to(GPU))
    for update in range(12):
        b = small_agents.batch(seed=update).to(GPU)
        if update == 10:
            b["next", "reward"][0] = torch.nan
        module.training_step(b)
    module.finite.settle()
    assert module.finite.skipped == 1
    assert all(torch.isfinite(p).all() for p in module.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_on_a_gpu(untrained_vlm: Path, tmp_path: Path, precision: str) -> None:
    settings = ["--trainer.accelerator", "gpu", "--trainer.precision", precision, "--model.cuda_graphs", "true"]
    settings += ["--data.replay_device", "agent"]
    assert fit(tmp_path, untrained_vlm, *settings) == 0
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 150 - 20 + 1
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())
    assert fit(tmp_path / "on", untrained_vlm, *settings, "--data.max_env_steps", "8000", "--ckpt_path",
               str(tmp_path / "run" / "checkpoints" / "last.ckpt")) == 0  # fmt: skip
