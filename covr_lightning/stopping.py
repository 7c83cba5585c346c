"""Signals that stop a run: it saves first, and a second Ctrl-C does not wait for that."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

#: What stops a run: Ctrl-C, and what batch systems send before they take the machine away.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class RunStopped(BaseException):
    """A signal stopped the run.

    Not an Exception, so that no library takes it for a failure of its own.

    Args:
        signum: The signal.

    Attributes:
        has_checkpoint: See :class:`~covr_lightning.errors.RunFailed`.
    """

    has_checkpoint: bool = False

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells have it."""
        return 128 + self.signum


def is_ctrl_c(left: KeyboardInterrupt | SystemExit) -> bool:
    """Whether a run was left by Ctrl-C, of which Lightning makes a SystemExit."""
    return isinstance(left, KeyboardInterrupt) or isinstance(left.__context__, KeyboardInterrupt)


class StopSignals:
    """Turns signals into a stop between two agent steps, where a run can be saved exactly.

    Signals belong to the process, so there is one of these, :data:`stop_signals`.

    Attributes:
        requested: The signal that came; None if none did.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Listen; does nothing outside the main thread, where Python allows no handlers."""
        self.requested, self._at_once = None, False
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}

    def listen_again(self) -> None:
        """Take the signals back from a Trainer inside a step, which would end the step in its middle and not save."""
        for signum in self._before:
            signal.signal(signum, self._handle)

    def uninstall(self) -> None:
        """Give the signals back."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before, self._at_once = {}, False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, nothing that is saved changes: a signal stops the run at once, by :class:`RunStopped`."""
        self.begin_at_once()
        try:
            yield
        finally:
            self.end_at_once()

    def begin_at_once(self) -> None:
        """Enter what :meth:`at_once` describes; one of several processes, for which others may wait, does not."""
        from covr_lightning import processes  # imports PyTorch; the command line has settings to make before that

        if processes.count() == 1:
            self._at_once = True  # first, so that no signal comes in between
            self.check()

    def end_at_once(self) -> None:
        """Leave it."""
        self._at_once = False

    def check(self) -> None:
        """Stop if a signal came.

        Raises:
            RunStopped: One did.
        """
        if self.requested is not None:
            raise RunStopped(self.requested)

    def check_together(self) -> None:
        """Stop if a signal came to any of the run's processes; all of them have to call this.

        One that comes while this waits for the others counts the next time: they do not know of it yet.

        Raises:
            RunStopped: One did.
        """
        from covr_lightning import processes

        signum = processes.largest(self.requested or 0)
        if signum:
            self.requested = signum
            raise RunStopped(signum)

    def sleep(self, seconds: float) -> None:
        """Wait, but not any longer once a signal came, so that the step in which something waits can end."""
        end = time.monotonic() + seconds
        while self.requested is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.requested = self.requested is None, signum
        if first and self._at_once:
            raise RunStopped(signum)
        if first:
            log.info("%s: the run stops after this step and is saved.", signal.Signals(signum).name)


stop_signals = StopSignals()
