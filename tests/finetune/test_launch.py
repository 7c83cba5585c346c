"""A separate launch: rows out, an adapter back, and what happens when it dies."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensordict import TensorDict

from covr_lightning.envs import DMControl
from covr_lightning.errors import ConfigError
from covr_lightning.finetune import RALW, KeepAll, SeparateLaunch
from covr_lightning.finetune.launch import _environment
from covr_lightning.finetune.module import FineTuneSettings
from covr_lightning.finetune.round import RoundReport, fine_tune_round
from covr_lightning.finetune.saved_rows import load_rows
from covr_lightning.stopping import RunStopped
from covr_lightning.vlm.vlm import VLM, LoRA
from tests.short_runs import fit

SPEC = DMControl("reacher-easy", size=40).spec
SETTINGS = FineTuneSettings(epochs=4, batch_size=4, accumulate=1, lr=3e-3, held_out=0.2, gradient_checkpointing=False)
TWO = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]


def a_round(vlm: VLM, launch: SeparateLaunch, folder: Path, number: int = 1) -> RoundReport:
    g = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (20, 3, 40, 40), dtype=torch.uint8, generator=g)
    rows = TensorDict({"frame": frames, "action": torch.tensor([0.5, -0.5]).expand(20, 2)}, [20])
    return fine_tune_round(
        RoundReport(number, 1000, 20), vlm, rows, torch.arange(20.0), 0.0, KeepAll(), RALW(), SETTINGS, {},
        folder / f"round_{number:03d}_adapter", launch,
    )  # fmt: skip


def vlm_of(folder: Path) -> VLM:
    vlm = VLM(str(folder), LoRA(rank=4, alpha=8, dropout=0.0))
    vlm.load(SPEC)
    return vlm


def adapter(vlm: VLM, folder: Path) -> dict[str, torch.Tensor]:
    vlm.save_adapter(folder)
    return load_file(folder / "adapter_model.safetensors")


def test_two_processes_train_and_hand_the_adapter_over(
    untrained_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WORLD_SIZE", "7")  # of a launcher around this run: none of the child's business
    vlm = vlm_of(untrained_vlm)
    report = a_round(vlm, SeparateLaunch(arguments=TWO), tmp_path)
    assert not report.failures, (tmp_path / "round_001_job" / "output.log").read_text()
    assert len(report.losses) == 4 * 16 / 4
    assert sum(report.losses[-4:]) < sum(report.losses[:4])  # the last epoch's and the first one's
    assert (report.held_out, vlm.round, [p.name for p in tmp_path.iterdir()]) == (4, 1, ["round_001_adapter"])
    given = load_file(tmp_path / "round_001_adapter" / "adapter_model.safetensors")
    in_force = adapter(vlm, tmp_path / "in_force")
    assert all(torch.equal(in_force[name], given[name]) for name in given)
    assert any(value.abs().max() > 0 for name, value in given.items() if "lora_B" in name)

    # The child of the second round dies: nothing of the first one changes.
    said = vlm.answer(torch.zeros(2, 3, 40, 40, dtype=torch.uint8))
    dies = SeparateLaunch(command=[sys.executable, "-c", "import os; print('so far'); os.kill(os.getpid(), 9)"])
    report = a_round(vlm, dies, tmp_path, number=2)
    assert (report.losses, vlm.round) == ([], 1)
    assert report.note.startswith(
        "the adapter stays as it was: the separate launch failed: it ended with signal SIGKILL"
    )
    job = tmp_path / "round_002_job"
    assert report.note.endswith(f"see {job / 'output.log'}")
    after = adapter(vlm, tmp_path / "in_force")
    assert all(torch.equal(after[name], given[name]) for name in given)
    assert vlm.answer(torch.zeros(2, 3, 40, 40, dtype=torch.uint8)) == said
    # What it would have trained: this run's adapter, settings and weights, all kept rows but those held out.
    config = yaml.safe_load((job / "job.yaml").read_text())
    before = load_file(Path(config["vlm"]["adapter"]) / "adapter_model.safetensors")
    assert all(torch.equal(before[name], given[name]) for name in given)
    assert config["model"]["init_args"]["settings"] == {**SETTINGS.__dict__, "held_out": 0.0}
    rows = load_rows(job / "rows.safetensors")
    assert (len(rows.rows), rows.round, rows.spec) == (16, 2, SPEC)
    assert int((rows.scores > 0).sum()) == report.trained


FAILURES = {
    "no such program": (["/no/such/program"], "/no/such/program cannot be started (No such file or directory)"),
    "an error": ([sys.executable, "-c", "raise ValueError('bad luck')"], "status 1 (ValueError: bad luck)"),
    "nothing written": ([sys.executable, "-c", ""], "it ended well, but its adapter cannot be used"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_sentence(case: str, untrained_vlm: Path, tmp_path: Path) -> None:
    command, says = FAILURES[case]
    vlm = vlm_of(untrained_vlm)
    report = a_round(vlm, SeparateLaunch(command=command), tmp_path)
    assert says in report.note
    assert "\n" not in report.note
    assert (report.losses, vlm.round, vlm.has_adapter) == ([], 0, False)


def test_a_launch_that_hangs_is_stopped_with_all_it_started(untrained_vlm: Path, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    launch = SeparateLaunch(command=[sys.executable, "-c", code], timeout_minutes=0.05)
    start = time.monotonic()
    report = a_round(vlm_of(untrained_vlm), launch, tmp_path)
    assert "it was stopped after 0.05 minutes" in report.note
    assert time.monotonic() - start < 60
    for _ in range(50):
        if not is_alive(pid.read_text()):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the grandchild still runs")


def test_a_run_that_is_stopped_stops_its_launch(untrained_vlm: Path, tmp_path: Path) -> None:
    def stop(signum: int, frame: object) -> None:
        raise RunStopped(signum)

    pid = tmp_path / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    vlm = vlm_of(untrained_vlm)
    before = signal.signal(signal.SIGUSR1, stop)

    def when_it_runs() -> None:
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    watcher = threading.Thread(target=when_it_runs)
    watcher.start()
    try:
        with pytest.raises(RunStopped):
            a_round(vlm, SeparateLaunch(command=[sys.executable, "-c", code]), tmp_path)
    finally:
        signal.signal(signal.SIGUSR1, before)
    watcher.join()
    assert not Path(f"/proc/{pid.read_text()}").exists()


def test_a_run_that_is_killed_takes_its_launch_with_it(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    command = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}.'); time.sleep(600)"
    )
    run = (
        "import pathlib, sys; from covr_lightning.finetune.launch import _run\n"
        f"_run([sys.executable, '-c', {command!r}], pathlib.Path({str(tmp_path / 'output.log')!r}), 600)"
    )
    process = subprocess.Popen([sys.executable, "-c", run])
    while not (pids.exists() and pids.read_text().endswith(".")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    command_and_grandchild = pids.read_text().rstrip(".").split()
    for _ in range(300):
        if not any(is_alive(pid) for pid in command_and_grandchild):
            break
        time.sleep(0.1)
    else:
        pytest.fail("what a killed run has launched still runs")


def is_alive(pid: str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"


def test_the_environment_of_a_launcher_does_not_go_over(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert set(os.environ) - set(_environment()) >= {"RANK", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"}
    assert "SLURM_NTASKS" not in _environment()
    assert _environment()["CUDA_VISIBLE_DEVICES"] == "3"


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"launch\.command is an empty list"):
        SeparateLaunch(command=[])
    with pytest.raises(ConfigError, match=r"launch\.timeout_minutes is 0"):
        SeparateLaunch(timeout_minutes=0)
    with pytest.raises(ConfigError, match=r"launch\.timeout_minutes is nan"):
        SeparateLaunch(timeout_minutes=math.nan)


def test_a_run_goes_on_when_its_launches_fail(untrained_vlm: Path, tmp_path: Path) -> None:
    launch = '{"command": ["false"], "timeout_minutes": 5}'
    more = ["--trainer.callbacks.launch", launch, "--trainer.callbacks.save_rows", "true"]
    assert fit(tmp_path, untrained_vlm, *more) == 0
    rounds = tmp_path / "run" / "rounds"
    reports = [json.loads(path.read_text()) for path in sorted(rounds.glob("round_???.json"))]
    assert len(reports) == 2
    assert all("it ended with status 1 (it said nothing)" in report["note"] for report in reports)
    saved = load_rows(rounds / "round_002_rows.safetensors")
    assert (saved.round, len(saved.rows), saved.spec.task) == (2, reports[1]["rows"], "cartpole-swingup")
    assert saved.entropy == reports[1]["entropy"]
