"""What a run goes on with, and what others read of it: its configuration, the documentation's lines, rights."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from filelock import FileLock

from covr_lightning.cli import main
from covr_lightning.data import AsyncWorkers, OneCollector, SyncWorkers
from covr_lightning.data.collection import Collection
from covr_lightning.envs import EnvFactory
from covr_lightning.random_state import derived_seed
from covr_lightning.saving.files import in_place_of
from tests.short_runs import fit

DOCUMENT = Path(__file__).parents[2] / "docs" / "saving.md"
POINT = [
    "fit", "--config", "point_reach.yaml", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu",
    "--data.max_env_steps", "300", "--data.warmup_agent_steps", "80", "--data.eval_episodes", "1",
    "--data.eval_every_env_steps", "150", "--model.hidden", "16", "--video", "true", "--name", "mine",
]  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a finished run in it."""
    monkeypatch.chdir(tmp_path)
    assert main(POINT) == 0
    return tmp_path / "runs"


def settings(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def test_a_finished_run_and_one_that_goes_on_otherwise(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs / "mine"
    last = run / "checkpoints" / "last.ckpt"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    shorter = ["--ckpt_path", "last", "--data.max_env_steps", "200"]
    assert main([*POINT, *shorter]) == 0
    sentence = f"covr: {run.relative_to(runs.parent)} is finished: it has 300 of 200 environment steps"
    assert sentence in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before

    summary = run / "summary.json"
    of_point = summary.read_text()
    summary.write_text(of_point.replace("point-reach", "cartpole-swingup"))
    assert main([*POINT, *shorter]) == 2  # it looks further than whether that run is over
    assert "data.max_env_steps is 200, but the checkpoint's run has 300 already" in capsys.readouterr().err
    summary.write_text(of_point)

    assert main([*POINT, "--ckpt_path", "last", "--data.max_env_steps", "400", "--model.gamma", "0.5"]) == 0
    printed = capsys.readouterr()
    (told,) = (line for line in printed.err.splitlines() if "goes on with another configuration" in line)
    assert "data.max_env_steps is 300 there, 400 here" in told
    assert "model.gamma is 0.8 there, 0.5 here" in told
    old, new = settings(run / "config_until_300.yaml"), settings(run / "config.yaml")
    assert [one["data"]["init_args"]["max_env_steps"] for one in (old, new)] == [300, 400]
    assert [one["model"]["init_args"]["gamma"] for one in (old, new)][1] == 0.5
    assert torch.load(last, weights_only=True)["ExperienceData"]["counters"]["env_steps"] == 400

    assert main([*POINT, "--ckpt_path", str(run)]) == 2
    assert f"there is no such file (did you mean {last}?)" in capsys.readouterr().err

    # A test's video does not take the place of the run's.
    videos = {path.name: path.read_bytes() for path in (run / "videos").iterdir()}
    assert set(videos) >= {"env150.mp4", "env300.mp4"}
    assert main(["test", *POINT[1:], "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]) == 0
    assert {path.name for path in (run / "videos").iterdir()} == {*videos, "test_env400.mp4"}
    assert all((run / "videos" / name).read_bytes() == content for name, content in videos.items())


def test_a_run_of_asynchronous_workers_goes_on_with_other_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    seeds: list[int] = []

    def tells(kind: type[Collection]) -> Callable[..., None]:
        open_ = kind.open

        def told(collection: Collection, factory: EnvFactory, policy: Any, numbers: range, seed: int) -> None:
            seeds.append(seed)
            open_(collection, factory, policy, numbers, seed)

        return told

    for kind in (AsyncWorkers, OneCollector, SyncWorkers):
        monkeypatch.setattr(kind, "open", tells(kind))
    two = [*POINT, "--data.num_envs", "2"]
    assert main([*two, "--data.collection", "AsyncWorkers", "--data.max_env_steps", "150"]) == 0
    capsys.readouterr()
    for then in ("OneCollector", "SyncWorkers"):
        shutil.copytree("runs", then)
        assert main([*two, "--runs_dir", then, "--ckpt_path", "last", "--data.collection", then]) == 0
        said = capsys.readouterr().err
        assert "A checkpoint of asynchronous workers cannot continue the episodes it was stopped in: 2 cut." in said
    assert seeds == [0, derived_seed(0, 150), derived_seed(0, 150)]


def test_a_configuration_that_is_refused_is_not_written(
    untrained_vlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, untrained_vlm, "--data.max_env_steps", "3000") == 0
    run = tmp_path / "run"
    before = {path.name: path.read_bytes() for path in run.glob("config*")}
    capsys.readouterr()
    for wrong in (["--vlm.lora.rank", "7"], ["--trainer.callbacks.score", "covr_lightning.finetune.QScore"]):
        assert fit(tmp_path, untrained_vlm, "--ckpt_path", "last", *wrong) == 2
        assert "goes on with another configuration" not in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in run.glob("config*")} == before


def test_a_folder_that_cannot_be_written(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(lock: FileLock, **settings: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    capsys.readouterr()
    assert main([*POINT, "--ckpt_path", "last", "--data.max_env_steps", "400"]) == 2
    said = capsys.readouterr().err
    assert "run.lock cannot be written (Read-only file system; YAML key runs_dir)" in said
    assert "Traceback" not in said


def test_the_documentations_lines_read_a_run_without_this_package(runs: Path) -> None:
    (code,) = re.findall(r"```python\n(checkpoint = .*?)```", DOCUMENT.read_text(), re.DOTALL)
    names: dict[str, Any] = {"torch": torch, "safetensors": safetensors}
    exec(code, names)
    assert len(names["tensors"]["rows/action"]) > 0


def test_others_may_read_what_safetensors_writes(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with in_place_of(tmp_path / "adapter") as folder:
            folder.mkdir()
            safetensors.torch.save_file({"a": torch.zeros(1)}, folder / "a.safetensors")
        os.umask(0o077)
        with in_place_of(tmp_path / "b.safetensors") as file:
            safetensors.torch.save_file({"b": torch.zeros(1)}, file)
    finally:
        os.umask(before)
    modes = [
        path.stat().st_mode & 0o777 for path in (tmp_path / "adapter" / "a.safetensors", tmp_path / "b.safetensors")
    ]
    assert modes == [0o644, 0o600]
