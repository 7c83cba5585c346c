"""What the callback refuses, and where a round's figures go."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from covr_lightning.callbacks import ProgressiveFineTune
from tensordict import TensorDict

from covr_lightning import processes
from covr_lightning.agent import AheadPrior, DelayedPrior, NoPrior, Prior, SACModule, SkilledPrior
from covr_lightning.agent.acting import Spread
from covr_lightning.counters import Counters
from covr_lightning.data import FrameStackStorage
from covr_lightning.envs import DMControl
from covr_lightning.errors import ConfigError
from covr_lightning.evaluation import EpisodeResult
from covr_lightning.finetune import FineTuneSettings, NeverSchedule
from covr_lightning.finetune.round import RoundReport
from covr_lightning.vlm.adapters import adapter_digest
from covr_lightning.vlm.answers import Answers
from tests.short_runs import fit


@pytest.mark.parametrize("precision", ["bf16-true", "16-mixed", "32"])
def test_precisions_that_would_change_the_base_weights_or_need_a_scaler(precision: str) -> None:
    with pytest.raises(ConfigError, match=f"is '{precision}'; it can be '32-true' or 'bf16-mixed'"):
        ProgressiveFineTune(precision=precision)


def test_peak_memory_goes_to_log_json_and_loggers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logged: dict[str, float] = {}
    logger = SimpleNamespace(log_metrics=lambda numbers, step: logged.update(numbers, step=step))
    trainer = SimpleNamespace(default_root_dir=str(tmp_path), loggers=[logger])
    report = RoundReport(round=2, env_steps=1000, rows=10, kept=4, peak_memory_mb=1234.5)
    with caplog.at_level(logging.INFO):
        ProgressiveFineTune()._record(trainer, SimpleNamespace(vlm=None), report)
    assert "0 s, 1234 MB at most" in caplog.text
    text = (tmp_path / "rounds" / "round_002.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["peak_memory_mb"] == 1234.5
    assert '"tau": null' in text  # NaN is no JSON
    assert (logged["round/peak_memory_mb"], logged["step"]) == (1234.5, 1000)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        ProgressiveFineTune()._record(trainer, SimpleNamespace(vlm=None), RoundReport(3, 2000, 0))
    assert "MB" not in caplog.text


def small_agent(prior: Prior | None = None) -> SACModule:
    return SACModule(DMControl("cartpole-swingup", size=40).spec, hidden=8, filters=2, prior=prior)


class FakeVLM:
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.frames = 1
        self.round = 0

    def load(self, spec: object) -> None:
        self.calls.append("load")

    def load_weights(self) -> None:
        self.calls.append("load_weights")

    def check_targets(self) -> None:
        self.calls.append("check_targets")

    def load_adapter(self, folder: Path, round_: int) -> None:
        self.calls.append(f"{folder.name} of round {round_}")


def set_up(
    callback: ProgressiveFineTune, agent: SACModule | None = None, warmup_actions: str = "random"
) -> tuple[ProgressiveFineTune, FakeVLM, int]:
    vlm, agent = FakeVLM(), agent or small_agent()
    data = SimpleNamespace(
        vlm=vlm, seed=7, spec=agent.spec, max_env_steps=100_000, listeners=[],
        counters=Counters(), warmup_actions=warmup_actions,
    )  # fmt: skip
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    callback.setup(SimpleNamespace(datamodule=data, strategy=strategy), agent, "fit")  # type: ignore[arg-type]
    return callback, vlm, len(data.listeners)


def test_a_round_draws_from_the_seed_of_the_data_unless_it_has_one() -> None:
    callback, vlm, listeners = set_up(ProgressiveFineTune())
    assert (callback.settings.seed, vlm.calls, listeners) == (7, ["load", "load_weights", "check_targets"], 1)
    assert set_up(ProgressiveFineTune(settings=FineTuneSettings(seed=3)))[0].settings.seed == 3


def test_without_rounds_nothing_is_loaded_and_nothing_kept() -> None:
    callback, vlm, listeners = set_up(ProgressiveFineTune(schedule=NeverSchedule()))
    assert (callback.buffer, vlm.calls, listeners) == (None, [], 0)
    assert callback.state_dict() == {"reports": [], "buffers": [None], "folder": None, "adapter": None}


def test_a_skilled_prior_needs_rows_that_are_held_out() -> None:
    with pytest.raises(ConfigError, match=r"SkilledPrior \(model\.prior\).*settings\.held_out .* must be above 0"):
        set_up(ProgressiveFineTune(settings=FineTuneSettings(held_out=0)), small_agent(SkilledPrior()))


def test_a_skilled_prior_is_not_told_how_well_the_vlm_foretells_itself() -> None:
    with pytest.raises(ConfigError, match=r"SkilledPrior \(model\.prior\).*'vlm'.*set warmup_rows .* to false"):
        set_up(ProgressiveFineTune(), small_agent(SkilledPrior()), "vlm")
    set_up(ProgressiveFineTune(warmup_rows=False), small_agent(SkilledPrior()), "vlm")
    set_up(ProgressiveFineTune(), small_agent(DelayedPrior()), "vlm")


def test_a_skilled_prior_needs_a_round() -> None:
    with pytest.raises(ConfigError, match=r"SkilledPrior \(model\.prior\).*no round is due within .* = 100000"):
        set_up(ProgressiveFineTune(schedule=NeverSchedule()), small_agent(SkilledPrior()))


def test_an_ahead_prior_needs_a_vlm_that_acts_alone() -> None:
    with pytest.raises(ConfigError, match=r"AheadPrior \(model\.prior\).*vlm_episodes .* is 0; it must be above 0"):
        set_up(ProgressiveFineTune(), small_agent(AheadPrior()))
    with pytest.raises(ConfigError, match=r"AheadPrior \(model\.prior\).*no round is due within .* = 100000"):
        set_up(ProgressiveFineTune(schedule=NeverSchedule(), vlm_episodes=1), small_agent(AheadPrior()))
    set_up(ProgressiveFineTune(vlm_episodes=1), small_agent(AheadPrior()))


def test_a_resumed_run_tells_its_prior_what_its_rounds_measured(tmp_path: Path) -> None:
    prior = SkilledPrior(lam=1.0, after_rounds=1)
    agent = small_agent(prior)
    callback, vlm, _ = set_up(ProgressiveFineTune(), agent)
    measured = RoundReport(1, 1000, 10, error_after=0.3, error_constant=0.4)
    reports = [measured, RoundReport(2, 2000, 0)]  # the second had nothing to train on
    callback.load_state_dict({"reports": [report.as_dict() for report in reports], "buffers": []})
    data = SimpleNamespace(vlm=vlm, cut_envs=None, counters=Counters(rounds=2))
    trainer = SimpleNamespace(datamodule=data, ckpt_path=None, default_root_dir=str(tmp_path))
    callback.on_train_start(trainer, agent)  # type: ignore[arg-type]
    assert prior.weight(data.counters) == pytest.approx(0.25)


def test_a_resumed_run_tells_its_prior_what_vlm_and_policy_returned(untrained_vlm: Path, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []

    class Told(AheadPrior):
        def vlm_acted(self, vlm_return: float) -> None:
            told.append(("vlm", vlm_return))

        def evaluated(self, policy_return: float) -> None:
            told.append(("policy", policy_return))

    globals()["Told"] = Told  # the YAML names it
    arguments = ("--model.prior", f"{__name__}.Told", "--trainer.callbacks.vlm_episodes", "1")
    assert fit(tmp_path, untrained_vlm, *arguments, "--data.max_env_steps", "4000") == 0
    run = tmp_path / "run"
    rounds = [json.loads((run / "rounds" / f"round_00{n}.json").read_text())["vlm_return"] for n in (1, 2)]
    curve = json.loads((run / "summary.json").read_text())["curve"]
    # An evaluation at 40, 3000 and 4000 environment steps, rounds at 1200 and 3600.
    at = {name: [round(value, 6) for kind, value in told if kind == name] for name in ("vlm", "policy")}
    assert at["vlm"] == [round(value, 6) for value in rounds]
    assert at["policy"] == [round(point["return"], 6) for point in curve]
    assert [kind for kind, _ in told] == ["policy", "vlm", "policy", "vlm", "policy"]
    before = list(told)
    told.clear()
    assert fit(tmp_path, untrained_vlm, *arguments, "--data.max_env_steps", "4400", "--ckpt_path", "last") == 0
    assert sorted(told[:3]) == sorted([before[1], before[3], before[4]])


def restored(callback: ProgressiveFineTune, vlm: FakeVLM, folder: Path, agent: SACModule) -> None:
    """Resume `callback` with two rounds, of which the first trained an adapter; what it saves then is the same."""
    reports = [RoundReport(1, 1000, 10, losses=[0.5]), RoundReport(2, 2000, 10)]
    adapter = folder / "rounds" / "round_001_adapter"
    adapter.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_text("{}")
    state = {
        "reports": [report.as_dict() for report in reports], "buffers": [None], "folder": str(adapter.parent),
        "adapter": adapter_digest(adapter),
    }  # fmt: skip
    callback.load_state_dict(state)
    data = SimpleNamespace(vlm=vlm, cut_envs=None, counters=Counters(rounds=2))
    callback.on_train_start(SimpleNamespace(datamodule=data, ckpt_path=None, default_root_dir=str(folder)), agent)  # type: ignore[arg-type]
    saved = callback.state_dict()
    assert all(saved[name] == state[name] for name in ("reports", "folder", "adapter"))


def test_a_run_that_goes_on_without_rounds_keeps_its_adapter(tmp_path: Path) -> None:
    agent = small_agent(DelayedPrior(after_rounds=1))
    callback, vlm, _ = set_up(ProgressiveFineTune(schedule=NeverSchedule()), agent)
    restored(callback, vlm, tmp_path / "guided", agent)
    assert vlm.calls == ["round_001_adapter of round 1"]
    assert vlm.round == 2
    # Where nothing asks the VLM it is not loaded, and the checkpoints still name it.
    callback, vlm, _ = set_up(ProgressiveFineTune(schedule=NeverSchedule()), agent := small_agent(NoPrior()))
    restored(callback, vlm, tmp_path / "not guided", agent)
    assert vlm.calls == []


def test_a_run_that_goes_back_takes_later_rounds_back(tmp_path: Path) -> None:
    rounds = tmp_path / "rounds"
    rounds.mkdir()
    for number in (2, 3):
        (rounds / f"round_00{number}.json").write_text("{}")
    callback, vlm, _ = set_up(ProgressiveFineTune(), agent := small_agent())
    restored(callback, vlm, tmp_path, agent)
    assert sorted(path.name for path in rounds.glob("*.json")) == ["round_002.json"]


def test_what_a_vlm_returns_whose_engine_is_away_is_no_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    callback, _, _ = set_up(ProgressiveFineTune(vlm_episodes=2))
    module = sys.modules[ProgressiveFineTune.__module__]
    trainer = SimpleNamespace(default_root_dir=str(tmp_path), progress_bar_callback=None)
    for unanswered, returned in ((0, 4.0), (1, math.nan)):
        played = [EpisodeResult(3.0, 25), EpisodeResult(5.0, 25)], Answers(50, 0, unanswered)
        monkeypatch.setattr(module, "play_alone", lambda *arguments, played=played: played)
        assert callback._vlm_alone(trainer, SimpleNamespace(), 1) == pytest.approx(returned, nan_ok=True)  # type: ignore[arg-type]
        assert ("1 of 50 frames" in caplog.text) == bool(unanswered)


def test_a_return_that_is_no_measure_is_not_told() -> None:
    prior = AheadPrior(2.0)
    prior.vlm_acted(200.0)
    ProgressiveFineTune._tell_prior(prior, RoundReport(2, 2000, 10))
    assert prior.vlm_return == 200.0


def test_a_resumed_run_takes_the_adapter_of_the_last_round_that_trained(tmp_path: Path) -> None:
    # The VLM answers elsewhere and is fine-tuned in a launch of its own, so the second round wrote no adapter.
    callback, vlm, _ = set_up(ProgressiveFineTune())
    reports = [RoundReport(1, 1000, 10, losses=[0.5]), RoundReport(2, 2000, 10)]
    (tmp_path / "rounds" / "round_001_adapter").mkdir(parents=True)
    callback.load_state_dict({"reports": [report.as_dict() for report in reports], "buffers": []})
    data = SimpleNamespace(vlm=vlm, cut_envs=None, counters=Counters(rounds=2))
    callback.on_train_start(
        SimpleNamespace(datamodule=data, ckpt_path=None, default_root_dir=str(tmp_path)), small_agent()
    )  # type: ignore[arg-type]
    assert vlm.calls[-1] == "round_001_adapter of round 1"
    assert vlm.round == 2


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("warmup_rows", [True, False])
def test_the_warm_ups_rows_can_stay_out_of_a_round(
    untrained_vlm: Path, tmp_path: Path, warmup_rows: bool, num_envs: int
) -> None:
    """Episodes of 25 agent steps, of which 20 in all are the warm-up's; rounds after 30 and 90 in all.

    Of three environments each makes 7 of them, as all three act before the clock passes 20; their episodes end at 75.
    """
    settings = ["--trainer.callbacks.warmup_rows", str(warmup_rows).lower(), "--data.num_envs", str(num_envs)]
    assert fit(tmp_path, untrained_vlm, *settings, "--data.max_env_steps", "4000") == 0
    reports = [json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "rounds").glob("round_0??.json"))]
    rows = {1: [25 if warmup_rows else 5, 50], 3: [0, 75 if warmup_rows else 54]}
    assert [report["rows"] for report in reports] == rows[num_envs]


def test_the_spread_is_of_the_processes_that_have_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, asked = small_agent(), []
    callback, _, _ = set_up(ProgressiveFineTune(), agent)
    data = SimpleNamespace(storage=FrameStackStorage(10), counters=Counters())
    others = [Spread(1.0, 0.25), None, Spread(3.0, 0.75)]
    monkeypatch.setattr(processes, "gather", lambda own: asked.append(own) or [own, *others])
    assert callback._spread(agent, data) == Spread(2.0, 0.5)  # type: ignore[arg-type]
    assert asked == [None]


def test_the_spread_is_asked_with_the_actions_before_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, asked = small_agent(), []
    callback, _, _ = set_up(ProgressiveFineTune(), agent)

    def spread(*given: torch.Tensor) -> Spread:
        asked.append(given)
        return Spread(1.0, 0.5)

    monkeypatch.setattr(agent, "spread", spread)
    storage = FrameStackStorage(4)
    for t in range(4):
        frame = torch.full((9, 2, 2), t, dtype=torch.uint8)
        after = {"pixels": frame + 1, "done": torch.tensor([False])}
        storage.set(t, TensorDict({"pixels": frame, "previous_action": torch.full((1,), t / 10), "next": after}))
    callback._spread(agent, SimpleNamespace(storage=storage, counters=Counters()))  # type: ignore[arg-type]
    [(pixels, before)] = asked
    torch.testing.assert_close(before[:, 0], pixels[:, -1, 0, 0] / 10)
    assert len(before.unique()) > 1


def test_the_value_at_a_cut_is_that_of_the_state_that_the_last_step_led_to(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = small_agent()
    callback, _, _ = set_up(ProgressiveFineTune(at_time_limit="bootstrap"), agent)
    asked: list[tuple[int, float]] = []

    def state_value(pixels: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        asked.append((int(pixels[0, 0, 0, 0]), float(action[0, 0])))
        return torch.tensor([8.0])

    monkeypatch.setattr(agent, "state_value", state_value)
    pixels, false = torch.zeros(9, 40, 40, dtype=torch.uint8), torch.zeros(1, dtype=torch.bool)
    for t in (1, 2):
        step = {"pixels": pixels + t, "reward": torch.ones(1), "terminated": false, "truncated": false}
        callback._add(3, TensorDict({"pixels": pixels, "action": torch.full((1,), 0.25 * t), "next": step}))
    callback._add(3, None)
    assert asked == [(2, 0.5)]
    assert callback.buffer is not None
    assert callback.buffer.rows()["g"].flatten().tolist() == pytest.approx([1 + 0.99 * (1 + 0.99 * 8), 1 + 0.99 * 8])
    callback._add(3, None)  # nothing is open any more
    assert len(asked) == 1
