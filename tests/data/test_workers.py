"""Environments in worker processes: their order, their weights, their end, and what goes on after a stop."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase

from covr_lightning.agent import SACModule
from covr_lightning.counters import Counters
from covr_lightning.data import AsyncWorkers, ExplorationPolicy, RayWorkers, SyncWorkers
from covr_lightning.data.workers import Workers, _noise_once
from covr_lightning.envs.child import MARK
from covr_lightning.errors import ConfigError, EnvironmentLost
from tests.agent.small_agents import agent
from tests.envs.puppet import Puppet, PuppetEnv

NUMBERS = range(4, 8)  # as in a run's second process
WARMUP = 16

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed")


def policy_of(module: SACModule) -> ExplorationPolicy:
    return ExplorationPolicy(module, 1, Counters(), WARMUP, envs=len(NUMBERS))


def small_agent() -> SACModule:
    return agent(Puppet().spec, strides=(2,))


@pytest.fixture
def opened() -> Iterator[Callable[..., tuple[Iterator[TensorDictBase], ExplorationPolicy]]]:
    """Starts a collection with a new small agent; whatever it has started is gone at the end."""
    collections: list[Workers] = []

    def opened(
        collection: Workers, agent_steps: int = 0, factory: Puppet | None = None
    ) -> tuple[Iterator[TensorDictBase], ExplorationPolicy]:
        collections.append(collection)
        policy = policy_of(small_agent())
        policy.counters.agent_steps = agent_steps
        collection.open(factory or Puppet(), policy, NUMBERS, 3)
        return collection.batches(), policy

    yield opened
    for collection in collections:
        collection.close()
    assert not children()


def children() -> list[int]:
    """Workers that this process has started, and what they have."""
    mine = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"{MARK}=/".encode() in (path / "environ").read_bytes()
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if ours and parent == os.getpid():
            mine.append(int(path.name))
    return mine


def take(items: Iterator[TensorDictBase], policy: ExplorationPolicy, n: int) -> TensorDictBase:
    """The rows of the next n items; the clock goes on as the data module's does."""
    taken = []
    for _ in range(n):
        taken.append(next(items).clone())
        policy.counters.agent_steps += len(taken[-1])
        policy.counters.env_steps += len(taken[-1])
    return torch.cat(taken)


def always_one(module: SACModule) -> None:
    """Give it weights with which every action is close to 1."""
    with torch.no_grad():
        for weights in module.actor.parameters():
            weights.zero_()
        mu_and_log_sigma = list(module.actor.parameters())[-1]
        mu_and_log_sigma.copy_(torch.tensor([10.0, -10.0]))


def assert_in_order(rows: TensorDictBase) -> None:
    """Every environment's rows continue one another, from the first frame on, without a gap."""
    assert set(rows["env"].tolist()) == set(NUMBERS)
    for env in NUMBERS:
        own = rows[rows["env"] == env]
        steps = own["pixels"][:, 4, 1, 0].tolist()  # green of the newest frame; an episode has four steps
        assert steps == [t % 4 for t in range(len(steps))]
        assert own["next", "done"].flatten().tolist() == [t % 4 == 3 for t in range(len(steps))]
        for before, after in zip(own[:-1].unbind(0), own[1:].unbind(0), strict=True):
            if not before["next", "done"]:
                assert torch.equal(before["next", "pixels"], after["pixels"])
                assert torch.equal(before["action"], after["previous_action"])
    episodes = {tuple(row["pixels"][3, 0, :4].tolist()) for row in rows.unbind(0)}
    assert len(episodes) == sum(-(-int((rows["env"] == env).sum()) // 4) for env in NUMBERS)  # none comes twice


def assert_same(a: TensorDictBase, b: TensorDictBase) -> None:
    for key in a.keys(True, True):
        assert torch.equal(a[key], b[key]), key


def collects_and_resumes(make: Callable[[], Workers], opened: Callable) -> None:
    collection = make()
    items, policy = opened(collection)
    first = take(items, policy, 3)
    assert first["env"].tolist()[:8] == [4, 5, 6, 7] * 2  # two steps of each at once, in the order of time
    assert len(first) == 24
    assert first["action"][:WARMUP].unique().numel() == WARMUP  # noise of their own
    assert first["warmup"].tolist() == [True] * WARMUP + [False] * (24 - WARMUP)
    state = collection.state()  # inside an episode
    through = take(items, policy, 2)
    assert_in_order(torch.cat([first, through]))

    collection.close()
    again = make()
    items, policy = opened(again, 24)
    assert again.restore(state) == [True] * 4
    assert_same(take(items, policy, 2), through)
    always_one(policy._acting)
    assert float(take(items, policy, 1)["action"].min()) > 0.9  # the newest weights


def test_workers_that_wait_for_each_other_resume_exactly(opened: Callable) -> None:
    collects_and_resumes(lambda: SyncWorkers(workers=2, agent_steps_at_once=2), opened)


@needs_ray
def test_ray_actors_that_wait_for_each_other_resume_exactly(opened: Callable) -> None:
    collects_and_resumes(lambda: RayWorkers(workers=2, agent_steps_at_once=2), opened)


def loses_nothing(
    collection: Workers, opened: Callable, caplog: pytest.LogCaptureFixture
) -> tuple[Iterator[TensorDictBase], ExplorationPolicy]:
    with caplog.at_level(logging.WARNING):
        items, policy = opened(collection)
    assert sum("exact resume is off" in message for message in caplog.messages) == 1

    def items_of_each(n: int) -> tuple[list[TensorDictBase], dict[int, list[TensorDictBase]]]:
        """At least n items of either worker, as they come and by its first environment: one may be favoured."""
        taken, of_a_worker = [], {NUMBERS[0]: [], NUMBERS[2]: []}
        while min(map(len, of_a_worker.values())) < n:
            taken.append(take(items, policy, 1))
            of_a_worker[int(taken[-1]["env"][0])].append(taken[-1])
        return taken, of_a_worker

    rows = [take(items, policy, 3)]
    time.sleep(2.5)  # an update that takes long
    rows += items_of_each(WARMUP // len(NUMBERS))[0]  # a worker's warm-up is over after as many of its own
    always_one(policy._acting)
    more, of_a_worker = items_of_each(3)
    rows += more
    for _at_hand, *later in of_a_worker.values():  # one item ahead; what is begun after it has the newest weights
        assert float(torch.cat(later)["action"].min()) > 0.9
    together = torch.cat(rows)
    assert_in_order(together)
    for env in NUMBERS:  # by its worker's own clock
        warmup = together["warmup"][together["env"] == env].tolist()
        assert warmup == [True] * (WARMUP // len(NUMBERS)) + [False] * (len(warmup) - WARMUP // len(NUMBERS))
    assert collection.state() == [{"pixels": None}] * 4
    assert type(collection)(workers=2).restore([{"pixels": None}] * 4) == [False] * 4
    return items, policy


def test_workers_that_do_not_wait_lose_nothing_and_one_that_dies_is_named(
    opened: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    collection = AsyncWorkers(workers=2)
    items, policy = loses_nothing(collection, opened, caplog)
    os.kill(collection._collector.procs[1].pid, signal.SIGKILL)
    with pytest.raises(EnvironmentLost, match=r"Worker 1 of 2 \(data.collection\) is lost: its process ended by SIGK"):
        take(items, policy, 50)


class TurnsWrongEnv(PuppetEnv):
    """In each episode's third step it gives a frame of a wrong type, or is lost."""

    factory: TurnsWrong

    def simulator_step(self, action: np.ndarray) -> tuple[Any, float, bool, bool]:
        frame, *rest = super().simulator_step(action)
        if self.step_number < 3:
            return frame, *rest
        if self.factory.is_lost:
            raise EnvironmentLost("Environment 5 is lost (it fell over)")
        return frame.astype(np.float32), *rest


@dataclass
class TurnsWrong(Puppet):
    is_lost: bool = False

    def make(self, seed: int) -> PuppetEnv:
        return TurnsWrongEnv(self, seed)


@pytest.mark.parametrize(
    ("collection", "is_lost", "kind", "sentence"),
    [
        (
            SyncWorkers(workers=2),
            False,
            ConfigError,
            r"TurnsWrongEnv\.simulator_step \(data\.env\) gave float32 of shape",
        ),
        (AsyncWorkers(workers=2), True, EnvironmentLost, r"^Environment 5 is lost \(it fell over\)$"),
    ],
)
def test_what_a_worker_says_before_it_ends_is_told(
    collection: Workers, is_lost: bool, kind: type[Exception], sentence: str, opened: Callable
) -> None:
    items, policy = opened(collection, factory=TurnsWrong(is_lost=is_lost))
    with pytest.raises(kind, match=sentence):
        take(items, policy, 40)


@needs_ray
def test_ray_actors_that_do_not_wait_lose_nothing(opened: Callable, caplog: pytest.LogCaptureFixture) -> None:
    collection = RayWorkers(workers=2, asynchronous=True)
    loses_nothing(collection, opened, caplog)


def test_weights_are_sent_as_often_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sent, after = [], []
    monkeypatch.setattr(AsyncWorkers, "_deliver", lambda self, collector: sent.append(collector))
    collection = AsyncWorkers(workers=2, weights_every_env_steps=6)
    policy = policy_of(small_agent())
    collection.open(Puppet(), policy, NUMBERS, 0)
    collection._networks = policy.for_workers()
    for _ in range(8):  # at 0, 2, 4, …: due at 0, 6 and 12
        collection._send_weights(None)
        after.append(len(sent))
        policy.counters.env_steps += collection.agent_steps_of_an_item(4)
    assert after == [1, 1, 1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SyncWorkers(workers=0), "data.collection.workers is 0; it must be at least 1."),
        (
            lambda: SyncWorkers(agent_steps_at_once=0),
            "data.collection.agent_steps_at_once is 0; it must be at least 1.",
        ),
        (
            lambda: AsyncWorkers(weights_every_env_steps=-1),
            "data.collection.weights_every_env_steps is -1; it must be at least 0.",
        ),
        (
            lambda: SyncWorkers(workers=3).open(Puppet(), policy_of(small_agent()), NUMBERS, 0),
            "data.num_envs is 4, which data.collection.workers = 3 cannot share evenly; it must be a multiple of 3.",
        ),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


def test_an_environment_that_cannot_be_built_is_refused_in_one_sentence() -> None:
    collection = SyncWorkers(workers=1)
    collection.open(Puppet(at_start="config"), policy_of(small_agent()), NUMBERS, 0)
    with pytest.raises(ConfigError, match=r"^data.env.strings is 0; it must be at least 1.$"):
        next(collection.batches())
    assert not children()


FORGETS = """
import sys
sys.path.insert(0, {root!r})
from tests.data.test_workers import *

if __name__ == "__main__":
    collection = AsyncWorkers(workers=1)
    collection.open(Puppet(), policy_of(small_agent()), NUMBERS, 0)
    next(collection.batches())
    print(*children(), flush=True)
    if sys.argv[1] == "closes":
        collection.close()
"""


@pytest.mark.parametrize("closes", ["closes", "forgets"])
def test_python_ends_and_they_with_it(closes: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(FORGETS.format(root=str(Path(__file__).parents[2])))
    done = subprocess.run(
        [sys.executable, str(script), closes], stdout=subprocess.PIPE, text=True, timeout=240, check=True
    )
    worker = int(done.stdout)
    assert not Path(f"/proc/{worker}").exists()


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_of_more_workers_than_before_each_has_noise_of_its_own(workers: int) -> None:
    """Two workers had two environments each; none of those that go on draws as another one does."""
    before, after = SyncWorkers(workers=2), SyncWorkers(workers=workers)
    state = []
    for collection in (before, after):
        collection.open(Puppet(), policy_of(small_agent()), NUMBERS, 3)
    for place in before._workplaces:
        worker = ExplorationPolicy(small_agent(), 1, Counters(), WARMUP, envs=4, seed=place.noise_seed())
        worker(TensorDict({"pixels": torch.zeros(2, 9, 40, 40, dtype=torch.uint8)}, [2]))
        state += [{"env": n, "noise": worker.noise_state()} for n in place.numbers]  # as state() gives it
    rest = iter(_noise_once(state))
    noises = []
    for place in after._workplaces:
        place.episodes = [next(rest) for _ in place.numbers]
        noises.append(place.noise())
    kept = [noise["uniform"] for noise in noises if noise is not None]
    expected = {1: [0], 2: [0, 2], 4: [0, 2]}[workers]  # by the first environment that had it
    assert [state[i]["noise"]["uniform"].tolist() for i in expected] == [one.tolist() for one in kept]
    assert len({place.noise_seed() for place in after._workplaces}) == workers
