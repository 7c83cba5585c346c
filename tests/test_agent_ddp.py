"""Processes that a run starts end with it; none is left, and none waits for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from lightning.pytorch.strategies import DDPStrategy

from covr_lightning import agent_ddp
from covr_lightning.agent_ddp import AgentDDP, RunLauncher
from covr_lightning.cli import main
from tests.short_runs import fit_arguments

ROOT = Path(__file__).parents[1]

#: A process whose second one fails while it waits for ever, and so does its third one.
WAITS = """
import subprocess, sys, time
from covr_lightning import agent_ddp
agent_ddp.LONGEST_END = 0.5
launcher = agent_ddp.RunLauncher(None, 3, 1)
children = [[sys.executable, "-c", "raise SystemExit(4)"], [sys.executable, "-c", "import time; time.sleep(300)"]]
start = lambda self: self.procs.extend(map(subprocess.Popen, children))
agent_ddp._SubprocessScriptLauncher._call_children_scripts = start
launcher._call_children_scripts()
print(launcher.children[1].pid, flush=True)
time.sleep(300)
"""

#: A process of a run that was stopped, with children that have ended so, which has yet much to do.
GOES_ON = """
import subprocess, sys, time
from covr_lightning import agent_ddp
agent_ddp.LONGEST_END = 1.0
launcher = agent_ddp.RunLauncher(None, 2, 1)
child = [sys.executable, "-c", "raise SystemExit(143)"]
start = lambda self: self.procs.append(subprocess.Popen(child))
agent_ddp._SubprocessScriptLauncher._call_children_scripts = start
launcher._call_children_scripts()
launcher.end()
time.sleep(4)
print("still there")
"""

#: A process that starts another one of its run, which waits for it for ever, and dies.
DIES = """
import os, signal, subprocess, sys
from covr_lightning import agent_ddp
launcher = agent_ddp.RunLauncher(None, 2, 1)
child = "from covr_lightning import agent_ddp; agent_ddp.LONGEST_END = 0.5; agent_ddp.RunLauncher(None, 2, 1); "
child += "import os, time; print(agent_ddp._STARTED_BY in os.environ, flush=True); time.sleep(300)"
start = lambda self: self.procs.append(subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE))
agent_ddp._SubprocessScriptLauncher._call_children_scripts = start
launcher._call_children_scripts()
print(launcher.children[0].stdout.readline().decode().strip(), launcher.children[0].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def is_gone(pid: int) -> bool:
    """Whether a process is no more, or is dead and waits to be taken in; waits a moment if not."""
    try:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True
    except OSError:
        return True
    time.sleep(0.1)
    return False


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])


def test_what_does_not_end_with_the_run_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_ddp, "LONGEST_END", 0.5)
    launcher = RunLauncher(None, 3, 1)
    launcher.children = [subprocess.Popen([sys.executable, "-c", ""]), sleeper()]
    launcher.children[0].wait()
    launcher.end()
    assert [child.wait(10) for child in launcher.children] == [0, -signal.SIGKILL]
    RunLauncher(None, 1, 1).end()  # torchrun has started them


def test_a_run_that_waits_for_a_process_that_failed_is_killed() -> None:
    done = subprocess.run([sys.executable, "-c", WAITS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "covr: a process of this run ended with status 4; the others do not end, and are killed." in done.stderr
    assert any(is_gone(int(done.stdout)) for _ in range(100))


def test_a_process_whose_run_is_over_is_not_killed() -> None:
    done = subprocess.run([sys.executable, "-c", GOES_ON], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "still there\n"), done.stderr


def test_one_that_was_started_before_another_could_not_be_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(launcher: RunLauncher) -> None:
        launcher.procs.append(sleeper())
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(agent_ddp._SubprocessScriptLauncher, "_call_children_scripts", half)
    monkeypatch.setattr(agent_ddp, "LONGEST_END", 0.5)
    launcher = RunLauncher(None, 3, 1)
    with pytest.raises(OSError, match="allocate"):
        launcher._call_children_scripts()
    launcher.end()
    assert launcher.children[0].wait(10) == -signal.SIGKILL


def test_a_process_ends_when_the_one_that_started_it_is_gone() -> None:
    dies = subprocess.run([sys.executable, "-c", DIES], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=100)
    assert dies.returncode == -signal.SIGKILL
    inherited, child = dies.stdout.split()
    assert inherited == "False"  # what it starts itself, such as workers, is not told
    assert any(is_gone(int(child)) for _ in range(100))


def test_a_signal_while_processes_meet_ends_the_run_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def launch(launcher: RunLauncher, *arguments: object, **more: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(RunLauncher, "launch", launch)
    before = signal.getsignal(signal.SIGTERM)
    start = time.monotonic()
    assert main([*fit_arguments(tmp_path, tmp_path), "--trainer.devices", "2"]) == 128 + signal.SIGTERM
    assert time.monotonic() - start < 50
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_fit_ends_its_processes_however_it_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ended = []
    monkeypatch.setattr(RunLauncher, "end", lambda launcher: ended.append(launcher))
    monkeypatch.setattr(RunLauncher, "launch", lambda launcher, *arguments, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([*fit_arguments(tmp_path, tmp_path), "--trainer.devices", "2"])
    assert len(ended) == 1


def test_timeout_and_backend_of_the_yaml_are_kept() -> None:
    strategy = AgentDDP.like(DDPStrategy(timeout=timedelta(minutes=3), process_group_backend="gloo"))
    assert (strategy._timeout, strategy._process_group_backend) == (timedelta(minutes=3), "gloo")


def test_ddp_of_one_process_is_a_run_as_any_other(untrained_vlm: Path, tmp_path: Path) -> None:
    curves = []
    for strategy in ("auto", "ddp"):
        of_one = ["--trainer.devices", "1", "--trainer.strategy", strategy, "--data.max_env_steps", "3000"]
        arguments = fit_arguments(tmp_path / strategy, untrained_vlm, *of_one)
        command = [sys.executable, "-m", "covr_lightning.cli", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        (curve,) = (tmp_path / strategy).rglob("curve.csv")
        curves.append(curve.read_text())
    assert curves[0] == curves[1]
    assert len(curves[0].splitlines()) == 3
