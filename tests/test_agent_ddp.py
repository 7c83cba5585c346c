"""Processes that a run starts end with it; none is left, and none waits for ever."""

from __future__ import annotations

import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from lightning.pytorch.strategies import DDPStrategy

from covr_lightning import agent_ddp
from covr_lightning.agent_ddp import AgentDDP, RunLauncher

ROOT = Path(__file__).parents[1]

#: A process whose second one fails while it waits for ever, and so does its third one.
WAITS = """
import subprocess, sys, time
from covr_lightning import agent_ddp
agent_ddp.LONGEST_END = 0.5
launcher = agent_ddp.RunLauncher(None, 3, 1)
launcher._check_can_spawn_children = lambda: None
children = [[sys.executable, "-c", "raise SystemExit(4)"], [sys.executable, "-c", "import time; time.sleep(300)"]]
start = lambda self: self.procs.extend(map(subprocess.Popen, children))
agent_ddp._SubprocessScriptLauncher._call_children_scripts = start
launcher._call_children_scripts()
print(launcher.children[1].pid, flush=True)
time.sleep(300)
"""


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])


def test_what_does_not_end_with_the_run_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_ddp, "LONGEST_END", 0.5)
    launcher = RunLauncher(None, 3, 1)
    launcher.children = [subprocess.Popen([sys.executable, "-c", ""]), sleeper()]
    launcher.end()
    assert [child.wait(10) for child in launcher.children] == [0, -signal.SIGKILL]
    RunLauncher(None, 1, 1).end()  # torchrun has started them


def test_a_run_that_waits_for_a_process_that_failed_is_killed() -> None:
    done = subprocess.run([sys.executable, "-c", WAITS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "covr: a process of this run ended with status 4; the others do not end, and are killed." in done.stderr
    assert not Path(f"/proc/{int(done.stdout)}").exists() or "Z" in Path(f"/proc/{int(done.stdout)}/stat").read_text()


def test_timeout_and_backend_of_the_yaml_are_kept() -> None:
    strategy = AgentDDP.like(DDPStrategy(timeout=timedelta(minutes=3), process_group_backend="gloo"))
    assert (strategy._timeout, strategy._process_group_backend) == (timedelta(minutes=3), "gloo")
