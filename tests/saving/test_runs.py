"""Whole runs: what they leave on disk, and how they go on after a kill, damage and a move."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from covr_lightning.callbacks import RunCheckpoint

from covr_lightning.errors import ConfigError
from covr_lightning.random_state import _say_once
from covr_lightning.saving.lock import only_run_in
from tests.forked import start
from tests.saving.whole_runs import command, summary
from tests.short_runs import env_steps_saved, kill_after


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
        kill_after(start("covr_lightning.cli", fit, tmp_path / "log"), last, step, moments.uniform(0, 0.2))
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
        for words in (
            ["fit", None, *longer],
            ["test", None],
            ["validate", None],
            ["export", None, "--out", str(tmp_path)],
        ):
            sentence = refused(*words, "--ckpt_path", str(last))
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
        (("--model.tanh", "true"), ("weights of the same shapes: model.tanh was False, now is True",)),
        (
            ("--model.actor_head", "{class_path: GaussianActor, init_args: {log_std_bounds: [-5, 2]}}"),
            ("model.actor_head.log_std_bounds was [-10.0, 2.0], now is [-5.0, 2.0]",),
        ),
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


def test_the_oldest_of_equals_is_the_worst_after_a_resume(tmp_path: Path) -> None:
    kept = {str(tmp_path / f"best-env{step}.ckpt"): torch.tensor(value) for step, value in ((40, 0.0), (80, 0.0))}
    for path in kept:
        Path(path).touch()
    resumed = RunCheckpoint(save_top_k=2, folder=str(tmp_path))
    resumed.load_state_dict({"best_k_models": kept})
    assert Path(resumed.kth_best_model_path).name == "best-env40.ckpt"  # which Lightning takes away first


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
