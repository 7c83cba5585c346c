"""Running the runs of a sweep, each in a process of its own."""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import BinaryIO, Literal

from covr_lightning.errors import ConfigError
from covr_lightning.secrets import masked
from covr_lightning.sweep.runs import SweepRun

#: What stops a sweep, and what its runs are told then.
_STOPS = {
    signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,
}  # fmt: skip
_POLL_SECONDS = 0.1


@dataclass
class Outcome:
    """How a run of the sweep ended.

    Attributes:
        kind: ``skipped`` was finished before; ``waiting`` was not started.
        why: Of a run that failed: its exit status and its last words.
    """

    kind: Literal["waiting", "skipped", "finished", "stopped", "failed"] = "waiting"
    why: str = ""


class Processes:
    """Runs a sweep's runs, `jobs` at a time.

    A run's process has a process group of its own, so Ctrl-C in a terminal reaches this process only, which passes it
    on once; a second one is passed on as well, and the run then does not wait for its save.

    Args:
        runs: The runs, in order.
        jobs: How many at a time.
        say: Prints a line.
        command: What runs ``covr``.

    Attributes:
        outcomes: One per run.
        stopped_by: The signal that stopped the sweep.
    """

    def __init__(
        self,
        runs: Sequence[SweepRun],
        jobs: int,
        say: Callable[[str], None],
        command: Sequence[str] = (sys.executable, "-m", "covr_lightning.cli"),
    ) -> None:
        self.runs = runs
        self.jobs = jobs
        self.say = say
        self.command = command
        self.outcomes = [Outcome() for _ in runs]
        self.stopped_by: int | None = None
        self._pass_on: list[int] = []
        self._running: dict[int, tuple[subprocess.Popen[bytes], BinaryIO, float]] = {}

    def run(self) -> None:
        """Run all; returns when every run has ended or the sweep was stopped."""
        with self._listening():
            try:
                self._run()
            except BaseException:
                for process, _, _ in self._running.values():
                    process.terminate()  # nobody would wait for them or note how they end
                raise

    def _run(self) -> None:
        waiting, told = list(range(len(self.runs))), set[int]()
        while self._running or (waiting and self.stopped_by is None):
            for n in list(waiting):
                if len(self._running) >= self.jobs or self.stopped_by is not None:
                    break
                try:
                    lock = self.runs[n].lock()
                except ConfigError as error:
                    waiting.remove(n)
                    self._fail(n, str(error))
                    continue
                if lock is not None:
                    waiting.remove(n)
                    self._begin(n, lock)
                elif n not in told:
                    told.add(n)
                    self._say(n, "is still being written by a process that an earlier sweep started; this waits.")
            time.sleep(_POLL_SECONDS)
            self._tell_signals()
            for n, (process, _, _) in list(self._running.items()):
                if process.poll() is not None:
                    self._end(n)

    def _begin(self, n: int, lock: BinaryIO) -> None:
        """Start the run or go on with it, unless it is finished."""
        run = self.runs[n]
        try:
            state = run.state()
            if state == "finished":
                run.curve()
                lock.close()
                self.outcomes[n] = Outcome("skipped")
                self._say(n, "is finished already.")
                return
            aside = run.set_aside() if state == "new" else None
        except ConfigError as error:
            lock.close()
            self._fail(n, str(error))
            return
        if aside is not None:
            self._say(n, f"had no checkpoint to go on from; what there was is in {aside}.")
        arguments = run.arguments(state)
        self._say(n, f"{'goes on' if state == 'cut' else 'starts'}; it prints to {run.log}.")
        with run.log.open("ab") as output:
            output.write(f"$ covr {masked(shlex.join(arguments))}\n".encode())
            output.flush()
            process = subprocess.Popen(
                [*self.command, *arguments], stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, process_group=0, pass_fds=(lock.fileno(),),
            )  # fmt: skip
        self._running[n] = (process, lock, time.monotonic())

    def _end(self, n: int) -> None:
        """Note how a process ended."""
        process, lock, start = self._running.pop(n)
        lock.close()
        run, status = self.runs[n], process.returncode
        if status == 0:
            try:
                last = run.curve()[-1] if run.state() == "finished" else None
            except ConfigError as error:
                self._fail(n, str(error))
                return
            if last is None:
                self._fail(n, f"exit status 0, but it left no summary of a whole run in {run.folder}")
                return
            self.outcomes[n] = Outcome("finished")
            self._say(n, f"finished after {time.monotonic() - start:.0f} s; return {last['return']:.1f}.")
        elif self.stopped_by is not None:
            self.outcomes[n] = Outcome("stopped")
            self._say(n, "stopped.")
        else:
            how = f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
            self._fail(n, f"{how}: {_last_line(run)}")

    def _fail(self, n: int, why: str) -> None:
        self.outcomes[n] = Outcome("failed", why)
        self._say(n, f"failed, {why}")

    def _say(self, n: int, text: str) -> None:
        self.say(f"[{n + 1}/{len(self.runs)}] {self.runs[n]} {text}")

    # -- signals -------------------------------------------------------------------------------------------------

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Note signals; outside the main thread Python allows no handlers."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            for signum in _STOPS:
                if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup has it
                    before[signum] = signal.signal(signum, self._note)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.stopped_by = self.stopped_by or signum
        self._pass_on.append(signum)

    def _tell_signals(self) -> None:
        """Pass the signals on that came since the last time."""
        while self._pass_on:
            signum = _STOPS[signal.Signals(self._pass_on.pop(0))]
            if self._running:
                self.say(f"{signum.name}: the sweep stops when what is running has saved.")
            for process, _, _ in self._running.values():
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signum)


def _last_line(run: SweepRun) -> str:
    """The run's last words."""
    with run.log.open("rb") as file:
        file.seek(max(0, run.log.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
