"""An agent that trains in two processes (gloo, CPU)."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from covr_lightning.agent import ConvTrunk
from tests.forked import launch
from tests.short_runs import fit_arguments

Held = dict[str, Any]

SETTINGS = ("--data.eval_episodes", "3")

WITHOUT_VLM = ("--model.prior", "covr_lightning.agent.NoPrior", "--trainer.callbacks", "null")


def run(
    folder: Path,
    vlm: Path,
    count: int,
    *more: str,
    stop: tuple[str, ...] = (),
    status: tuple[int, ...] = (),
    second: tuple[str, ...] = (),
) -> list[Held]:
    """Train in `count` processes, as torchrun starts them; what each of them holds in the end.

    Args:
        folder: Of all runs.
        vlm: Its folder.
        count: Processes.
        more: Of the command line.
        stop: What befalls the second process: environment steps and the name of a signal that it gets then;
            ``training`` and a signal that it gets in a round's first batch; ``save`` and environment steps, where it
            cannot write its part of the replay.
        status: Exit status of each; if any is not 0, there is nothing to return.
        second: More of the second process's command line.
    """
    arguments = fit_arguments(folder, vlm, *SETTINGS, "--trainer.devices", str(count), *more)
    out = folder / "held"
    out.mkdir(exist_ok=True)
    of_each = [[str(out), *stop, "--", *arguments, *(second if rank == 1 else ())] for rank in range(count)]
    statuses, said = launch("tests.process_of_a_run", of_each, out)
    assert statuses == [*(status or (0,) * count)], said
    if any(status):
        assert "Traceback" not in said
        return []
    return [torch.load(out / f"process_{rank}.pt", weights_only=True) for rank in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder: Path, untrained_vlm: Path) -> list[Held]:
    return run(folder, untrained_vlm, 2)


def test_processes_act_on_environments_of_their_own_and_hold_the_same_agent(two: list[Held]) -> None:
    first, second = two
    assert (first["envs"], second["envs"]) == ([0], [1])
    assert first["batch_size"] == second["batch_size"] == 4  # of 8
    assert not torch.equal(first["actions"], second["actions"])
    assert first["weights"].keys() == second["weights"].keys()
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    # 150 agent steps of both environments together, 40 environment steps each; an update per agent step from the 20th
    # on.
    for held in two:
        assert {n: held["counters"][n] for n in ("env_steps", "agent_steps", "grad_steps", "rounds")} == {
            "env_steps": 6000, "agent_steps": 150, "grad_steps": 131, "rounds": 2,
        }  # fmt: skip
        assert held["global_step"] == 131
        assert len(held["actions"]) == 75


class Normed(ConvTrunk):
    """With a BatchNorm before the convolutions, whose averages each process's frames move."""

    def build(self, channels: int, image_size: tuple[int, int], filters: int, strides: Sequence[int]) -> None:
        super().build(channels, image_size, filters, strides)
        self.norm = torch.nn.BatchNorm2d(channels)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(images.float()) * 50 + 100)


def test_what_networks_have_beside_weights_is_the_same_too(untrained_vlm: Path, tmp_path: Path) -> None:
    """Also after a round at the end, in which each process asks its critics about rows of its own."""
    more = ("--model.encoder", f"{__name__}.Normed", "--data.updates_per_agent_step", "0.5")
    more += ("--trainer.callbacks.score", "covr_lightning.finetune.QScore")
    first, second = run(tmp_path, untrained_vlm, 2, *more, "--data.max_env_steps", "3600")
    assert first["counters"]["rounds"] == 2
    assert first["weights"]["trunk.norm.num_batches_tracked"] > 20
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name


def test_an_evaluation_runs_once(two: list[Held], folder: Path) -> None:
    seeds = [10_000, 10_001, 10_002]
    evaluations = [sorted([*two[0]["played"][2 * i : 2 * i + 2], *two[1]["played"][i : i + 1]]) for i in range(3)]
    assert evaluations == [seeds] * 3
    with (folder / "run" / "curve.csv").open() as file:
        curve = list(csv.DictReader(file))
    assert [int(row["env_steps"]) for row in curve] == [80, 3040, 6000]
    with (folder / "run" / "logs" / "csv" / "metrics.csv").open() as file:
        episodes = [row["eval/episodes"] for row in csv.DictReader(file) if row["eval/episodes"]]
    assert [float(n) for n in episodes] == [3.0] * 3


def test_training_returns_are_means_over_all_processes(two: list[Held], folder: Path) -> None:
    with (folder / "run" / "logs" / "csv" / "metrics.csv").open() as file:
        logged = [float(row["train/return"]) for row in csv.DictReader(file) if row["train/return"]]
    # Both processes' episodes of 25 steps end together, after 25, 50 and 75 of their own. The last two updates, one
    # of them logged, come after the last step.
    episodes = torch.stack([held["rewards"].reshape(3, 25).sum(1) for held in two]).mean(0)
    assert logged == pytest.approx(episodes.tolist())


def test_a_round_takes_the_rows_of_all_processes(two: list[Held], folder: Path) -> None:
    # At 1200 environment steps each of the two environments has taken 15 agent steps, and no episode of 25 has ended;
    # at 3600 one of each has.
    reports = [json.loads((folder / "run" / "rounds" / f"round_{n:03d}.json").read_text()) for n in (1, 2)]
    assert [report["env_steps"] for report in reports] == [1200, 3600]
    assert [report["rows"] for report in reports] == [0, 50]
    assert reports[1]["kept"] == 50
    assert reports[1]["losses"]
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["labels_asked"] >= 20
    assert (folder / "run" / "rounds" / "round_002_adapter").is_dir()


def assert_same(a: Any, b: Any, at: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            assert_same(a[key], b[key], f"{at}/{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), at
    else:
        assert a == b, at


def test_one_process_is_told_to_stop_and_all_resume_exactly(
    two: list[Held], untrained_vlm: Path, tmp_path: Path
) -> None:
    run(tmp_path, untrained_vlm, 2, stop=("3200", "SIGTERM"), status=(143, 143))
    resumed = run(tmp_path, untrained_vlm, 2, "--ckpt_path", "last")
    for mine, theirs in zip(resumed, two, strict=True):
        mine.pop("played"), theirs.pop("played", None)
        assert_same(mine, theirs)


def test_a_signal_in_a_round_lets_all_finish_it(two: list[Held], untrained_vlm: Path, tmp_path: Path) -> None:
    run(tmp_path, untrained_vlm, 2, stop=("training", "SIGTERM"), status=(143, 143))
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["ExperienceData"]
    assert (saved["counters"]["env_steps"], saved["counters"]["rounds"]) == (3600, 2)
    resumed = run(tmp_path, untrained_vlm, 2, "--ckpt_path", "last")
    for mine, theirs in zip(resumed, two, strict=True):
        mine.pop("played"), theirs.pop("played", None)
        assert_same(mine, theirs)


def test_a_save_that_fails_in_one_process_ends_none(untrained_vlm: Path, tmp_path: Path) -> None:
    first, _ = run(tmp_path, untrained_vlm, 2, *WITHOUT_VLM, stop=("save", "3040"))
    assert first["counters"]["env_steps"] == 6000
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["ExperienceData"]
    assert saved["counters"]["env_steps"] == 6000


def test_a_stop_of_processes_that_lightning_started_is_a_stop(untrained_vlm: Path, tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    arguments = fit_arguments(tmp_path, untrained_vlm, *SETTINGS, "--trainer.devices", "2")
    # The second one has long ended, with the status of a run that was stopped, when the first one ends.
    stopped = subprocess.run(
        [sys.executable, "-m", "tests.process_of_a_run", str(tmp_path / "held"), "400", "SIGTERM", "--", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "LATE_SECONDS": "8"}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert stopped.returncode == 143, stopped.stderr
    assert "covr: stopped by SIGTERM; to go on, run the same command with --ckpt_path last." in stopped.stderr
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["ExperienceData"]
    assert saved["counters"]["env_steps"] == 480


def test_all_processes_go_on_from_the_first_ones_checkpoint(untrained_vlm: Path, tmp_path: Path) -> None:
    another = ("--data.max_env_steps", "2000", "--model.seed", "5")
    run(tmp_path, untrained_vlm, 2, "--name", "mine", "--data.max_env_steps", "1200", *WITHOUT_VLM)
    run(tmp_path, untrained_vlm, 2, "--name", "another", *another, *WITHOUT_VLM)
    other = str(tmp_path / "another" / "checkpoints" / "last.ckpt")
    first, second = run(
        tmp_path, untrained_vlm, 2, "--name", "mine", "--ckpt_path", "last", "--data.max_env_steps", "1600",
        *WITHOUT_VLM, second=("--ckpt_path", other),
    )  # fmt: skip
    assert first["counters"] == second["counters"]
    assert first["counters"]["env_steps"] == 1600
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name


def test_a_process_that_dies_ends_the_others(untrained_vlm: Path, tmp_path: Path) -> None:
    run(tmp_path, untrained_vlm, 2, *WITHOUT_VLM, stop=("3200", "SIGKILL"), status=(3, -9))
    held = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["ExperienceData"]
    assert held["counters"]["env_steps"] == 3040  # the evaluation before


@pytest.mark.parametrize(("before", "after", "envs"), [(2, 1, 1), (1, 2, 1), (1, 1, 3)])
def test_other_processes_or_environments_go_on(
    before: int, after: int, envs: int, untrained_vlm: Path, tmp_path: Path
) -> None:
    first = run(tmp_path, untrained_vlm, before, "--data.max_env_steps", "4000")
    asked = json.loads((tmp_path / "run" / "summary.json").read_text())["labels_asked"]
    more = ("--ckpt_path", "last", "--data.num_envs", str(envs))
    second = run(tmp_path, untrained_vlm, after, *more)
    assert 0 < asked < json.loads((tmp_path / "run" / "summary.json").read_text())["labels_asked"]
    steps = 40 * after * envs
    assert second[0]["counters"]["env_steps"] == 4000 + -(-2000 // steps) * steps
    assert second[0]["counters"]["grad_steps"] - first[0]["counters"]["grad_steps"] == -(-2000 // steps) * steps // 40

    def contents(held: list[Held], rows: list[int]) -> list[tuple[bytes, ...]]:
        columns = ("pixels", "next_pixels", "actions")
        return sorted(
            tuple(h[c][i].numpy().tobytes() for c in columns) for h, n in zip(held, rows, strict=True) for i in range(n)
        )

    # Every transition is there once, with its stacks, and what follows comes after it.
    dealt = [len(held["actions"]) - (second[0]["counters"]["env_steps"] - 4000) // 40 // after for held in second]
    assert sum(dealt) == 100
    assert max(dealt) - min(dealt) <= 25
    assert contents(second, dealt) == contents(first, [100 // before] * before)
    # An episode that was open then has been cut: each environment's last row before ends one.
    assert all(bool(held["done"][n - 1]) for held, n in zip(second, dealt, strict=True))
    # No episode comes a second time.
    begins = [held["pixels"][n].numpy().tobytes() for held, n in zip(second, dealt, strict=True)]
    assert not {held["pixels"][0].numpy().tobytes() for held in first} & set(begins)


def test_each_process_draws_by_its_own_priorities_and_its_share_of_sequences(
    untrained_vlm: Path, tmp_path: Path
) -> None:
    spr = {"class_path": "covr_lightning.agent.SPR", "init_args": {"sequences": 4, "jumps": 3}}
    more = ("--data.sampler", "covr_lightning.data.ProportionalSampler", "--model.objectives", json.dumps([spr]))
    first, second = run(tmp_path, untrained_vlm, 2, *more, "--data.max_env_steps", "3000")
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["ExperienceData"]
    p = [process["sampler"]["p"][:30] for process in state["processes"]]
    assert not torch.equal(*p)
