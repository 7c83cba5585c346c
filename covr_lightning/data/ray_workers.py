"""Environments in Ray actors that act for themselves, by TorchRL's RayCollector."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
from typing import Any

import numpy as np
from torchrl.collectors import Collector

from covr_lightning.data.workers import Workers
from covr_lightning.data.workplace import Workplace
from covr_lightning.envs.process import EnvProcesses
from covr_lightning.errors import ConfigError, EnvironmentLost, check_not_negative
from covr_lightning.stopping import SIGNALS


class RayWorkers(Workers):
    """Workers that are Ray actors, on this machine or on all of a cluster's (TorchRL's RayCollector).

    Without an address, a Ray of this machine's own is started, bound to 127.0.0.1, and ended with the run.

    Args:
        workers: How many; the environments of a process (``data.num_envs``) are shared out evenly.
        agent_steps_at_once: Agent steps that every environment takes between two updates of a worker's weights.
        env_processes: Let every environment live in a process of its own, started by its worker and supervised.
        asynchronous: Workers collect while the agent is updated, as those of :class:`AsyncWorkers`; exact resume is
            then off.
        address: Of a Ray cluster that runs already, as `ray.init` takes it.
        cpus_per_worker: CPU cores that an actor asks Ray for.

    Raises:
        ConfigError: Ray is not installed, or `cpus_per_worker` is no number from 0 on.
    """

    def __init__(
        self,
        workers: int = 2,
        agent_steps_at_once: int = 1,
        env_processes: EnvProcesses | None = None,
        asynchronous: bool = False,
        address: str | None = None,
        cpus_per_worker: float = 1.0,
    ) -> None:
        super().__init__(workers, agent_steps_at_once, env_processes)
        check_not_negative("data.collection.cpus_per_worker", cpus_per_worker)
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(
                "data.collection is RayWorkers, but Ray is not installed: pip install 'covr_lightning[ray]'."
            )
        self.asynchronous = asynchronous
        self.address = address
        self.cpus_per_worker = cpus_per_worker
        self.resumes_exactly = not asynchronous

    def agent_steps_of_an_item(self, envs: int) -> int:
        """Of all environments, or asynchronously of one worker's."""
        return (envs // self.workers if self.asynchronous else envs) * self.agent_steps_at_once

    def _make_collector(self, workplaces: list[Workplace], policy: Any) -> Any:
        from ray._private import ray_constants
        from torchrl.collectors.distributed import RayCollector

        ray_init: dict[str, Any] = {"address": self.address, "log_to_driver": False}
        if self.address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # Ray takes 127.0.0.1 for a mistake, except where it cannot make clusters; its processes read the variable.
            ray_constants.ENABLE_RAY_CLUSTER = False
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            ray_init |= {
                "address": "local",  # whatever RAY_ADDRESS says
                "num_cpus": max(multiprocessing.cpu_count(), int(np.ceil(self.workers * self.cpus_per_worker))),
                "_node_ip_address": "127.0.0.1",
                "include_dashboard": False,
            }
        handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}  # Ray takes SIGTERM for itself
        collector = RayCollector(
            workplaces,
            policy,
            frames_per_batch=self.agent_steps_of_an_item(sum(len(place.numbers) for place in workplaces)),
            total_frames=2**62,
            collector_class=Collector,
            collector_kwargs=[{"trust_policy": True, "auto_register_policy_transforms": False} for _ in workplaces],
            ray_init_config=ray_init,
            remote_configs=[{"num_cpus": self.cpus_per_worker, "num_gpus": 0} for _ in workplaces],
            sync=not self.asynchronous,
            weight_sync_schemes={},
        )
        collector._weight_sync_initialized = True  # by `_deliver`
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        return collector

    def _deliver(self, collector: Any) -> None:
        # Through Ray's own store: TorchRL would open a process group of its own. An actor takes them after the item it
        # is at, and before the next one; nobody waits for it.
        import ray

        weights = ray.put(self._networks.networks.state_dict())
        for actor in collector.remote_collectors:
            actor.cascade_execute.remote("policy.set_weights", weights)

    def _why_lost(self, error: Exception) -> Exception | None:
        import ray

        if isinstance(error, ray.exceptions.RayActorError):
            first = str(error).splitlines()[0]
            return EnvironmentLost(f"A worker of RayWorkers (data.collection) is lost: {first}")
        return None
