"""`covr sweep` from the command line, and once with real runs."""

from __future__ import annotations

import csv
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from covr_lightning import agent
from covr_lightning.cli import main
from covr_lightning.errors import ConfigError
from covr_lightning.sweep.configuration import configuration
from covr_lightning.sweep.differences import (
    _NOT_BY_EPISODES,
    differences,
    read_configuration,
    seed_arguments,
    with_seed,
)

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
    eval_episodes: 2
model:
  class_path: covr_lightning.agent.SACModule
  init_args:
    augmentation: {class_path: covr_lightning.agent.RandomCrop, init_args: {size: 32}}
    hidden: 16
    filters: 4
trainer: {accelerator: cpu, log_every_n_steps: 10}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a folder `pair` of two small configs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pair").mkdir()
    (tmp_path / "pair" / "small.yaml").write_text(SETTINGS)
    (tmp_path / "pair" / "wide.yaml").write_text("base: pair/small.yaml\nmodel: {init_args: {hidden: 24}}\n")
    return tmp_path


def test_a_dry_run_prints_the_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "pair", "--seeds", "3", "5", "--dry_run", "--", "--data.batch_size", "9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[3] == (
        "covr fit --config pair/wide.yaml --trainer.enable_progress_bar false --data.batch_size 9 "
        "--seed_everything 5 --data.seed 5 --model.seed 5 --runs_dir runs/pair/wide --name seed_5"
    )
    assert not (folder / "runs").exists()


def test_a_list_and_a_shipped_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "pair/wide.yaml", "dmc_rad.yaml", "--seeds", "1", "--dry_run", "--runs_dir", "r"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("--runs_dir r/sweep/wide --name seed_1")
    assert second.startswith("covr fit --config dmc_rad.yaml ")
    arguments = ["sweep", "sweep_lambda", "--seeds", "1", "--name", "mine", "--dry_run", "--", "--config=road_hw.yaml"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("--config ")[1].split()[0] for line in lines] == [
        f"sweep_lambda/lambda_{n}.yaml" for n in (1, 2, 3)
    ]
    assert all("--runs_dir runs/mine/lambda_" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["ablatoins"], ["'ablatoins'", "did you mean ablations"]),
        (["pair", "--jobs", "0"], ["--jobs is 0", "at least 1"]),
        (["pair", "--seeds", "1", "1"], ["--seeds is 1 1", "different"]),
        (["pair", "--seeds", "1", "99999999999"], ["--seeds is 1 99999999999", "between 0 and 2147483647"]),
        (["pair", "--name", "../y"], ["--name is '../y'", "the name of one folder"]),
        (["pair", "--sedes", "1"], ["--sedes", "covr sweep --help"]),
        (["pair", "--", "--data.init_args.seed=4"], ["--data.seed", "--seeds"]),
        (["pair", "--", "--name", "x"], ["--name", "every run the same"]),
        (["pair", "--", "--data.batch_sise", "9"], ["batch_sise", "did you mean batch_size"]),
        (["pair/small.yaml", "pair/small.yaml"], ["named small", "rename"]),
        (["."], ["no *.yaml"]),
        (["vlm_sft.yaml"], ["fine-tunes the VLM alone"]),
    ],
)
def test_wrong_input(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]) -> None:
    assert main(["sweep", *arguments]) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    for part in parts:
        assert part in sentence
    assert not (folder / "runs").exists()


def test_configurations(folder: Path) -> None:
    fit = ["fit", "--config", "pair/wide.yaml"]
    first = configuration([*fit, *seed_arguments(0)])
    fifth = configuration([*fit, *seed_arguments(5), "--runs_dir", "elsewhere", "--video", "true"])
    assert differences(with_seed(first, 5), fifth) == []
    assert differences(first, fifth) == [
        "seed_everything is 0 there, 5 here", "model.seed is 0 there, 5 here", "data.seed is 0 there, 5 here",
    ]  # fmt: skip
    longer = configuration(
        [*fit, "--model.prior", "covr_lightning.agent.ConstantPrior", "--data.max_env_steps", "4000"]
    )
    assert differences(first, longer) == [
        "model.prior is null there, (missing) here",
        "data.max_env_steps is 2000 there, 4000 here",
        "model.prior.class_path is (missing) there, covr_lightning.agent.ConstantPrior here",
        "model.prior.lam is (missing) there, 1.0 here",
        "model.prior.action is (missing) there, sample here",
        "model.prior.mean_over is (missing) there, labelled here",
        "model.prior.q_filter is (missing) there, false here",
    ]
    rounds = ["fit", "--config", "quickstart.yaml"]
    recorded = [f"--trainer.callbacks.{key}" for key in ("save_rows=true", "samples=2", "vlm_episodes=3")]
    assert differences(configuration(rounds), configuration([*rounds, *recorded])) == []
    by_episodes = ["fit", "--config", "learning_cpu/covr_ahead.yaml"]
    assert differences(configuration(by_episodes), configuration([*by_episodes, *recorded])) == [
        "trainer.callbacks.0.vlm_episodes is 2 there, 3 here"
    ]
    assert differences(configuration(rounds), configuration([*rounds, "--trainer.callbacks.entropy_states=5"])) == [
        "trainer.callbacks.0.entropy_states is 1024 there, 5 here"
    ]
    assert read_configuration(Path("none.yaml")) == {}
    with pytest.raises(ConfigError):
        configuration([*fit, "--model.gama", "0.9"])


def test_priors_that_go_by_the_vlm_s_episodes_are_known() -> None:
    priors = [kind for kind in vars(agent).values() if isinstance(kind, type) and issubclass(kind, agent.Prior)]
    assert {kind.__name__ for kind in priors if kind is not agent.Prior and not kind.needs_vlm_return} == {
        *_NOT_BY_EPISODES
    }


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists(), reason="looks into /proc")
def test_a_sweep_that_was_killed_and_run_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sweep", "pair", "--seeds", "1", "2"]
    last = folder / "runs" / "pair" / "small" / "seed_2" / "checkpoints" / "last.ckpt"
    with (folder / "output").open("wb") as output:
        sweep = subprocess.Popen([sys.executable, "-m", "covr_lightning.cli", *arguments], stdout=output)
        while not last.exists():
            assert sweep.poll() is None
            time.sleep(0.01)
        (child,) = children(sweep.pid)
        time.sleep(random.Random(0).uniform(0, 0.3))
        for pid in (sweep.pid, child):
            os.kill(pid, signal.SIGKILL)
        assert sweep.wait() == -signal.SIGKILL
    assert not last.parents[1].joinpath("summary.json").exists()

    assert main(arguments) == 0
    said = capsys.readouterr().out
    for part in (
        "small seed 1 is finished already",
        "small seed 2 goes on",
        "wide seed 1 starts",
        "wide seed 2 finished",
    ):
        assert part in said
    assert "Restored all states" in (folder / "runs" / "pair" / "small" / "seed_2.log").read_text()

    # The run that was cut is the run that was not.
    assert main(["fit", "--config", "pair/small.yaml", *seed_arguments(2), "--name", "through"]) == 0
    curves = [(folder / "runs" / path / "curve.csv").read_text() for path in ("pair/small/seed_2", "through")]
    assert curves[0] == curves[1]

    # The table, by hand.
    with (folder / "runs" / "pair" / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["config"] for row in table] == ["small", "wide"]
    finals = []
    for row in table:
        last_of, best_of = [], []
        for seed in (1, 2):
            text = (folder / "runs" / "pair" / row["config"] / f"seed_{seed}" / "curve.csv").read_text().splitlines()
            returns = [float(line.split(",")[1]) for line in text[1:]]
            assert len(returns) == 3
            last_of.append(returns[-1])
            best_of.append(max(returns))
        expected = [
            statistics.mean(last_of),
            statistics.stdev(last_of),
            statistics.mean(best_of),
            statistics.stdev(best_of),
        ]
        names = ("return", "return_std", "best_return", "best_return_std")
        assert [float(row[name]) for name in names] == pytest.approx(expected, abs=0.005)
        assert (row["seeds"], row["env_steps"]) == ("2", "2000")
        finals += last_of
    assert len(set(finals)) == 4  # four seeds and sizes, four runs
    assert "| small | 2 of 2 | 2000 |" in (folder / "runs" / "pair" / "sweep.md").read_text()

    # Once more: nothing is run. With another setting: one sentence. A run that fails does not stop the others.
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("is finished already") == 4
    assert main([*arguments, "--", "--data.batch_size", "9"]) == 2
    assert "(data.batch_size is 8 there, 9 here)" in capsys.readouterr().err
    (folder / "pair" / "bad.yaml").write_text(
        yaml.safe_dump({"base": "pair/small.yaml", "data": {"init_args": {"env": {"init_args": {"task": "no-task"}}}}})
    )
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert "failed: bad seed 1: exit status 2: covr: " in said
    assert said.count("is finished already") == 4
    assert "- bad seed 2 failed: exit status 2" in (folder / "runs" / "pair" / "sweep.md").read_text()


@pytest.mark.slow
def test_ctrl_c_saves_and_the_sweep_goes_on(folder: Path) -> None:
    arguments = [sys.executable, "-m", "covr_lightning.cli", "sweep", "pair", "--seeds", "1"]
    last = folder / "runs" / "pair" / "small" / "seed_1" / "checkpoints" / "last.ckpt"
    # A shell's background jobs ignore Ctrl-C, and so would the sweep if these tests are one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    sweep = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, start_new_session=True)
    signal.signal(signal.SIGINT, before)
    while not last.exists():
        assert sweep.poll() is None
        time.sleep(0.01)
    os.killpg(sweep.pid, signal.SIGINT)  # as a terminal does
    out, _ = sweep.communicate()
    assert sweep.returncode == 130
    assert "Stopped with 0 of 2 runs finished; run the same command again to go on." in out
    assert "the run stops after this step and is saved" in (folder / "runs/pair/small/seed_1.log").read_text()
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
    assert "small seed 1 goes on" in done.stdout
    assert "2 of 2" not in done.stdout
    assert "1 of 1" in done.stdout
