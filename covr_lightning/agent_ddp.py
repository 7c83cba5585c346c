"""An agent's training in several processes: the strategy, and the processes that it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher

from covr_lightning.errors import ConfigError
from covr_lightning.processes import failing_together, leave

#: Tells a process that this one starts by whom it was started.
_STARTED_BY = "COVR_STARTED_BY"

#: Seconds that a run's processes have to end by themselves once one of them has failed or was stopped.
LONGEST_END = 60.0


class AgentDDP(DDPStrategy):
    """Data-parallel training of an agent, whose update makes several backward passes through parts of its networks.

    PyTorch's DDP wrapper reduces once per forward pass and waits for parameters that such a pass leaves alone. Here the
    module itself averages the gradients that each optimizer is about to use
    (:func:`~covr_lightning.processes.average_gradients`); the first process's weights are every process's first.
    """

    @classmethod
    def like(cls, strategy: Strategy) -> AgentDDP:
        """One in place of Lightning's, with the timeout and the backend that it was given.

        Args:
            strategy: What a Trainer has made of ``trainer.strategy``, of several processes or of one.

        Raises:
            ConfigError: An agent does not train in it: it is not DDP in processes that run the command anew.
        """
        forks = isinstance(strategy.launcher, _MultiProcessingLauncher)
        if type(strategy) is not DDPStrategy or forks:
            raise ConfigError(
                f"trainer.strategy is {type(strategy).__name__}{' that spawns or forks' if forks else ''}; an "
                "agent trains with auto or ddp (its VLM can be fine-tuned in other ways, "
                "docs/several_gpus.md)."
            )
        return cls(timeout=strategy._timeout, process_group_backend=strategy._process_group_backend)

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None, "the Trainer has chosen one"
        self._launcher = RunLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def configure_ddp(self) -> None:
        """Start from the first process's weights; there is no wrapper."""
        assert self.model is not None, "connected before"
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            dist.broadcast(tensor.data, src=0)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint in the first process; if that fails, it fails in all, before they wait for it."""
        with failing_together():
            super().save_checkpoint(checkpoint, filepath, storage_options)


class RunLauncher(_SubprocessScriptLauncher):
    """Starts a run's other processes of this machine, and sees to it that all end together.

    Lightning kills all of them five seconds after one has ended with another status than 0, which is also the status of
    a run that was stopped and saved. Here they have :data:`LONGEST_END` to end by themselves; a process that waits for
    one that is gone never does. A process that was started so ends when the one that started it has been gone for as
    long, even where it waits for it from before they met.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        starter = os.environ.pop(_STARTED_BY, None)
        if starter is not None:
            threading.Thread(target=_end_with, args=(int(starter),), name="watches-its-starter", daemon=True).start()
        self.children: list[subprocess.Popen[bytes]] = []
        self._over = threading.Event()

    def _call_children_scripts(self) -> None:
        os.environ[_STARTED_BY] = str(os.getpid())
        try:
            super()._call_children_scripts()
        finally:
            del os.environ[_STARTED_BY]
            self.children, self.procs = self.procs, []  # so that Lightning's observer has none to watch
        threading.Thread(target=self._watch, name="watches-processes", daemon=True).start()

    def kill(self, signum: int) -> None:
        """Send a signal to the others."""
        for child in self.children:
            child.send_signal(signum)

    def end(self) -> None:
        """Wait for the others, whose run is over as this one's is; kill those that do not end."""
        self._over.set()  # from here on this watches itself
        if not self.children:
            return
        try:
            leave()
        finally:
            if not self._ended_within(LONGEST_END):
                self.kill(signal.SIGKILL)

    def _ended_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while any(child.poll() is None for child in self.children):
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def _watch(self) -> None:
        while not any(child.poll() for child in self.children):
            if self._over.wait(1):
                return
        if self._over.wait(LONGEST_END):
            return
        status = next(child.returncode for child in self.children if child.returncode)
        print(f"covr: a process of this run ended with status {status}; the others do not end, and are killed.",
              file=sys.stderr, flush=True)  # fmt: skip
        self.kill(signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def _end_with(starter: int) -> None:
    """Kill this process once the one that started it is gone, and this one does not end by itself."""
    while os.getppid() == starter:
        time.sleep(1)
    time.sleep(LONGEST_END)
    print("covr: the process that started this one is gone; it ends.", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
