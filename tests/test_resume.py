"""Runs that are stopped anywhere and resumed end as the run that was not, bit for bit."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from covr_lightning.callbacks import ProgressiveFineTune
from safetensors.torch import load_file

from covr_lightning.agent import SACModule
from covr_lightning.data import ExperienceData
from covr_lightning.data.collection import OneCollector
from covr_lightning.data.exploration import ExplorationPolicy
from covr_lightning.finetune.module import VLMFineTuner
from covr_lightning.saving.checkpoints import load_checkpoint
from tests.forked import start
from tests.short_runs import env_steps_saved, fit, fit_arguments, kill_after, replay

#: What these runs do that a round need not: renew old answers, and have the VLM play alone.
VARIANT = ("--data.stale_priors", "relabel", "--trainer.callbacks.vlm_episodes", "1")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, untrained_vlm: Path) -> Path:
    folder = tmp_path_factory.mktemp("through")
    assert fit(folder, untrained_vlm, *VARIANT) == 0
    return folder / "run"


class SignalOnce:
    """Sends this process a signal the first time that `when` holds, then calls what it stands in for."""

    def __init__(self, signum: signal.Signals, when: Callable[..., bool], original: Callable[..., Any]) -> None:
        self.signum, self.when, self.original, self.sent = signum, when, original, False

    def patch(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        def stand_in(instance: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.sent and self.when(instance):
                self.sent = True
                os.kill(os.getpid(), self.signum)
            return self.original(instance, *args, **kwargs)

        monkeypatch.setattr(owner, name, stand_in)


def at_env_step(step: int) -> Callable[[ExperienceData], bool]:
    return lambda data: data.counters.env_steps == step


def fine_tuned_at(step: int) -> Callable[[VLMFineTuner], bool]:
    """In the second step of the round's training."""
    return lambda tuner: tuner.vlm.round == step and len(tuner.losses) == 1


#: Where the signal comes: owner and name of a method, and when. Rounds are at 1200 and 3600, evaluations at 40, 3000
#: and 6000, episodes end at every thousandth environment step.
MOMENTS: dict[str, tuple[type, str, Callable[..., bool]]] = {
    "warm-up": (ExperienceData, "_store", at_env_step(400)),
    "inside an episode": (ExperienceData, "_store", at_env_step(2480)),
    "last step of an episode": (ExperienceData, "_store", at_env_step(1960)),
    "step before a round": (ExperienceData, "_store", at_env_step(3520)),
    "step of a round": (ExperienceData, "_store", at_env_step(3560)),
    "beginning of a round": (ProgressiveFineTune, "_spread", lambda callback: len(callback.reports) == 1),
    "training in the first round": (VLMFineTuner, "loss", fine_tuned_at(0)),
    "training in the second round": (VLMFineTuner, "loss", fine_tuned_at(1)),
    "end of a round": (ProgressiveFineTune, "_record", lambda callback: len(callback.reports) == 1),
    "step after a round": (ExperienceData, "_store", at_env_step(3600)),
    "step of an evaluation": (ExperienceData, "_store", at_env_step(2960)),
    "evaluation": (SACModule, "validation_step", lambda module: module.counters.env_steps == 3000),
    "last evaluation": (SACModule, "validation_step", lambda module: module.counters.env_steps == 6000),
}


def stopped_and_resumed(folder: Path, vlm: Path, moment: str, signum: signal.Signals) -> Path:
    owner, name, when = MOMENTS[moment]
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop = SignalOnce(signum, when, getattr(owner, name))
        stop.patch(monkeypatch, owner, name)
        assert fit(folder, vlm, *VARIANT) == 128 + signum
        assert stop.sent
    assert not (folder / "run" / "summary.json").exists()
    # Whatever the process drew in the meantime must not matter.
    torch.rand(7)
    assert fit(folder, vlm, *VARIANT, "--ckpt_path", "last") == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("moment", "signum"), [("inside an episode", signal.SIGINT), ("training in the second round", signal.SIGUSR1)]
)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    moment: str, signum: signal.Signals, uninterrupted: Path, untrained_vlm: Path, tmp_path: Path
) -> None:
    run = stopped_and_resumed(tmp_path, untrained_vlm, moment, signum)
    assert_same_run(run, uninterrupted)


def test_a_length_that_the_run_is_past_is_refused(
    uninterrupted: Path, untrained_vlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(uninterrupted / "checkpoints" / "last.ckpt")
    shorter = [*VARIANT, "--name", "shorter", "--data.max_env_steps", "5000", "--ckpt_path", checkpoint]
    assert fit(tmp_path, untrained_vlm, *shorter) == 2
    assert "data.max_env_steps is 5000, but the checkpoint's run has 6000 already" in capsys.readouterr().err


def test_a_copied_checkpoint_and_a_moved_run_find_replay_and_adapter(
    uninterrupted: Path, untrained_vlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Outside a folder called `checkpoints` it begins a new run, in a folder of its own.
    run_before, kept = tmp_path / "before" / "run", tmp_path / "kept.ckpt"
    with pytest.MonkeyPatch.context() as monkeypatch:
        SignalOnce(signal.SIGTERM, at_env_step(4000), ExperienceData._store).patch(
            monkeypatch, ExperienceData, "_store"
        )
        assert fit(tmp_path / "before", untrained_vlm, *VARIANT) == 143
    (run_before / "checkpoints" / "last.ckpt").rename(kept)
    assert fit(tmp_path, untrained_vlm, *VARIANT, "--ckpt_path", str(kept)) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "run" / "rounds" / "round_002_adapter" / name).read_bytes() == (
            uninterrupted / "rounds" / "round_002_adapter" / name
        ).read_bytes()
    mine, theirs = (load_checkpoint(run / "checkpoints" / "last.ckpt") for run in (tmp_path / "run", uninterrupted))
    assert_same(mine["state_dict"], theirs["state_dict"], at="weights")
    moved = tmp_path / "moved"  # a run of another name begins from there, too
    (tmp_path / "before").rename(moved)
    within = shutil.copy(kept, moved / "run" / "checkpoints" / "last.ckpt")
    assert fit(tmp_path, untrained_vlm, *VARIANT, "--name", "other", "--ckpt_path", str(within)) == 0
    mine = load_checkpoint(tmp_path / "other" / "checkpoints" / "last.ckpt")
    assert_same(mine["state_dict"], theirs["state_dict"], at="weights")
    moved.rename(tmp_path / "before")
    shutil.rmtree(run_before / "rounds")
    assert fit(tmp_path, untrained_vlm, *VARIANT, "--ckpt_path", str(kept)) == 2
    assert "was fine-tuned, but its adapter is missing" in capsys.readouterr().err


def test_a_round_done_again_leaves_the_adapter_of_before_to_its_checkpoints(
    untrained_vlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints, adapter = tmp_path / "run" / "checkpoints", tmp_path / "run" / "rounds" / "round_002_adapter"
    assert fit(tmp_path, untrained_vlm) == 0
    before = (adapter / "adapter_model.safetensors").read_bytes()
    shutil.copy(checkpoints / "last.ckpt", checkpoints / "kept.ckpt")
    with pytest.MonkeyPatch.context() as monkeypatch:  # the first evaluation's checkpoint, of before round 2
        SignalOnce(signal.SIGTERM, at_env_step(3200), ExperienceData._store).patch(
            monkeypatch, ExperienceData, "_store"
        )
        assert fit(tmp_path / "other", untrained_vlm) == 143
    early = tmp_path / "other" / "run" / "checkpoints" / "last.ckpt"
    shutil.copy(early, checkpoints / "early.ckpt")
    for part in (tmp_path / "other" / "run" / "replay").iterdir():
        shutil.copy(part, tmp_path / "run" / "replay")
    again = ["--ckpt_path", str(checkpoints / "early.ckpt")]
    assert fit(tmp_path, untrained_vlm, *again) == 0  # the same again
    assert [path.name for path in adapter.parent.glob("round_002_adapter*")] == ["round_002_adapter"]
    assert fit(tmp_path, untrained_vlm, "--trainer.callbacks.settings.lr", "2e-3", *again) == 0
    assert (adapter / "adapter_model.safetensors").read_bytes() != before
    assert len([*adapter.parent.glob("round_002_adapter*")]) == 2
    further = ["--data.max_env_steps", "6400", "--ckpt_path", str(checkpoints / "kept.ckpt")]
    assert fit(tmp_path, untrained_vlm, *further) == 0
    assert (adapter / "adapter_model.safetensors").read_bytes() == before
    for path in adapter.parent.glob("round_002_adapter*"):
        (path / "adapter_model.safetensors").write_bytes(b"another one")
    assert fit(tmp_path, untrained_vlm, *further) == 2
    assert "its adapter is missing, where another one is, (" in capsys.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_while_environments_are_opened_changes_nothing_on_disk(
    signum: signal.Signals, untrained_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with monkeypatch.context() as stop:
        SignalOnce(signum, lambda _: True, OneCollector.open).patch(stop, OneCollector, "open")
        assert fit(tmp_path, untrained_vlm) == 128 + signum
    assert not list(tmp_path.rglob("*.ckpt"))
    assert f"covr: stopped by {signum.name}.\n" in capsys.readouterr().err
    assert fit(tmp_path, untrained_vlm, "--data.max_env_steps", "1200", "--name", "short") == 0
    before = (tmp_path / "short" / "checkpoints" / "last.ckpt").read_bytes()
    with monkeypatch.context() as stop:
        SignalOnce(signum, lambda _: True, OneCollector.open).patch(stop, OneCollector, "open")
        assert fit(tmp_path, untrained_vlm, "--name", "short", "--ckpt_path", "last") == 128 + signum
    assert (tmp_path / "short" / "checkpoints" / "last.ckpt").read_bytes() == before
    assert f"covr: stopped by {signum.name}; to go on" in capsys.readouterr().err
    assert signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler)


def test_an_episode_that_is_cut_at_a_resume_holds_no_answer_any_longer(
    untrained_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmup = ("--data.warmup_actions", "vlm", "--data.label_every_agent_steps", "50", "--data.max_env_steps", "1000")
    with monkeypatch.context() as stop:
        SignalOnce(signal.SIGTERM, at_env_step(400), ExperienceData._store).patch(stop, ExperienceData, "_store")
        assert fit(tmp_path, untrained_vlm, *warmup) == 143
    act, held = ExplorationPolicy._warmup_action, []

    def noted(policy: ExplorationPolicy, pixels: torch.Tensor) -> torch.Tensor:
        held.append(policy._held is not None and not policy._held.isnan().any())
        return act(policy, pixels)

    monkeypatch.setattr(ExplorationPolicy, "_warmup_action", noted)
    monkeypatch.setattr(OneCollector, "restore", lambda self, state: [False])
    assert fit(tmp_path, untrained_vlm, *warmup, "--ckpt_path", "last") == 0
    # Of the warm-up's 20 steps 11 were taken before; the collector asks once more, to see what it gets.
    assert held == [False, False] + [True] * 8
    # It asks in its first step and, because the episode is cut, once more; an untrained VLM has not the form.
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {name: count for name, count in summary.items() if name.startswith("warmup")} == {
        "warmup_asked": 2, "warmup_unparsable": 2, "warmup_unanswered": 0,
    }  # fmt: skip


def test_after_the_last_round_no_row_is_kept_for_one(untrained_vlm: Path, tmp_path: Path) -> None:
    given = {"class_path": "covr_lightning.finetune.GivenSchedule", "init_args": {"at_env_steps": [1200]}}
    assert fit(tmp_path, untrained_vlm, "--trainer.callbacks.schedule", json.dumps(given)) == 0
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["callbacks"]["ProgressiveFineTune"]
    assert [report["rows"] for report in state["reports"]] == [25]
    assert state["buffers"] == [{"frames": 1, "finished": [], "open": {}, "newest": {}}]


def test_several_environments_are_resumed(untrained_vlm: Path, tmp_path: Path) -> None:
    # 150 agent steps of three environments, 120 environment steps at a time; fewer updates than agent steps, so that a
    # part of one is owed at the stop. Rounds at 1200 and 3600; episodes of one environment end every 3000 steps.
    more = ("--data.num_envs", "3", "--data.updates_per_agent_step", "0.5", "--data.label_every_agent_steps", "3")
    assert fit(tmp_path / "through", untrained_vlm, *more) == 0
    stopped = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as monkeypatch:
        stops = []
        for step in (480, 3480, 4200):
            stops.append(SignalOnce(signal.SIGTERM, at_env_step(step), ExperienceData._store))
            stops[-1].patch(monkeypatch, ExperienceData, "_store")
        resume: list[str] = []
        for n in range(1, 4):
            assert fit(stopped, untrained_vlm, *more, *resume) == 143
            assert sum(stop.sent for stop in stops) == n
            resume = ["--ckpt_path", "last"]
        assert fit(stopped, untrained_vlm, *more, *resume) == 0
    assert_same_run(stopped / "run", tmp_path / "through" / "run", rounds_trained=1)
    state = torch.load(stopped / "run" / "checkpoints" / "last.ckpt", weights_only=True)["ExperienceData"]
    # Warm-up ends with the 20th agent step: 131 steps follow it, 65 updates, and half an update is owed.
    assert state["counters"]["grad_steps"] == 65
    assert state["updates_owed"] == 0.5
    rows = replay(stopped / "run")
    assert rows["env"].tolist() == [0, 1, 2] * 50
    for env in range(3):
        own = rows[rows["env"] == env]
        before = torch.cat([torch.zeros(1, 1), own["action"][:-1] * ~own["next", "done"][:-1]])
        assert torch.equal(own["previous_action"], before)


def test_an_evaluation_that_was_due_is_made_up_for_by_other_environments(
    untrained_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Due at 3050: three environments pass that by their step from 3000 to 3120; a single one's would begin at 3080.
    more = ("--data.eval_every_env_steps", "3050")
    monkeypatch.setattr(OneCollector, "lost_episodes", property(lambda self: 2))
    with monkeypatch.context() as stop:
        SignalOnce(signal.SIGTERM, lambda module: module.counters.env_steps == 3120, SACModule.validation_step).patch(
            stop, SACModule, "validation_step"
        )
        assert fit(tmp_path, untrained_vlm, *more, "--data.num_envs", "3") == 143
    assert fit(tmp_path, untrained_vlm, *more, "--ckpt_path", "last") == 0
    with (tmp_path / "run" / "curve.csv").open() as file:
        assert [int(row["env_steps"]) for row in csv.DictReader(file)] == [120, 3120, 6000]
    # Both parts of the run lost two.
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["lost_episodes"] == 4


def test_stopped_at_every_moment_in_turn(uninterrupted: Path, untrained_vlm: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        stops = []
        for owner, name, when in MOMENTS.values():
            stops.append(SignalOnce(signal.SIGTERM, when, getattr(owner, name)))
            stops[-1].patch(monkeypatch, owner, name)
        resume: list[str] = []
        for n in range(1, len(MOMENTS) + 1):
            assert fit(tmp_path, untrained_vlm, *VARIANT, *resume) == 143
            assert sum(stop.sent for stop in stops) == n
            resume = ["--ckpt_path", "last"]
        assert fit(tmp_path, untrained_vlm, *VARIANT, *resume) == 0
    assert_same_run(tmp_path / "run", uninterrupted)


def assert_same_run(run: Path, other: Path, rounds_trained: int = 2) -> None:
    """Checkpoint, replay, adapters and everything that was logged, but for times and places."""
    checkpoints = [torch.load(r / "checkpoints" / "last.ckpt", weights_only=True) for r in (run, other)]
    assert_same(*({k: v for k, v in c.items() if k not in ("loops", "callbacks")} for c in checkpoints), at="ckpt")
    for mine, theirs in zip(*(c["callbacks"].items() for c in checkpoints), strict=True):
        if "Checkpoint" not in mine[0] and mine[0] != "RunProfile":  # whose counts are of what was done twice as well
            assert_same(mine[1], theirs[1], at=mine[0])
    assert_same(*(replay(r).to_dict() for r in (run, other)), at="replay")
    adapters = sorted(p.relative_to(other) for p in other.glob("rounds/*_adapter/adapter_model.safetensors"))
    assert len(adapters) == rounds_trained
    for name in adapters:
        assert_same(load_file(run / name), load_file(other / name), at=str(name))
    answers = sorted(p.relative_to(other) for p in other.glob("rounds/*.safetensors"))
    assert len(answers) >= rounds_trained
    for name in answers:
        assert_same(load_file(run / name), load_file(other / name), at=str(name))
    for name in ("curve.csv", "logs/csv/metrics.csv"):
        tables = [without_times(list(csv.DictReader((r / name).open()))) for r in (run, other)]
        assert tables[0] == tables[1], name
    summaries = [json.loads((r / "summary.json").read_text()) for r in (run, other)]
    assert_same(*summaries, at="summary")


def without_times(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if "seconds" not in k and "memory" not in k} for row in rows]


def assert_same(a: Any, b: Any, at: str) -> None:
    """Equal, bit for bit; durations and the replay's place apart."""
    if at.endswith(("/seconds", "/seconds_renewing", "/peak_memory_mb", "ExperienceData/replays", "/folder")):
        return
    assert type(a) is type(b), at
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b) or (a.isnan() & b.isnan() | (a == b)).all(), at
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            assert_same(a[key], b[key], at=f"{at}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, at=f"{at}/{i}")
    else:
        assert a == b or (a != a and b != b), (at, a, b)


def test_killed_between_the_last_checkpoint_and_the_summary(
    uninterrupted: Path, untrained_vlm: Path, tmp_path: Path
) -> None:
    # The resumed run has nothing left to train; its summary still tells of the rounds.
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    assert fit(tmp_path, untrained_vlm, *VARIANT, "--ckpt_path", "last") == 0
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_second_ctrl_c_stops_at_once(untrained_vlm: Path, tmp_path: Path) -> None:
    original = ExperienceData._store

    def twice(data: ExperienceData, collected: Any) -> Any:
        if data.counters.env_steps == 3200:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the second one was ignored")
        return original(data, collected)

    before = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ExperienceData, "_store", twice)
        assert fit(tmp_path, untrained_vlm) == 130
    signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored, since the process ends
    assert fit(tmp_path, untrained_vlm, "--ckpt_path", "last", "--data.max_env_steps", "3400") == 0  # from 3000


SAVE_OFTEN = """
trainer:
  callbacks+:
    - class_path: covr_lightning.callbacks.RunCheckpoint
      init_args: {every_env_steps: 200}
"""


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(
    kills: int, uninterrupted: Path, untrained_vlm: Path, tmp_path: Path
) -> None:
    often, moments = tmp_path / "often.yaml", random.Random(0)
    often.write_text(SAVE_OFTEN)
    arguments = [*VARIANT, "--config", str(often)]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"

    def started() -> BaseProcess:
        resume = ["--ckpt_path", "last"] if last.exists() else []
        command = fit_arguments(tmp_path, untrained_vlm, *arguments, *resume)
        return start("covr_lightning.cli", command, tmp_path / "log")

    # It saves every 200 of 6000 steps. A kill may come up to a fifth of a second late, a few saves more on a fast
    # machine; the last one leaves 1000 steps and an evaluation.
    killed = 0
    for step in sorted(moments.sample(range(0, 5000, 200), kills)):
        if env_steps_saved(last) < 5000:
            kill_after(started(), last, step, moments.uniform(0, 0.2))
            killed += 1
    assert killed >= min(kills, 8)
    at_last = started()
    at_last.join()
    assert at_last.exitcode == 0, (tmp_path / "log").read_text()
    assert_same_run(tmp_path / "run", uninterrupted)
