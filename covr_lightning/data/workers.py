"""Environments in worker processes that act for themselves, by TorchRL's multi-process collectors."""

from __future__ import annotations

import copy
import logging
import signal
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.util import Finalize
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import MultiAsyncCollector, MultiSyncCollector
from torchrl.weight_update import SharedMemWeightSyncScheme

from covr_lightning.data.collection import TRANSITION_KEYS, Collection
from covr_lightning.data.exploration import ExplorationPolicy
from covr_lightning.data.workplace import LOST, Workplace, last_words
from covr_lightning.envs.base import EnvFactory
from covr_lightning.envs.child import (
    MARK,
    ONE_THREAD,
    become_a_child,
    kill_marked,
    new_mark,
    signals_blocked,
    surroundings,
)
from covr_lightning.envs.process import EnvProcesses
from covr_lightning.errors import ConfigError, EnvironmentLost

log = logging.getLogger(__name__)


class Workers(Collection):
    """Several workers, each with as many environments and a copy of the policy, on the CPU.

    The agent's weights are sent to them before each item. So a worker acts, at the most, with weights that are as old
    as the item is long: environments × `agent_steps_at_once` agent steps.

    Args:
        workers: How many; the environments of a process (``data.num_envs``) are shared out evenly.
        agent_steps_at_once: Agent steps that every environment takes between two updates of a worker's weights. More of
            them cost less, and act with older weights.
        env_processes: Let every environment live in a process of its own, started by its worker and supervised.

    Raises:
        ConfigError: A number is below 1.
    """

    def __init__(
        self, workers: int = 2, agent_steps_at_once: int = 1, env_processes: EnvProcesses | None = None
    ) -> None:  # fmt: skip
        for name, value in (("workers", workers), ("agent_steps_at_once", agent_steps_at_once)):
            if value < 1:
                raise ConfigError(f"data.collection.{name} is {value}; it must be at least 1.")
        self.workers = workers
        self.agent_steps_at_once = agent_steps_at_once
        self.env_processes = env_processes
        self._collector: Any = None
        self._lost: dict[int, int] = {}

    @abstractmethod
    def _make_collector(self, workplaces: list[Workplace], policy: Any) -> Any:
        """Start the workers."""

    @abstractmethod
    def _why_lost(self, error: Exception) -> Exception | None:
        """What to raise instead, if an error comes from a worker that is gone."""

    def _end(self, collector: Any) -> None:
        """End the workers."""
        collector.shutdown()

    def open(self, factory: EnvFactory, policy: ExplorationPolicy, numbers: range, seed: int) -> None:
        """Take note; the workers start when there is something for them to do."""
        if len(numbers) % self.workers:
            raise ConfigError(
                f"data.num_envs is {len(numbers)}, which data.collection.workers = {self.workers} cannot share evenly; "
                f"it must be a multiple of {self.workers}."
            )
        if policy.warmup_actions != "random":
            raise ConfigError(
                f"data.warmup_actions is {policy.warmup_actions!r}, but the VLM is not in the workers of "
                f"{type(self).__name__} (data.collection); with them it can be 'random'."
            )
        if not self.resumes_exactly:
            log.warning(
                "%s: which transitions come first depends on how fast the workers are, so exact resume is off: a "
                "resumed run cuts the open episodes and goes on, not as it would have.", type(self).__name__,
            )  # fmt: skip
        share = len(numbers) // self.workers
        self._policy, self._seed = policy, seed
        self._workplaces = []
        for first in range(0, len(numbers), share):
            own = numbers[first : first + share]
            factories = [factory.placed(number, policy.envs, self.together) for number in own]
            self._workplaces.append(Workplace(factories, own, seed, self.env_processes))

    def agent_steps_of_an_item(self, envs: int) -> int:
        """Of all environments."""
        return envs * self.agent_steps_at_once

    def _running(self) -> Any:
        """The TorchRL collector; starts it."""
        if self._collector is None:
            self._networks = self._policy.for_workers()
            try:
                self._collector = self._make_collector(self._workplaces, self._networks)
            except ConfigError as error:  # TorchRL appends the worker's traceback
                raise ConfigError(str(error).split("\n\nWorker traceback")[0]) from None
            begin = [
                (self._policy.counters.agent_steps, place.noise_seed(), place.noise()) for place in self._workplaces
            ]
            self._collector.map_fn("policy.begin", begin)
        return self._collector

    def batches(self) -> Iterator[TensorDictBase]:
        """Agent steps of every environment, in the order of time."""
        collector = self._running()
        items = iter(collector)
        while True:
            try:
                self._send_weights(collector)
                collected = next(items)
            except Exception as error:
                why = self._why_lost(error)
                if why is None:
                    raise
                raise why from error
            for env, lost in zip(collected["env"][..., -1].flatten(), collected[LOST][..., -1].flatten(), strict=True):
                self._lost[int(env)] = int(lost)
            time_first = collected.select(*TRANSITION_KEYS).permute(-1, *range(collected.ndim - 1))
            yield time_first.reshape(-1)

    def _send_weights(self, collector: Any) -> None:
        self._policy.send_weights(self._networks)
        self._deliver(collector)

    @abstractmethod
    def _deliver(self, collector: Any) -> None:
        """Send the workers the weights of the policy that they were started with."""

    def state(self) -> list[dict[str, Any]]:
        """Each environment's running episode, with its worker's noise; nothing to continue without exact resume."""
        if not self.resumes_exactly:
            return [{"pixels": None} for place in self._workplaces for _ in place.numbers]
        collector = self._running()
        episodes, noise = collector.map_fn("env.episode_states"), collector.map_fn("policy.noise_state")
        return [one | {"noise": mine} for own, mine in zip(episodes, noise, strict=True) for one in own]

    def restore(self, state: list[dict[str, Any]]) -> list[bool]:
        """Start the workers with these episodes; those of another collection go on with other noise.

        So do workers that there were not: where there are more than before, one of them has a worker's noise and the
        others theirs from their seeds.
        """
        if not self.resumes_exactly:
            return [False] * len(state)
        rest = iter(_noise_once(state))
        for place in self._workplaces:
            place.episodes = [next(rest) for _ in place.numbers]
        return [goes_on for own in self._running().get_distant_attr("env.continued") for goes_on in own]

    @property
    def lost_episodes(self) -> int:
        """Of all environments, up to the newest transition of each."""
        return sum(self._lost.values())

    def close(self) -> None:
        """End the workers, once."""
        collector, self._collector = self._collector, None
        if collector is not None:
            self._end(collector)


def _noise_once(state: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What :meth:`Workers.state` gave, each worker's noise only beside the first of its environments."""
    known: list[torch.Tensor] = []
    once = []
    for one in state:
        noise = one.get("noise")
        is_new = noise is not None and not any(torch.equal(noise["uniform"], other) for other in known)
        known += [noise["uniform"]] if noise is not None and is_new else []
        once.append(one if is_new else {**one, "noise": None})
    return once


class _WorkerProcesses(Workers):
    """Workers that are processes of this machine, started by this one, and ended with it."""

    _collector_class: type

    def _deliver(self, collector: Any) -> None:
        # Into the memory that the workers' networks lie in. `update_policy_weights_` would wait for a worker that died.
        weights = TensorDict.from_module(self._networks).data
        self._scheme.shared_transport.send_weights(weights)

    def _make_collector(self, workplaces: list[Workplace], policy: Any) -> Any:
        self._mark, threads = new_mark(), torch.get_num_threads()
        self._scheme = SharedMemWeightSyncScheme()
        self._finalize = Finalize(self, _end_processes, (self._mark, self._scheme), exitpriority=10)
        resource_tracker.ensure_running()  # or the first start would start it, with what is only meant for the workers
        self._words = TemporaryDirectory(prefix="covr_workers_")
        for number, place in enumerate(workplaces):
            place.last_words = Path(self._words.name) / str(number)
        sync = {"cat_results": "stack"} if self._collector_class is MultiSyncCollector else {}
        try:
            with signals_blocked(), surroundings(ONE_THREAD | {MARK: self._mark}):
                return self._collector_class(
                    workplaces,
                    policy,  # for its weights
                    policy_factory=partial(copy.copy, policy.without_weights()),
                    frames_per_batch=self.agent_steps_of_an_item(sum(len(place.numbers) for place in workplaces)),
                    total_frames=-1,
                    init_fn=partial(become_a_child, self._mark),
                    weight_sync_schemes={"policy": self._scheme},
                    num_threads=threads,  # or it changes this process's
                    trust_policy=True,
                    use_buffers=True,
                    auto_register_policy_transforms=False,
                    **sync,
                )
        except BaseException:
            self._finalize()  # those that have started
            raise

    def _why_lost(self, error: Exception) -> Exception | None:
        ends: dict[int, int] = {}
        for number, process in enumerate(self._collector.procs):
            with suppress(ValueError):  # TorchRL has closed this one
                process.join(1.0)
                if process.exitcode:
                    ends[number] = process.exitcode
        if not ends:
            return None
        words = (last_words(place.last_words) for place in self._workplaces if place.last_words)
        if said := next(filter(None, words), None):
            return said
        number = min(ends, key=lambda number: ends[number] == -signal.SIGTERM)  # so TorchRL ends the others
        how = f"by {signal.Signals(-ends[number]).name}" if ends[number] < 0 else f"with status {ends[number]}"
        return EnvironmentLost(f"Worker {number} of {self.workers} (data.collection) is lost: its process ended {how}")

    def _end(self, collector: Any) -> None:
        threads = torch.get_num_threads()
        with suppress(Exception):  # whatever is left is killed
            collector.shutdown()
        torch.set_num_threads(threads)
        self._finalize()
        self._words.cleanup()


def _end_processes(mark: str, scheme: SharedMemWeightSyncScheme) -> None:
    """Kill what is left of workers, and what they have started."""
    with suppress(Exception):  # TorchRL would do this when Python ends, and wait forever
        scheme.shutdown()
    kill_marked(mark)


class SyncWorkers(_WorkerProcesses):
    """Worker processes that collect together: all get the newest weights, take their steps, and wait while the agent
    is updated (TorchRL's MultiSyncCollector). Resumes exactly.

    Args:
        workers: How many; the environments of a process (``data.num_envs``) are shared out evenly.
        agent_steps_at_once: Agent steps that every environment takes between two updates of the workers' weights.
        env_processes: Let every environment live in a process of its own, started by its worker and supervised.
    """  # noqa: D205

    _collector_class = MultiSyncCollector


class _Lossless(MultiAsyncCollector):
    """With room for an item of each worker: without it, TorchRL's workers throw items away while nobody takes them."""

    @property
    def _queue_len(self) -> int:
        return self.num_workers


class AsyncWorkers(_WorkerProcesses):
    """Worker processes that collect while the agent is updated; an item is of the worker that is ready first (TorchRL's
    MultiAsyncCollector). Exact resume is off: open episodes are cut.

    Each worker is at most one item ahead, so that it acts with weights from before the item that was taken last, or
    newer ones.

    Args:
        workers: How many; the environments of a process (``data.num_envs``) are shared out evenly.
        agent_steps_at_once: Agent steps that every environment of a worker takes for an item.
        env_processes: Let every environment live in a process of its own, started by its worker and supervised.
        weights_every_env_steps: Environment steps of this process between two updates of the workers' weights, at
            least; 0: with each item.
    """  # noqa: D205

    resumes_exactly = False
    _collector_class = _Lossless

    def __init__(
        self,
        workers: int = 2,
        agent_steps_at_once: int = 1,
        env_processes: EnvProcesses | None = None,
        weights_every_env_steps: int = 0,
    ) -> None:
        super().__init__(workers, agent_steps_at_once, env_processes)
        if weights_every_env_steps < 0:
            raise ConfigError(
                f"data.collection.weights_every_env_steps is {weights_every_env_steps}; it must be at least 0."
            )
        self.weights_every_env_steps = weights_every_env_steps
        self._weights_are_of: int | None = None

    def agent_steps_of_an_item(self, envs: int) -> int:
        """Of one worker's environments."""
        return envs // self.workers * self.agent_steps_at_once

    def _send_weights(self, collector: Any) -> None:
        now = self._policy.counters.env_steps
        if self._weights_are_of is None or now - self._weights_are_of >= self.weights_every_env_steps:
            super()._send_weights(collector)
            self._weights_are_of = now
