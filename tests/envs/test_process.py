"""Environments in processes of their own: they do what they do here, and are started again when they are lost."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from covr_lightning import cli
from covr_lightning.envs import DMControl
from covr_lightning.envs.base import PixelEnv
from covr_lightning.envs.batch import EnvBatch
from covr_lightning.envs.process import EnvProcess, EnvProcesses
from covr_lightning.errors import ConfigError, EnvironmentLost
from covr_lightning.stopping import stop_signals
from tests.envs.puppet import EPISODE_STEPS, EXIT, KILL, MEET, PLAIN, RAISE, STOP, Puppet

ROOT = Path(__file__).parents[2]


def step(env: PixelEnv, action: float) -> TensorDict:
    return env.step(TensorDict({"action": torch.full((env.env_spec.action_dim,), action)}))["next"]


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def puppet() -> Iterator[EnvProcess]:
    """One process for all faults: each test begins with a reset, whatever the one before has left.

    Fewer restarts are allowed than there are faults: an episode that ends well sets the count back.
    """
    settings = EnvProcesses(step_timeout_seconds=3, restarts=2, first_wait_seconds=0.2, longest_wait_seconds=0.3)
    env = EnvProcess(Puppet(servant=True), seed=11, number=3, settings=settings)
    yield env
    env.close()


FAULTS = {
    "exit": (EXIT, "its process ended with status 7"),
    "killed": (KILL, "its process ended by SIGKILL"),
    "hangs": (STOP, "no answer in 3 s"),
    "raises": (RAISE, "it raised ArithmeticError: the strings\nare tangled"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_cuts_the_episode_and_the_process_is_started_again(
    fault: str, puppet: EnvProcess, caplog: pytest.LogCaptureFixture
) -> None:
    action, reason = FAULTS[fault]
    first = puppet.reset()["pixels"]
    step(puppet, PLAIN)
    before = step(puppet, PLAIN)["pixels"]
    lost, restarts, pid = puppet.lost_episodes, puppet.restarts, puppet.pid
    servant = int(puppet.episode_metrics()["servant"])
    assert pid is not None
    assert lives(pid)
    assert lives(servant)

    with caplog.at_level(logging.WARNING, "covr_lightning"):
        cut = step(puppet, action)
    assert torch.equal(cut["pixels"], torch.cat([before[3:], before[3:]]))  # the last frame again
    assert (float(cut["reward"]), bool(cut["terminated"]), bool(cut["truncated"])) == (0.0, False, True)
    assert bool(cut["done"])
    assert bool(cut["lost"])
    assert puppet.lost_episodes == lost + 1
    assert puppet.episode_metrics()["steps"] == 2.0
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning == f"Environment 3 was lost: {reason}; it is started again after 0.2 s (restarts left: 2)."
    assert puppet.pid is None
    assert not lives(pid)
    assert eventually(lambda: not lives(servant))

    begun = time.monotonic()
    other = puppet.reset()["pixels"]
    assert time.monotonic() - begun > 0.1
    assert puppet.restarts == restarts + 1
    assert not torch.equal(other, first)
    ended = [step(puppet, PLAIN) for _ in range(EPISODE_STEPS)][-1]
    assert bool(ended["truncated"])
    assert not bool(ended["lost"])
    assert float(ended["reward"]) == EPISODE_STEPS
    assert puppet.lost_episodes == lost + 1


def test_a_process_found_dead_when_saving_leaves_no_episode_but_a_seed(puppet: EnvProcess) -> None:
    puppet.reset()
    before = step(puppet, PLAIN)["pixels"]
    lost = puppet.lost_episodes
    assert puppet.pid is not None
    os.kill(puppet.pid, signal.SIGKILL)
    state = puppet.episode_state()
    assert state["pixels"] is None
    assert state["next_episode"].keys() == {"restart_seed"}
    assert puppet.lost_episodes == lost + 1
    here = Puppet().make(0)
    assert not here.restore_episode(state)

    cut = step(puppet, PLAIN)
    assert bool(cut["truncated"])
    assert torch.equal(cut["pixels"][3:], before[3:])
    assert puppet.lost_episodes == lost + 1  # once
    # What a resumed run begins with is what this one begins with.
    begins = puppet.reset()["pixels"]
    assert torch.equal(here.reset()["pixels"], begins)
    # From now on everything is as usual: the new episode is saved and continued.
    step(puppet, PLAIN)
    state = puppet.episode_state()
    assert state["restarts"] == puppet.restarts > 0
    assert here.restore_episode(state)
    assert torch.equal(here.reset()["pixels"], state["pixels"])
    # And a resumed run does not repeat this one's seeds after a restart.
    assert puppet.restore_episode({**state, "restarts": 40})
    assert puppet.restarts == 40
    assert torch.equal(puppet.reset()["pixels"], state["pixels"])


def test_a_seed_of_a_restart_does_not_come_again_after_a_resume() -> None:
    settings = EnvProcesses(restarts=9, first_wait_seconds=0.01, longest_wait_seconds=0.01)
    one, resumed = (EnvProcess(Puppet(), seed=11, settings=settings) for _ in range(2))
    try:
        one.reset()
        step(one, KILL)
        saved = one.episode_state()
        begins = []
        for env in (one, resumed):
            if env is resumed:
                assert not env.restore_episode(saved)
            begins.append([env.reset()["pixels"]])
            for _ in range(2):
                step(env, KILL)
                begins[-1].append(env.reset()["pixels"])
    finally:
        one.close()
        resumed.close()
    assert all(torch.equal(a, b) for a, b in zip(*begins, strict=True))
    assert not torch.equal(begins[0][0], begins[0][1])


def test_a_signal_while_a_process_is_down_ends_the_step_without_using_up_restarts(
    puppet: EnvProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    puppet.reset()
    before = step(puppet, PLAIN)["pixels"]
    step(puppet, KILL)
    restarts = puppet.restarts
    with monkeypatch.context() as stopped:
        stopped.setattr(stop_signals, "requested", signal.SIGTERM)
        given = puppet.reset()["pixels"]
        state = puppet.episode_state()
    assert torch.equal(given, torch.cat([before[-3:]] * 2))
    assert (puppet.pid, puppet.restarts, state["pixels"]) == (None, restarts, None)
    assert state["next_episode"].keys() == {"restart_seed"}
    assert torch.equal(puppet.reset()["pixels"], Puppet().make(state["next_episode"]["restart_seed"]).reset()["pixels"])
    for _ in range(EPISODE_STEPS):
        step(puppet, PLAIN)


def test_a_seed_set_for_the_next_episode_outlives_the_process(puppet: EnvProcess) -> None:
    puppet.reset()
    step(puppet, PLAIN)
    puppet.simulator_seed(77)
    assert puppet.pid is not None
    os.kill(puppet.pid, signal.SIGKILL)
    assert torch.equal(puppet.reset()["pixels"], Puppet().make(77).reset()["pixels"])


def test_one_that_dies_at_every_start_is_given_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = EnvProcesses(restarts=1, first_wait_seconds=0.01)
    env = EnvProcess(Puppet(at_start="exit"), seed=0, number=5, settings=settings)
    with caplog.at_level(logging.WARNING, "covr_lightning"), pytest.raises(EnvironmentLost) as failure:
        env.reset()
    sentence = (
        "Environment 5 is lost (its process ended with status 9), and all 1 restarts in a row that "
        "data.collection.env_processes.restarts allows are used up"
    )
    assert str(failure.value) == sentence
    assert [record.getMessage().split("; ")[1] for record in caplog.records] == [
        "it is started again after 0.01 s (restarts left: 1).",
        "no restarts are left.",
    ]
    assert env.lost_episodes == 0  # none had begun
    with pytest.raises(EnvironmentLost):
        env.reset()

    def fails(arguments: list[str]) -> int:
        raise failure.value

    monkeypatch.setattr(cli, "_dispatch", fails)
    capsys.readouterr()  # the log's lines, where a command before has sent it there
    assert cli.main(["fit"]) == 3
    assert capsys.readouterr().err == f"covr: {sentence}.\n"


def test_a_setting_that_cannot_work_is_no_loss(caplog: pytest.LogCaptureFixture) -> None:
    env = EnvProcess(Puppet(at_start="config"), seed=0)
    with (
        caplog.at_level(logging.WARNING, "covr_lightning"),
        pytest.raises(ConfigError, match=r"^data\.env\.strings is 0; it must be at least 1\.$"),
    ):
        env.reset()
    assert not caplog.records
    assert env.restarts == 0
    env.close()


def test_the_waits_double_up_to_the_longest() -> None:
    settings = EnvProcesses(first_wait_seconds=1.5, longest_wait_seconds=10)
    assert [settings.wait_seconds(restart) for restart in (0, 1, 2, 3, 4, 100_000)] == [1.5, 3, 6, 10, 10, 10]


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("step_timeout_seconds", 0.0, "it must be above 0"),
        ("start_timeout_seconds", float("nan"), "it must be above 0"),
        ("restarts", -1, "it must be at least 0"),
        ("first_wait_seconds", -0.5, "it must be at least 0"),
        ("longest_wait_seconds", 0.5, "it must be at least data.collection.env_processes.first_wait_seconds = 1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(name: str, value: float, rule: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"data.collection.env_processes.{name} is {value}; {rule}.")):
        EnvProcesses(**{name: value})


def test_dm_control_does_the_same_there_as_here_and_each_continues_the_others_episode() -> None:
    factory = DMControl(size=40, action_repeat=50, rendering="fast")
    there, here = EnvProcess(factory, seed=4), factory.make(4)
    generator = torch.Generator().manual_seed(0)

    def same(steps: int) -> int:
        ends = 0
        for t in range(steps):
            action = torch.rand(1, generator=generator) * 2 - 1
            (mine, my_start), (theirs, start) = (
                env.step_and_maybe_reset(TensorDict({"action": action})) for env in pair
            )
            for key in ("pixels", "reward", "done", "terminated", "truncated"):
                assert torch.equal(mine["next", key], theirs["next", key]), (t, key)
            assert torch.equal(my_start["pixels"], start["pixels"])
            ends += bool(mine["next", "done"])
        return ends

    pair = (there, here)
    assert torch.equal(there.reset()["pixels"], here.reset()["pixels"])
    assert same(45) == 2  # of 20 steps each; into the third episode
    state = there.episode_state()
    later = factory.make(5)
    assert later.restore_episode(state)
    assert torch.equal(later.reset()["pixels"], state["pixels"])
    pair = (later, here)
    assert same(20) == 1
    state = later.episode_state()
    assert there.restore_episode(state)
    assert there.repeatable
    assert torch.equal(there.reset()["pixels"], state["pixels"])
    pair = (there, here)
    assert same(20) == 1
    there.close()
    assert there.lost_episodes == there.restarts == 0


def test_processes_step_at_the_same_time_and_let_the_trainer_decide_about_signals(tmp_path: Path) -> None:
    factory = Puppet(folder=str(tmp_path), party=2)
    envs = [EnvProcess(factory, seed=seed) for seed in (1, 2)]
    first = [env.pid for env in envs]

    def shout() -> None:
        for env in envs:
            assert env.pid is not None
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(env.pid, number)

    shout()  # they are still importing
    batch = EnvBatch(envs, first=7)
    start = batch.reset()
    assert start["env"].tolist() == [7, 8]
    shout()
    # Each step returns only when both environments are in it.
    after = batch.step(TensorDict({"action": torch.full((2, 1), MEET)}, [2]))["next"]
    assert after["reward"].flatten().tolist() == [MEET + 1, MEET + 1]
    shout()
    mask = torch.tensor([[True], [False]])
    partly = batch.reset(TensorDict({"_reset": mask, **after.exclude("reward")}, [2]))
    assert torch.equal(partly["pixels"][1], after["pixels"][1])
    assert not torch.equal(partly["pixels"][0, :3], start["pixels"][0, :3])
    states = batch.episode_states()
    assert [len(state["actions"]) for state in states] == [0, 1]
    # One dies, the other goes on; a reset of the one leaves the other alone.
    second = [batch.step(TensorDict({"action": torch.tensor([[KILL], [PLAIN]])}, [2]))["next"]]
    assert second[0]["truncated"].flatten().tolist() == [True, False]
    assert second[0]["reward"].flatten().tolist() == [0.0, 2.0]
    assert batch.lost_episodes == 1
    pids = [env.pid for env in envs]
    assert pids == [None, first[1]]
    batch.close()
    assert not any(lives(pid) for pid in first if pid is not None)


PARENT = """
import sys, torch
from covr_lightning.envs.process import EnvProcess
from tests.envs.puppet import Puppet, SLEEP
if __name__ == "__main__":
    killed = sys.argv[1] == "killed"
    envs = [EnvProcess(Puppet(servant=True), seed) for seed in range(1 + killed)]
    for env in envs:
        env.reset()
    servants = [int(env.episode_metrics()["servant"]) for env in envs]
    if killed:  # one waits to be asked, the other hangs
        envs[1].send_action(torch.tensor([SLEEP]))
    print(*[env.pid for env in envs], *servants, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("way", ["killed", "exits"])
def test_nothing_outlives_the_trainer(way: str, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    parent = subprocess.Popen(
        [sys.executable, str(script), way], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == (4 if way == "killed" else 2)
    assert all(lives(pid) for pid in pids)
    assert parent.stdin is not None
    parent.kill() if way == "killed" else parent.stdin.close()  # at whose end it exits, without closing anything
    assert parent.wait(20) == (-signal.SIGKILL if way == "killed" else 0)
    assert eventually(lambda: not any(lives(pid) for pid in pids))
