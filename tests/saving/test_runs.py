"""Whole runs: what they leave on disk, and how they go on after a kill, a full disk, damage and a move."""

from __future__ import annotations

import csv
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from covr_lightning.callbacks import RunCheckpoint

from covr_lightning.cli import main
from covr_lightning.data.datamodule import ExperienceData
from covr_lightning.errors import ConfigError
from covr_lightning.random_state import _say_once
from covr_lightning.saving.lock import only_run_in
from tests.short_runs import env_steps_saved, kill_after

# An agent step is 40 environment steps, an episode 25 agent steps; evaluations at 40, 1000 and 2000 environment steps.
SETTINGS = """
data:
  class_path: covr_lightning.data.ExperienceData
  init_args:
    env: {class_path: covr_lightning.envs.DMControl, init_args: {task: cartpole-swingup, action_repeat: 40, size: 40}}
    max_env_steps: 2000
    warmup_agent_steps: 20
    batch_size: 8
    replay_capacity: 1000
    eval_every_env_steps: 1000
    eval_episodes: 1
model:
  class_path: covr_lightning.agent.SACModule
  init_args:
    prior: {class_path: covr_lightning.agent.NoPrior}
    augmentation: {class_path: covr_lightning.agent.RandomCrop, init_args: {size: 32}}
    hidden: 16
    filters: 4
trainer: {accelerator: cpu, enable_progress_bar: false, log_every_n_steps: 10}
"""


def command(tmp_path: Path, name: str, options: dict[str, Any] | None = None, runs: Path | None = None) -> list[str]:
    """The command line of a small run in `tmp_path`, saved as `options` of RunCheckpoint say."""
    config = yaml.safe_load(SETTINGS)
    if options is not None:
        config["trainer"]["callbacks"] = [
            {"class_path": "covr_lightning.callbacks.RunCheckpoint", "init_args": options}
        ]
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return [name, "--config", str(path), "--runs_dir", str(runs or tmp_path), "--name", "run"]


@pytest.fixture
def covr(tmp_path: Path) -> Callable[..., int]:
    """``covr("fit", options, …)`` runs that command line."""

    def run(name: str, options: dict[str, Any] | None = None, *more: str, runs: Path | None = None) -> int:
        return main([*command(tmp_path, name, options, runs), *more])

    return run


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Any]:
    """A context in which a run dies at an environment step and nothing is saved on the way out, as after kill −9."""

    class Killed(BaseException):
        pass

    def context(step: int) -> Any:
        store = ExperienceData._store

        def dying(data: ExperienceData, collected: Any) -> Any:
            if data.counters.env_steps >= step:
                raise Killed
            return store(data, collected)

        patch = pytest.MonkeyPatch()
        patch.setattr(ExperienceData, "_store", dying)
        patch.setattr(RunCheckpoint, "on_exception", lambda *arguments: None)

        class Context:
            def __enter__(self) -> None:
                self.expected = pytest.raises(Killed)
                self.expected.__enter__()

            def __exit__(self, *error: Any) -> bool:
                patch.undo()
                return bool(self.expected.__exit__(*error))

        return Context()

    return context


def test_what_is_kept(covr: Callable[..., int], tmp_path: Path) -> None:
    assert covr("fit", {"save_top_k": 2}) == 0
    folder = tmp_path / "run" / "checkpoints"
    returns = {point["env_steps"]: point["return"] for point in summary(tmp_path / "run")["curve"]}
    assert list(returns) == [40, 1000, 2000]
    best = sorted(returns, key=lambda step: returns[step], reverse=True)[:2]
    assert {file.name for file in folder.iterdir()} == {"last.ckpt", *(f"best-env{step}.ckpt" for step in best)}
    for step in best:
        assert env_steps_saved(folder / f"best-env{step}.ckpt") == step
    named = {
        entry["name"]
        for path in folder.glob("*.ckpt")
        for entry in torch.load(path, weights_only=True)["ExperienceData"]["replays"][0]["parts"]
    }
    assert {file.name for file in (tmp_path / "run" / "replay").iterdir()} == named


@pytest.mark.parametrize(("at", "saved"), [(320, 200), (1720, 1600)])
def test_killed_between_evaluations(
    covr: Callable[..., int], killed_at: Callable[[int], Any], tmp_path: Path, at: int, saved: int
) -> None:
    options = {"every_env_steps": 200}
    with killed_at(at):
        covr("fit", options)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert env_steps_saved(last) == saved
    assert covr("fit", options, "--ckpt_path", "last") == 0
    end = summary(tmp_path / "run")
    assert end["env_steps"] == env_steps_saved(last) == 2000
    assert end["grad_steps"] == 50 - 20 + 1
    assert [point["env_steps"] for point in end["curve"]] == [40, 1000, 2000]


def test_killed_between_the_last_checkpoint_and_the_summary(covr: Callable[..., int], tmp_path: Path) -> None:
    assert covr("fit") == 0
    before = summary(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    assert covr("fit", None, "--ckpt_path", "last") == 0
    assert summary(tmp_path / "run") == before


@pytest.mark.slow
def test_kill_9_again_and_again(covr: Callable[..., int], tmp_path: Path) -> None:
    options, moments = {"every_env_steps": 80}, random.Random(0)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    saved = []
    for step in (80, 480, 880):  # of 2000; evaluations at 1000 and at the end
        fit = command(tmp_path, "fit", options) + (["--ckpt_path", "last"] if last.exists() else [])
        process = subprocess.Popen([sys.executable, "-m", "covr_lightning.cli", *fit], stderr=subprocess.DEVNULL)
        kill_after(process, last, step, moments.uniform(0, 0.2))
        saved.append(env_steps_saved(last))
    assert saved == sorted(set(saved))
    assert covr("fit", options, "--ckpt_path", "last") == 0
    assert env_steps_saved(last) == 2000
    assert summary(tmp_path / "run")["grad_steps"] == 50 - 20 + 1
    assert not list(tmp_path.rglob("*.part"))


def test_a_moved_run_goes_on_and_keeps_its_best(
    covr: Callable[..., int], killed_at: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_at(1200):
        covr("fit")
    best = tmp_path / "run" / "checkpoints" / "best.ckpt"
    first = torch.load(best, weights_only=True)["callbacks"]
    (score,) = (
        state["best_model_score"]
        for name, state in first.items()
        if "ModelCheckpoint" in name or "RunCheckpoint" in name
    )
    (tmp_path / "moved").mkdir()
    (tmp_path / "run").rename(tmp_path / "moved" / "run")
    assert covr("fit", None, "--ckpt_path", "last", runs=tmp_path / "moved") == 0
    folder = tmp_path / "moved" / "run"
    assert summary(folder)["env_steps"] == 2000
    returns = {point["env_steps"]: point["return"] for point in summary(folder)["curve"]}
    assert max(returns[40], returns[1000]) == pytest.approx(float(score))
    assert env_steps_saved(folder / "checkpoints" / "best.ckpt") == max(returns, key=lambda step: returns[step])
    assert not (tmp_path / "run").exists()


def test_damage_is_told_in_one_sentence(
    covr: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert covr("fit", {"save_top_k": -1}) == 0
    folder, longer = tmp_path / "run" / "checkpoints", ["--data.max_env_steps", "3000"]

    def refused(*arguments: Any) -> str:
        capsys.readouterr()
        assert covr(*arguments) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    last, good, older = folder / "last.ckpt", folder / "best-env2000.ckpt", folder / "best-env1000.ckpt"
    whole = last.read_bytes()
    for damaged in (whole[:-1000], whole[:3000] + bytes([whole[3000] ^ 16]) + whole[3001:], b"PNG and so on"):
        last.write_bytes(damaged)
        for command in (
            ["fit", None, *longer],
            ["test", None],
            ["validate", None],
            ["export", None, "--out", str(tmp_path)],
        ):
            sentence = refused(*command, "--ckpt_path", str(last))
            assert str(last) in sentence
            assert sentence.endswith(f"; the newest good checkpoint of this run is {good}.")
    last.write_bytes(whole)
    # The last part of the replay is needed to train on, not to test.
    older_parts, parts = (
        [entry["name"] for entry in torch.load(path, weights_only=True)["ExperienceData"]["replays"][0]["parts"]]
        for path in (older, last)
    )
    (newest,) = set(parts) - set(older_parts)
    part = tmp_path / "run" / "replay" / newest
    part.write_bytes(part.read_bytes()[:-1])
    sentence = refused("fit", None, "--ckpt_path", "last", *longer)
    assert f"The replay's part {part} is damaged" in sentence
    assert sentence.endswith(f"; the newest good checkpoint of this run is {older}.")
    part.unlink()
    assert f"The replay's part {part} is missing" in refused("fit", None, "--ckpt_path", "last", *longer)
    assert last.read_bytes() == whole  # a run that could not begin saves nothing
    assert covr("test", None, "--ckpt_path", str(last)) == 0
    assert covr("fit", None, "--ckpt_path", str(older)) == 0
    assert env_steps_saved(last) == 2000
    with only_run_in(tmp_path / "run"):
        assert "Another run is writing to" in refused("fit", None, "--ckpt_path", "last", *longer)


def test_a_resumed_run_goes_on_with_the_learning_rates_of_its_config(covr: Callable[..., int], tmp_path: Path) -> None:
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert covr("fit") == 0

    def rates() -> list[tuple[float, float]]:
        states = torch.load(last, weights_only=True)["optimizer_states"]
        return [(state["param_groups"][0]["lr"], state["param_groups"][0]["betas"][0]) for state in states]

    assert rates() == [(1e-3, 0.9), (1e-3, 0.9), (1e-4, 0.5)]
    more = ("--model.critic_lr", "1e-5", "--model.alpha_betas", "[0.4,0.999]", "--data.max_env_steps", "2400")
    assert covr("fit", None, "--ckpt_path", "last", *more) == 0
    assert rates() == [(1e-5, 0.9), (1e-3, 0.9), (1e-4, 0.4)]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--model.hidden", "8"), ("is of other networks (YAML key model)", "critic.q1.0.weight is (16, 51) there")),
        (
            ("--data.sampler", "covr_lightning.data.ProportionalSampler"),
            ("data.sampler is ProportionalSampler", "is of a run with RandomSampler"),
        ),
    ],
)
def test_a_run_cannot_go_on_with_other_parts(
    covr: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...],
    parts: tuple[str, ...],
) -> None:  # fmt: skip
    assert covr("fit", None, "--data.max_env_steps", "1000") == 0
    config = (tmp_path / "run" / "config.yaml").read_bytes()
    capsys.readouterr()
    assert covr("fit", None, "--ckpt_path", "last", *arguments) == 2
    [sentence] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("covr:")]
    for part in parts:
        assert part in sentence
    assert (tmp_path / "run" / "config.yaml").read_bytes() == config


def test_a_checkpoint_of_another_kind_of_device_goes_on(
    covr: Callable[..., int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert covr("fit", None, "--data.max_env_steps", "1000") == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    gpus = torch.arange(16, dtype=torch.uint8)  # a GPU's generator has a state of 16 bytes
    checkpoint["covr_generators"] = [gpus]
    checkpoint["ExperienceData"]["processes"][0]["exploration"]["actor"] = gpus
    torch.save(checkpoint, last)
    _say_once.cache_clear()
    assert covr("fit", None, "--ckpt_path", "last") == 0
    assert caplog.text.count("random numbers are of another kind of device than cpu") == 1
    assert env_steps_saved(last) == 2000


def test_a_run_that_something_else_ends_is_saved(
    covr: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ExperienceData._store

    def ending(data: ExperienceData, collected: Any) -> Any:
        data.trainer.should_stop = data.counters.env_steps == 1480  # type: ignore[union-attr]
        return store(data, collected)

    monkeypatch.setattr(ExperienceData, "_store", ending)
    assert covr("fit") == 0
    assert env_steps_saved(tmp_path / "run" / "checkpoints" / "last.ckpt") == 1520


def test_a_finished_run_that_goes_on_is_not_finished_any_more(
    covr: Callable[..., int], tmp_path: Path, signal_at: Callable[[int, signal.Signals], Any]
) -> None:
    options, run = {"save_top_k": -1}, tmp_path / "run"
    assert covr("fit", options) == 0
    with signal_at(1480, signal.SIGTERM):
        again = covr("fit", options, "--ckpt_path", str(run / "checkpoints" / "best-env1000.ckpt"))
    assert again == 128 + signal.SIGTERM
    assert env_steps_saved(run / "checkpoints" / "last.ckpt") == 1520
    assert not (run / "summary.json").exists()
    assert covr("fit", options, "--ckpt_path", "last") == 0
    assert summary(run)["env_steps"] == env_steps_saved(run / "checkpoints" / "last.ckpt") == 2000


def test_a_second_signal_does_not_keep_a_run_from_being_saved(
    covr: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signal_at: Callable[[int, signal.Signals], Any],
) -> None:
    save, before = RunCheckpoint._save_last_checkpoint, signal.getsignal(signal.SIGUSR1)

    def signalled(checkpoint: RunCheckpoint, *arguments: Any) -> None:
        if checkpoint._saved_env_steps == 1000:
            os.kill(os.getpid(), signal.SIGUSR1)
        save(checkpoint, *arguments)

    monkeypatch.setattr(RunCheckpoint, "_save_last_checkpoint", signalled)
    seen: list[int] = []
    ignored = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))  # by default it would end us
    try:
        with signal_at(1480, signal.SIGUSR1):
            assert covr("fit") == 128 + signal.SIGUSR1
        assert env_steps_saved(tmp_path / "run" / "checkpoints" / "last.ckpt") == 1520
        assert not seen
        os.kill(os.getpid(), signal.SIGUSR1)  # the signals are given back
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, ignored)
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.fixture
def signal_at() -> Callable[[int, signal.Signals], Any]:
    """A context in which this process gets a signal in the agent step that begins at an environment step."""

    @contextmanager
    def context(step: int, signum: signal.Signals) -> Iterator[None]:
        store = ExperienceData._store

        def signalled(data: ExperienceData, collected: Any) -> Any:
            if data.counters.env_steps == step:
                os.kill(os.getpid(), signum)
            return store(data, collected)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ExperienceData, "_store", signalled)
            yield

    return context


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of eight megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if mount is None or subprocess.run([mount, *options], capture_output=True, check=False).returncode:
        pytest.skip("may not mount a tmpfs here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("on_save_error", ["warn", "stop"])
def test_a_full_disk(
    covr: Callable[..., int],
    tmp_path: Path,
    small_disk: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    on_save_error: str,
) -> None:
    checkpoints, filler = small_disk / "run" / "checkpoints", small_disk / "filler"
    store, seen = ExperienceData._store, {}

    def filling(data: ExperienceData, collected: Any) -> Any:
        if data.counters.env_steps == 1000:
            free = shutil.disk_usage(small_disk).free
            filler.write_bytes(bytes(free - 60_000))  # room for logs, not for a part
        if data.counters.env_steps == 1640:
            seen["last"] = env_steps_saved(checkpoints / "last.ckpt")
            seen["unfinished"] = [str(file) for file in small_disk.rglob("*.part")]
            filler.unlink()
        return store(data, collected)

    monkeypatch.setattr(ExperienceData, "_store", filling)
    warned: list[str] = []
    log = logging.getLogger("covr_lightning.callbacks.checkpoints")
    monkeypatch.setattr(log, "warning", lambda text, *values: warned.append(text % values))
    status = covr("fit", {"every_env_steps": 600, "on_save_error": on_save_error}, runs=small_disk)
    told = warned + [line for line in capsys.readouterr().err.splitlines() if "No space left on device" in line]
    assert len(told) == 1
    assert "At 1200 environment steps the run could not be saved" in told[0]
    assert "up to step 1000" in told[0]
    assert not list(small_disk.rglob("*.part"))
    if on_save_error == "warn":
        assert status == 0
        assert seen == {"last": 1000, "unfinished": []}
        assert summary(small_disk / "run")["env_steps"] == env_steps_saved(checkpoints / "last.ckpt") == 2000
    else:
        assert status == 2
        assert "stops" in told[0]
        assert env_steps_saved(checkpoints / "last.ckpt") == 1000
    monkeypatch.undo()
    filler.unlink(missing_ok=True)
    assert covr("fit", None, "--ckpt_path", "last", "--data.max_env_steps", "2400", runs=small_disk) == 0
    assert env_steps_saved(checkpoints / "last.ckpt") == 2400


def test_a_disk_that_is_full_in_an_evaluation(
    covr: Callable[..., int], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, filler, during = ExperienceData._store, small_disk / "filler", small_disk / "run" / "curve.csv"
    curves: list[str] = []

    def filling(data: ExperienceData, collected: Any) -> Any:
        if data.counters.env_steps == 960:  # the evaluation comes at 1000
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
        if data.counters.env_steps == 1640:
            curves.append(during.read_text())
            filler.unlink()
        return store(data, collected)

    monkeypatch.setattr(ExperienceData, "_store", filling)
    assert covr("fit", runs=small_disk) == 0
    assert [line.split(",")[0] for line in curves[0].splitlines()] == ["env_steps", "40"]  # the old one, whole
    assert [point["env_steps"] for point in summary(small_disk / "run")["curve"]] == [40, 1000, 2000]
    assert [line.split(",")[0] for line in during.read_text().splitlines()] == ["env_steps", "40", "1000", "2000"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_for_the_logs(
    covr: Callable[..., int], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, filler = ExperienceData._store, small_disk / "filler"

    def filling(data: ExperienceData, collected: Any) -> Any:
        if data.counters.env_steps == 1200:
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
        if data.counters.env_steps == 1640:
            filler.unlink()
        return store(data, collected)

    monkeypatch.setattr(ExperienceData, "_store", filling)
    loggers = [f"--trainer.logger+=covr_lightning.run_log.{kind}" for kind in ("RunCSVLogger", "RunTensorBoardLogger")]
    where = [f"--trainer.logger.save_dir={small_disk / 'logs'}"]
    csv_often, tensorboard_often = ["--trainer.logger.flush_logs_every_n_steps=1"], ["--trainer.logger.max_queue=1"]
    often = ["--trainer.log_every_n_steps=1"]
    arguments = [loggers[0], *where, *csv_often, loggers[1], *where, *tensorboard_often, *often]
    assert covr("fit", None, *arguments, runs=small_disk) == 0
    [path] = (small_disk / "logs").rglob("metrics.csv")
    with path.open(newline="") as file:
        updates = [int(row["step"]) for row in csv.DictReader(file) if row["train/critic_loss"]]
    assert updates == [*range(800, 2001, 40)]  # one from the warm-up's last step on


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"save_top_k": -2}, ["save_top_k is -2", "−1"]),
        ({"every_env_steps": 0}, ["every_env_steps is 0", "at least 1"]),
        ({"every_env_steps": 500, "last": False}, ["every_env_steps is 500", "last is false"]),
        ({"on_save_error": "ignore"}, ["'ignore'", "'warn'", "'stop'"]),
    ],
)
def test_wrong_options(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        RunCheckpoint(**options)
    for part in parts:
        assert part in str(caught.value)
