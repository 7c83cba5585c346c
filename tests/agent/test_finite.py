"""NaN and infinity: caught before they do harm, named, and the run ends with status 3 or goes on without them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from covr_lightning.agent import SACModule
from covr_lightning.agent.finite import FiniteGuard
from covr_lightning.counters import Counters
from covr_lightning.data import ExperienceData
from covr_lightning.errors import ConfigError, NonFiniteError
from covr_lightning.finetune import EpisodeBuffer
from tests.short_runs import fit, replay


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_and_gradients_are_looked_at(bad: float) -> None:
    clock = Counters(env_steps=40, grad_steps=7)
    guard, weight = FiniteGuard("stop"), torch.ones(3, requires_grad=True)
    weight.grad = torch.tensor([1.0, -2.0, 3e38])
    assert guard.allows("loss", clock, torch.tensor(1.0), [weight, torch.ones(1)])
    with pytest.raises(NonFiniteError, match=rf"The loss is {bad} at environment step 40 \(gradient step 8\)"):
        guard.allows("loss", clock, torch.tensor(bad), [weight])
    weight.grad[1] = bad
    with pytest.raises(NonFiniteError, match="The gradient of the loss is not finite at environment step 40"):
        guard.allows("loss", clock, torch.tensor(1.0), [weight])
    assert not FiniteGuard("skip").allows("loss", clock, torch.tensor(1.0), [weight])


def test_what_to_do_is_one_of_two() -> None:
    with pytest.raises(ConfigError, match=r"model.on_non_finite is 'pray'; it can be 'stop' or 'skip'"):
        FiniteGuard("pray")  # type: ignore[arg-type]


def bad_reward_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ExperienceData._store

    def store(data: ExperienceData, collected: Any) -> Any:
        if data.counters.env_steps == step:
            collected["next", "reward"].fill_(math.nan)
        return original(data, collected)

    monkeypatch.setattr(ExperienceData, "_store", store)


def test_a_bad_reward_stops_the_run_and_what_was_saved_stays(
    untrained_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad_reward_at(3480, monkeypatch)
    assert fit(tmp_path, untrained_vlm) == 3
    message = capsys.readouterr().err
    assert "The reward is nan at environment step 3480 (gradient step 69)" in message
    assert message.rstrip().endswith("What was saved before stays; --ckpt_path last goes on from there.")
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["ExperienceData"]["counters"]["env_steps"] == 3000


def test_nothing_is_said_of_what_was_saved_where_nothing_was(
    untrained_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad_reward_at(0, monkeypatch)
    assert fit(tmp_path, untrained_vlm) == 3
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("covr: The reward is nan at environment step 0 ")
    assert "saved" not in last
    assert not list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))


def test_a_bad_reward_can_be_left_out(untrained_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad_reward_at(3480, monkeypatch)
    ends, cut = [], EpisodeBuffer.cut_episode
    monkeypatch.setattr(EpisodeBuffer, "cut_episode", lambda *a: ends.append(a[0].open_rows) or cut(*a))
    assert fit(tmp_path, untrained_vlm, "--model.on_non_finite", "skip") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["env_steps"] == 6000
    # The episode that began at environment step 3000 has agent steps 75 … 99, of which 87 is left out.
    assert ends == [25, 25, 25, 12, 12, 25, 25]
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
    assert checkpoint["covr_skipped"] == [1]
    with monkeypatch.context() as later:
        guards = []
        step = SACModule.training_step
        later.setattr(SACModule, "training_step", lambda *a, **k: guards.append(a[0].finite) or step(*a, **k))
        more = ("--model.on_non_finite", "skip", "--ckpt_path", "last", "--data.max_env_steps", "6040")
        assert fit(tmp_path, untrained_vlm, *more) == 0
    assert {guard.skipped for guard in guards} == {1}


def test_an_episode_ends_though_its_last_reward_is_left_out(
    untrained_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad_reward_at(3960, monkeypatch)  # its fourth of six episodes
    assert fit(tmp_path, untrained_vlm, "--model.on_non_finite", "skip") == 0
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["ExperienceData"]
    assert saved["counters"]["episodes"] == 6
    rewards = replay(tmp_path / "run")["next", "reward"].flatten()
    assert len(rewards) == 149
    assert saved["processes"][0]["last_training_return"] == pytest.approx(float(rewards[-25:].sum()))
    assert saved["processes"][0]["returns"] == [0.0]


@pytest.mark.parametrize(("policy", "status"), [("stop", 3), ("skip", 0)])
def test_a_bad_gradient_never_reaches_the_weights(
    policy: str, status: int, untrained_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = SACModule.manual_backward, []

    def backward(module: SACModule, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        original(module, loss, *args, **kwargs)
        gradient = module.critic.q1[0].weight.grad
        if module.counters.grad_steps == 29 and gradient is not None and not seen:
            seen.append([p.detach().clone() for p in module.critic.parameters()])
            gradient[0, 0] = math.inf
            seen.append(module)

    monkeypatch.setattr(SACModule, "manual_backward", backward)
    assert fit(tmp_path, untrained_vlm, "--data.max_env_steps", "3000", "--model.on_non_finite", policy) == status
    before, module = seen
    if policy == "stop":
        assert all(torch.equal(a, b) for a, b in zip(before, module.critic.parameters(), strict=True))
    assert module.finite.skipped == (policy == "skip")
    assert all(torch.isfinite(p).all() for p in module.parameters())


def steps(guard: FiniteGuard, bad_at: int | None, where: str, on_device: bool) -> torch.Tensor:
    """Four steps of a fused Adam, of which one has a bad loss or gradient; the weights afterwards."""
    weight = torch.ones(3, requires_grad=True)
    optimizer, clock = torch.optim.Adam([weight], lr=0.1, fused=True), Counters()
    for step in range(4):
        weight.grad, loss = torch.tensor([1.0, -2.0, float(step)]), torch.tensor(1.0)
        if step == bad_at:
            (weight.grad[:1] if where == "gradient" else loss).fill_(math.nan)
        take = guard.step_on_device if on_device else guard.step
        take(optimizer, "loss", clock, loss, [weight])
        clock.grad_steps += 1
    return weight.detach()


@pytest.mark.parametrize(("bad_at", "where"), [(None, "loss"), (1, "loss"), (1, "gradient")])
def test_a_device_that_decides_by_itself_makes_the_same_steps(bad_at: int | None, where: str) -> None:
    at_once, later = FiniteGuard("skip"), FiniteGuard("skip")
    assert torch.equal(steps(later, bad_at, where, on_device=True), steps(at_once, bad_at, where, on_device=False))
    assert later.skipped == 0  # not known yet
    later.settle()
    assert later.skipped == at_once.skipped == (bad_at is not None)


def test_a_run_that_is_to_stop_hears_of_it_later_with_the_step_that_it_was() -> None:
    guard, unasked = FiniteGuard("stop"), FiniteGuard("stop")
    steps(guard, 2, "gradient", on_device=True)
    with pytest.raises(NonFiniteError, match=r"The gradient of the loss is not finite .*\(gradient step 3\)"):
        guard.settle()
    steps(unasked, 2, "gradient", on_device=True)
    steps(unasked, None, "gradient", on_device=True)
    with pytest.raises(NonFiniteError, match=r"\(gradient step 3\)"):  # without being asked, eight steps after it
        steps(unasked, None, "gradient", on_device=True)
