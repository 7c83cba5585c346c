"""Supervision, with a stand-in for the process: when it is started again, and when no more."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector

from covr_lightning.envs import process
from covr_lightning.envs.batch import EnvBatch
from covr_lightning.envs.child import Answer, ChildLost, _answer_requests
from covr_lightning.envs.process import EnvProcess, EnvProcesses
from covr_lightning.errors import ConfigError, EnvironmentLost
from covr_lightning.evaluation import play_episode
from tests.envs.puppet import EPISODE_STEPS, EXIT, PLAIN, RAISE, SIZE, STOP, Puppet


class Stage:
    """Plays the child processes.

    Attributes:
        seeds: Of the processes started so far.
        dead_starts: How many of the next starts fail.
    """

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.dead_starts = 0

    def child(self, factory: bytes, seed: int, *rest: Any) -> StandIn:
        self.seeds.append(seed)
        if self.dead_starts:
            self.dead_starts -= 1
            raise OSError("no more processes")
        return StandIn(seed)


class StandIn:
    """Has the environment here, and loses it where a process would."""

    def __init__(self, seed: int) -> None:
        self.env = Puppet().make(seed)
        self.awaited: str | None = None

    def send(self, name: str, *arguments: Any, seconds: float) -> None:
        self.awaited, self.arguments = name, arguments

    def receive(self) -> Answer:
        assert self.awaited is not None
        name, self.awaited = self.awaited, None
        action = float(self.arguments[0][0]) if name == "simulator_step" else PLAIN
        if action == STOP:
            self.arguments = (np.zeros(1),)
        if action == EXIT:
            raise ChildLost("it fell over")
        if action == RAISE:
            raise ChildLost("data.env.map is gone", config_error=True)
        result, frame = getattr(self.env, name)(*self.arguments), None
        if name == "draw_episode":
            result, frame = result
        elif name == "simulator_step":
            frame, *result = result
        lost = action == STOP  # the simulator in it was, which the environment there coped with
        return Answer([0.0, False, True] if lost else result, frame, True, int(lost), self.env.episode_metrics())

    def kill(self) -> None: ...

    end = kill


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage()
    monkeypatch.setattr(process, "Child", stage.child)
    return stage


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits, which do not take any time."""
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(process.stop_signals, "sleep", sleep)
    monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
    return slept


def step(env: EnvProcess, action: float) -> TensorDict:
    return env.step(TensorDict({"action": torch.tensor([action])}))["next"]


def test_waits_grow_until_an_episode_ends_well(stage: Stage, slept: list[float]) -> None:
    env = EnvProcess(Puppet(), 1, settings=EnvProcesses(restarts=4, first_wait_seconds=2, longest_wait_seconds=7))
    env.reset()
    for _ in range(3):
        step(env, PLAIN)
        step(env, EXIT)
        env.reset()
    assert slept == [2, 4, 7]
    assert env.lost_episodes == 3
    for _ in range(EPISODE_STEPS):
        step(env, PLAIN)
    env.reset()
    for _ in range(4):
        step(env, EXIT)
        env.reset()
    assert slept == [2, 4, 7, 2, 4, 7, 7]
    assert (env.lost_episodes, env.restarts) == (7, 7)
    assert stage.seeds[0] == 1
    assert len(set(stage.seeds)) == 8  # no episode comes again
    step(env, EXIT)
    with pytest.raises(EnvironmentLost, match=r"Environment 0 is lost \(it fell over\), and all 4 restarts"):
        env.reset()


def test_starts_that_fail_count_too(stage: Stage, slept: list[float], caplog: pytest.LogCaptureFixture) -> None:
    env = EnvProcess(Puppet(), 1, settings=EnvProcesses(restarts=3))
    env.reset()
    step(env, EXIT)
    stage.dead_starts = 2
    with caplog.at_level(logging.WARNING, "covr_lightning"):
        env.reset()
    assert slept == [1, 2, 4]
    assert env.lost_episodes == 1
    assert caplog.messages[1:] == [
        "Environment 0 was lost: it cannot be started: no more processes; it is started again after 2 s "
        "(restarts left: 2).",
        "Environment 0 was lost: it cannot be started: no more processes; it is started again after 4 s "
        "(restarts left: 1).",
    ]


def test_settings_are_to_blame_only_until_the_first_episode_has_begun(stage: Stage, slept: list[float]) -> None:
    env = EnvProcess(Puppet(), 1)
    with pytest.raises(ConfigError, match="map is gone"):
        step(env, RAISE)
    env = EnvProcess(Puppet(), 1)
    env.reset()
    assert bool(step(env, RAISE)["truncated"])
    env.reset()
    assert (env.lost_episodes, env.restarts) == (1, 1)


def test_a_restored_episode_whose_process_dies_is_cut_at_its_next_step(stage: Stage, slept: list[float]) -> None:
    here, env = Puppet().make(5), EnvProcess(Puppet(), 1)
    here.reset()
    here.step(TensorDict({"action": torch.tensor([PLAIN])}))
    state = here.episode_state()
    assert env.restore_episode(state)
    assert torch.equal(env.reset()["pixels"], state["pixels"])
    assert bool(step(env, EXIT)["truncated"])
    assert not torch.equal(env.reset()["pixels"], state["pixels"])


def test_one_lost_while_an_episode_is_played_again_begins_the_next_one(stage: Stage, slept: list[float]) -> None:
    here, env = Puppet().make(5), EnvProcess(Puppet(), 1)
    here.reset()
    here.step(TensorDict({"action": torch.tensor([PLAIN])}))
    state = here.episode_state()
    state["actions"][0] = EXIT
    assert not env.restore_episode(state)
    assert torch.equal(env.reset()["pixels"], here.reset()["pixels"])


def test_an_episode_whose_simulator_was_lost_there_counts_and_has_not_ended_well(
    stage: Stage, slept: list[float]
) -> None:
    env = EnvProcess(Puppet(), 1, settings=EnvProcesses(restarts=2))
    env.reset()
    step(env, EXIT)
    env.reset()
    assert bool(step(env, STOP)["truncated"])
    assert env.lost_episodes == 2
    env.reset()
    step(env, EXIT)
    env.reset()
    assert slept == [1, 2]  # the second in a row


def test_a_collector_goes_on_past_a_loss(stage: Stage, slept: list[float]) -> None:
    batch = EnvBatch([EnvProcess(Puppet(), seed, number=seed) for seed in range(2)])
    asked = 0

    def policy(pixels: torch.Tensor) -> torch.Tensor:
        nonlocal asked
        asked += 1
        return torch.tensor([[EXIT if asked == 4 else PLAIN], [PLAIN]])  # the first asking is the collector's own

    collector = Collector(
        batch, TensorDictModule(policy, in_keys=["pixels"], out_keys=["action"]), frames_per_batch=2, total_frames=-1,
        trust_policy=True, track_traj_ids=False, auto_register_policy_transforms=False,
    )  # fmt: skip
    stream = iter(collector)
    rows = [next(stream).reshape(-1).clone() for _ in range(2 + EPISODE_STEPS)]
    truncated = torch.stack([row["next", "truncated"].flatten() for row in rows])
    assert truncated[:, 0].nonzero().flatten().tolist() == [2]  # cut; its next episode has not come to its end yet
    assert truncated[:, 1].nonzero().flatten().tolist() == [EPISODE_STEPS - 1]
    assert [float(row["next", "reward"][0]) for row in rows] == [1, 2, 0, 1, 2, 3]
    assert torch.equal(rows[2]["next", "pixels"][0, 3:], rows[1]["next", "pixels"][0, 3:])
    assert not torch.equal(rows[3]["pixels"][0], rows[0]["pixels"][0])
    assert (batch.lost_episodes, slept) == (1, [1])
    collector.shutdown()


def test_an_evaluation_episode_that_is_lost_is_played_again_from_its_seed(stage: Stage, slept: list[float]) -> None:
    seen: list[torch.Tensor] = []

    def policy(pixels: torch.Tensor, deterministic: bool, previous_action: object) -> torch.Tensor:
        seen.append(pixels[0])
        return torch.tensor([[EXIT if len(seen) == 2 else PLAIN]])

    env = EnvProcess(Puppet(), 1)
    result = play_episode(policy, env, seed=9)
    assert result.agent_steps == EPISODE_STEPS
    assert result.episode_return == sum(range(1, EPISODE_STEPS + 1))
    assert result.metrics["steps"] == EPISODE_STEPS
    assert len(seen) == 2 + EPISODE_STEPS
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[0], Puppet().make(9).reset()["pixels"])


def test_a_child_says_by_how_much_its_own_losses_grew_and_ends_with_the_pipe() -> None:
    here, there = multiprocessing.Pipe()
    env, slot = Puppet().make(0), np.zeros((3, SIZE, SIZE), np.uint8)
    thread = threading.Thread(target=_answer_requests, args=(there, slot, env))
    thread.start()

    def answer() -> tuple[int, Answer]:
        assert here.poll(20)
        return pickle.loads(here.recv_bytes())

    assert answer()[0] == 0  # it is built
    for number, (lost, grown) in enumerate([(0, 0), (2, 2), (2, 0), (3, 1)], start=1):
        env.lost_episodes = lost
        here.send_bytes(pickle.dumps((number, "random_state", ())))
        told, said = answer()
        assert (told, said.lost_episodes) == (number, grown)
    here.close()
    thread.join(20)
    assert not thread.is_alive()
