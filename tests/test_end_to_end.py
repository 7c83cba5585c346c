"""The whole loop through the command line: fit, rounds, guidance, checkpoints, resume, test."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from covr_lightning.cli import main
from covr_lightning.finetune.saved_rows import load_rows
from covr_lightning.saving.checkpoints import load_checkpoint
from covr_lightning.saving.manifest import manifests_of
from tests.short_runs import SMALL, fit, replay, short_rounds


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, untrained_vlm: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert fit(folder, untrained_vlm) == 0
    return folder / "run"


def test_rounds_are_run_and_recorded(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert [r["env_steps"] for r in summary["rounds"]] == [1200, 3600]
    assert summary["env_steps"] == 6000
    assert summary["grad_steps"] == 150 - 20 + 1  # the update comes with the step that ends the warm-up
    assert summary["replay_bytes_per_transition"] <= 1.5 * 3 * 40 * 40
    # At agent step 30 one episode of 25 steps is over; at 90 two more are: rows open at the first round count.
    assert [r["rows"] for r in summary["rounds"]] == [25, 50]
    assert summary["rounds"][0]["unparsable_before"] == 1.0  # random weights; two steps may teach the format
    for r in summary["rounds"]:
        assert r["kept"] == r["rows"]
        assert r["held_out"] == round(0.2 * r["kept"])
        assert 0 < r["trained"] <= r["kept"] - r["held_out"]
        assert len(r["losses"]) == 2
        assert 0 <= r["unparsable_after"] <= 1
        assert r["error_constant"] > 0
        assert 0 < r["noise"] < 2
        written = json.loads((run / "rounds" / f"round_{r['round']:03d}.json").read_text())
        assert written == r or written["losses"] == r["losses"]
        assert (run / "rounds" / f"round_{r['round']:03d}_adapter" / "adapter_model.safetensors").is_file()


def test_guidance_labels_after_the_first_round_only(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    # Agent steps 30 … 149 of 150 are asked for at every second one; the last batch may still wait.
    assert 52 <= summary["labels_asked"] <= 60
    with (run / "logs" / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/lambda")]
    lam = {float(row["step"]): float(row["train/lambda"]) for row in rows}
    assert all(value == (1.0 if step >= 1240 else 0.0) for step, value in lam.items())


def test_training_returns_are_logged(run: Path) -> None:
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["ExperienceData"]
    returns = replay(run)["next", "reward"].reshape(6, 25).sum(1).tolist()
    assert len({*returns}) == 6
    with (run / "logs" / "csv" / "metrics.csv").open() as file:
        logged = {int(row["step"]): float(row["train/return"]) for row in csv.DictReader(file) if row["train/return"]}
    # Every tenth update is logged: those at agent steps 29, 39, …; the sixth episode ends with the run, after the last.
    steps = [40 * agent_step for agent_step in (29, 59, 79, 109, 129)]
    assert logged == pytest.approx(dict(zip(steps, returns[:5], strict=True)))
    assert saved["processes"][0]["training_returns"] == pytest.approx(returns[5:])


def test_curve_and_checkpoints(run: Path) -> None:
    with (run / "curve.csv").open() as file:
        steps = [int(row["env_steps"]) for row in csv.DictReader(file)]
    assert steps == [40, 3000, 6000]
    assert (run / "curve.png").stat().st_size > 5000
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert (run / "config.yaml").is_file()
    # Checkpoints hold tensors and primitives only.
    torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def test_the_best_checkpoint_is_the_best_evaluations(run: Path) -> None:
    curve = json.loads((run / "summary.json").read_text())["curve"]
    steps = {}
    for name in ("best", "last"):
        checkpoint = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        (data,) = (value for key, value in checkpoint.items() if "ExperienceData" in key)
        steps[name] = data["counters"]["env_steps"]
    assert steps["best"] == max(curve, key=lambda point: point["return"])["env_steps"]
    assert steps["last"] == 6000


def test_validate_reproduces_the_evaluation_and_test_plays_other_episodes(
    run: Path, untrained_vlm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = json.loads((run / "summary.json").read_text())["curve"][-1]
    arguments = [*SMALL, *short_rounds(run.parent), "--runs_dir", str(run.parent), "--vlm.path", str(untrained_vlm)]
    arguments += ["--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--video", "true"]
    assert main(["validate", *arguments]) == 0
    assert f"{last['return']:.6f}"[:7] in capsys.readouterr().out
    assert main(["test", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "test/return" in printed
    assert f"{last['return']:.6f}"[:7] not in printed
    assert list((run / "videos").glob("*.mp4"))


def test_a_vlm_may_be_shown_two_frames(untrained_vlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = ["--vlm.frames", "2", "--trainer.callbacks.save_rows", "true"]
    assert fit(tmp_path, untrained_vlm, *two, "--data.max_env_steps", "3000") == 0
    pictures = load_rows(tmp_path / "run" / "rounds" / "round_001_rows.safetensors").rows["frame"]
    assert pictures.shape == (25, 3, 40, 80)
    # A row's newest frame stands on the left of its episode's next row; the first row has it twice.
    assert torch.equal(pictures[1:, ..., :40], pictures[:-1, ..., 40:])
    assert torch.equal(pictures[0, ..., :40], pictures[0, ..., 40:])
    assert not torch.equal(pictures[5, ..., :40], pictures[5, ..., 40:])
    assert fit(tmp_path, untrained_vlm, "--ckpt_path", "last") == 2
    assert "vlm.frames is 1, but the checkpoint's run showed its VLM 2" in capsys.readouterr().err
    assert fit(tmp_path, untrained_vlm, *two, "--ckpt_path", "last") == 0


def test_resume_goes_on_from_the_last_checkpoint(run: Path, untrained_vlm: Path, tmp_path: Path) -> None:
    assert fit(tmp_path, untrained_vlm, "--data.max_env_steps", "3000") == 0
    first = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert first["env_steps"] == 3000
    assert fit(tmp_path, untrained_vlm, "--ckpt_path", "last") == 0
    resumed = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert resumed["env_steps"] == 6000
    assert resumed["grad_steps"] == 150 - 20 + 1
    assert [r["env_steps"] for r in resumed["rounds"]] == [1200, 3600]
    assert [point["env_steps"] for point in resumed["curve"]] == [40, 3000, 6000]


def test_after_each_round_the_answers_in_the_replay_are_given_anew(untrained_vlm: Path, tmp_path: Path) -> None:
    assert fit(tmp_path, untrained_vlm, "--data.stale_priors", "relabel", "--data.max_env_steps", "5000") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    first, second = summary["rounds"]
    # Labelling begins after the first round; agent steps 30 … 88 of every second one are in D at the second.
    assert (first["renewed"], second["renewed"]) == (0, 30)
    [manifest] = manifests_of(load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt"))
    assert manifest["rows_written"] == 125
    rounds = replay(tmp_path / "run")["vlm_round"].squeeze(-1)
    labelled = rounds[rounds >= 0]
    assert len(labelled) >= 30
    assert (labelled == 2).all()


def test_two_seeds_differ_and_one_seed_repeats(untrained_vlm: Path, tmp_path: Path) -> None:
    ends = []
    for seed in ("3", "3", "4"):
        assert (
            fit(tmp_path, untrained_vlm, "--data.seed", seed, "--model.seed", seed, "--data.max_env_steps", "2000") == 0
        )
        newest = max(tmp_path.glob("run*/summary.json"), key=lambda p: p.stat().st_mtime).parent
        state = torch.load(newest / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        ends.append(state["actor.mlp.4.weight"])
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_lambda_0_gives_the_base_agent_bit_for_bit_with_a_vlm_at_work(untrained_vlm: Path, tmp_path: Path) -> None:
    """Labelling, fine-tuning and its dropout draw nothing from the agent's random numbers."""
    alone = ("--trainer.callbacks.vlm_episodes", "1")
    assert fit(tmp_path / "with", untrained_vlm, "--model.prior.lam", "0", *alone) == 0
    plain = tmp_path / "plain.yaml"
    plain.write_text(
        """
model: {class_path: covr_lightning.agent.SACModule, init_args: {prior: {class_path: covr_lightning.agent.NoPrior}}}
trainer: {callbacks: null}
"""
    )
    arguments = ["fit", *SMALL, "--runs_dir", str(tmp_path / "without"), "--name", "run", "--vlm.path", "nowhere"]
    assert main([*arguments, "--config", str(plain)]) == 0
    summaries = [json.loads((tmp_path / name / "run" / "summary.json").read_text()) for name in ("with", "without")]
    assert [len(s["rounds"]) for s in summaries] == [2, 0]
    assert summaries[0]["labels_asked"] > 50
    assert summaries[1]["labels_asked"] == 0
    states = [
        torch.load(tmp_path / name / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("with", "without")
    ]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
