"""The child process of an environment, from both ends of the pipe: the handle here, and what runs there."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.context import SpawnProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np
import torch

from covr_lightning.envs.base import EnvSpec, PixelEnv
from covr_lightning.errors import ConfigError, WrongResult
from covr_lightning.stopping import SIGNALS

#: How long an environment may take to close itself before its process is killed.
END_SECONDS = 30.0
#: The same once the trainer's process is dead, and for a process that has raised or closed its pipe.
SHORT_END_SECONDS = 5.0
#: In the surroundings of all that a child starts, so that it can be found in whatever session it is.
MARK = "COVR_ENV_PROCESS"
#: What keeps numerical libraries, and Mesa's software renderer, from starting threads of their own. They read it once,
#: when they are loaded.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LP_NUM_THREADS": "0"}
#: Requests whose answer brings a new frame.
WITH_FRAME = ("draw_episode", "simulator_step")


class ChildLost(Exception):
    """The child died, hung, or its environment raised.

    Args:
        why: A clause that says which.
        config_error: What it raised is a ConfigError.
        wrong_result: It is a WrongResult, which another process would give again.
    """

    def __init__(self, why: str, config_error: bool = False, wrong_result: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.config_error = config_error
        self.wrong_result = wrong_result


@dataclass
class Answer:
    """What a child says to a request.

    Attributes:
        result: The method's result.
        frame: The newest frame (H, W, 3) uint8, if the request brings one.
        repeatable: The environment's `repeatable`.
        lost_episodes: By how much its `lost_episodes` grew.
        episode_metrics: Of its running episode.
        step_lost: Its `step_lost`.
    """

    result: Any
    frame: np.ndarray | None
    repeatable: bool
    lost_episodes: int
    episode_metrics: dict[str, float]
    step_lost: bool = False


@dataclass
class _Raised:
    """What a child says before it ends because its environment raised."""

    why: str
    config_error: bool
    wrong_result: bool


class Child:
    """A process with an environment, which is asked one thing at a time.

    The constructor does not wait for it. It ends with this handle, with the trainer's process at the latest.

    Args:
        factory: The pickled :class:`~covr_lightning.envs.base.EnvFactory`.
        seed: For `make`.
        spec: Its shapes.
        start_seconds: How long the environment may take to be built, imports included.

    Attributes:
        process: The process.
        awaited: Name of the request whose answer has not been taken; None if there is none.

    Raises:
        OSError: The process cannot be started.
    """

    def __init__(self, factory: bytes, seed: int, spec: EnvSpec, start_seconds: float) -> None:
        self.awaited: str | None = None
        self._asked = 0  # the newest request's number; 0 is the question whether the environment is built
        self._seconds = 0.0
        self._built = False
        self._deadline = time.monotonic() + start_seconds
        context = multiprocessing.get_context("spawn")
        shape = (3, spec.frame_height, spec.frame_width)
        slot = context.RawArray("B", int(np.prod(shape)))
        self._slot = np.frombuffer(slot, np.uint8).reshape(shape)
        self._pipe, theirs = context.Pipe()
        self._mark = new_mark()
        self.process = context.Process(
            target=_serve, args=(theirs, slot, shape, factory, seed, self._mark), name="covr environment", daemon=True
        )
        resource_tracker.ensure_running()  # or the first start would start it, with what is only meant for the child
        with signals_blocked(), surroundings(ONE_THREAD), theirs:
            self.process.start()
        # By multiprocessing's own means: what it registers with atexit would wait for a child that does not know.
        self._finalize = Finalize(self, _end, (self.process, self._pipe, self._mark, END_SECONDS), exitpriority=10)

    def send(self, name: str, *arguments: Any, seconds: float) -> None:
        """Ask; :meth:`receive` gives the answer, or says what went wrong.

        Args:
            name: Method of the environment.
            arguments: Its arguments.
            seconds: How long the answer may take, from now or from when the environment is built.
        """
        self._asked += 1
        self.awaited = name
        self._seconds = seconds
        if self._built:
            self._deadline = time.monotonic() + seconds
        with suppress(OSError):
            self._pipe.send_bytes(pickle.dumps((self._asked, name, arguments)))

    def receive(self) -> Answer:
        """The answer to the newest request.

        Raises:
            ChildLost: There is none.
        """
        if not self._built:
            self._answer(0)
            self._built = True
            self._deadline = time.monotonic() + self._seconds
        answer = self._answer(self._asked)
        if self.awaited in WITH_FRAME:
            answer.frame = self._slot.copy().transpose(1, 2, 0)
        self.awaited = None
        return answer

    def _answer(self, wanted: int) -> Answer:
        while True:
            try:
                if not self._pipe.poll(max(0.0, self._deadline - time.monotonic())):
                    raise ChildLost(self._why_silent())
                number, answer = pickle.loads(self._pipe.recv_bytes())
            except (EOFError, OSError):
                raise ChildLost(self._why_ended()) from None
            if isinstance(answer, _Raised):
                connection.wait([self.process.sentinel], SHORT_END_SECONDS)  # it closes its environment
                raise ChildLost(answer.why, answer.config_error, answer.wrong_result)
            if number == wanted:  # or it answers a request that an exception here broke off
                return answer

    def _why_silent(self) -> str:
        if not self.process.is_alive():  # but what it started may hold the pipe open
            return self._why_ended()
        if self._built:
            return f"no answer in {self._seconds:g} s"
        return "its start took too long"

    def _why_ended(self) -> str:
        self.process.join(SHORT_END_SECONDS)
        status = self.process.exitcode
        if status is None:
            return "it closed its pipe"
        if status >= 0:
            return f"its process ended with status {status}"
        with suppress(ValueError):
            return f"its process ended by {signal.Signals(-status).name}"
        return f"its process ended by signal {-status}"

    def end(self) -> None:
        """Let the environment close itself and the process end; kill what does not."""
        if not self._built:
            self.kill()
        self._finalize()

    def kill(self) -> None:
        """Kill the process and all that it has started."""
        self._finalize.cancel()
        _end(self.process, self._pipe, self._mark, 0.0)


def _end(process: SpawnProcess, pipe: connection.Connection, mark: str, seconds: float) -> None:
    """End a child: by closing the pipe, then by killing its process group and what else it has started."""
    pipe.close()
    connection.wait([process.sentinel], seconds)
    if process.pid is not None:
        _kill_group(process.pid)
    process.kill()
    kill_marked(mark)
    process.join(SHORT_END_SECONDS)


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # it has ended, or does not lead a group yet
        os.killpg(leader, signal.SIGKILL)


def new_mark() -> str:
    """A mark for a child; it begins with that of this process, so that whoever kills this one finds all below it."""
    return f"{os.environ.get(MARK, '')}/{uuid.uuid4().hex}"


def kill_marked(mark: str) -> None:
    """Kill what a child has started in sessions of its own, a CARLA server for one. Linux only."""
    wanted = f"{MARK}={mark}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has just ended, or is somebody else's
            if any(entry.startswith(wanted) for entry in path.read_bytes().split(b"\0")):
                os.kill(int(path.parent.name), signal.SIGKILL)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """What a child inherits: blocked until it has its own handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def surroundings(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables that hold inside only, for what is started there."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# -- in the child ------------------------------------------------------------------------------------------------


def become_a_child(mark: str) -> None:
    """Make this process one that ends with its parent, and leaves it to it what signals mean.

    Args:
        mark: To be found in the surroundings of all that it starts.
    """
    os.setsid()  # a process group of its own, which can be killed as one
    os.environ[MARK] = mark
    for number in SIGNALS:
        # They come to all processes of a terminal or a batch job; the trainer decides what they mean. A handler rather
        # than SIG_IGN, which whatever is started here would inherit.
        signal.signal(number, _ignore)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, args=(mark,), daemon=True).start()
    torch.set_num_threads(1)


def _serve(
    pipe: connection.Connection, slot: Any, shape: tuple[int, int, int], factory: bytes, seed: int, mark: str
) -> None:  # fmt: skip
    become_a_child(mark)
    env: PixelEnv | None = None
    status = 0
    try:
        env = pickle.loads(factory).make(seed)
        _answer_requests(pipe, np.frombuffer(slot, np.uint8).reshape(shape), env)
    except Exception as error:
        status = 1
        traceback.print_exc()
        config_error = isinstance(error, ConfigError)
        why = str(error) if config_error else f"it raised {traceback.format_exception_only(error)[-1].strip()}"
        _tell(pipe, (0, _Raised(why, config_error, isinstance(error, WrongResult))))
    if env is not None:
        with suppress(Exception):
            env.close()
    kill_marked(mark)
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)  # taking the interpreter down would only take time


def _answer_requests(pipe: connection.Connection, slot: np.ndarray, env: PixelEnv) -> None:
    """Do what is asked until the pipe ends."""
    asked, lost = 0, 0
    result: Any = None
    while True:
        answer = Answer(result, None, env.repeatable, env.lost_episodes - lost, env.episode_metrics(), env.step_lost)
        lost = env.lost_episodes
        if not _tell(pipe, (asked, answer)):
            return
        try:
            asked, name, arguments = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        result = getattr(env, name)(*arguments)
        if name == "draw_episode":
            result, frame = result
            env.check_frame(frame, "simulator_reset")
        elif name == "simulator_step":
            frame, *result = env.checked_step(result)
        if name in WITH_FRAME:
            slot[:] = frame.transpose(2, 0, 1)


def _tell(pipe: connection.Connection, message: tuple[int, Answer | _Raised]) -> bool:
    """Whether the trainer's end is still there."""
    try:
        pipe.send_bytes(pickle.dumps(message))
    except OSError:
        return False
    return True


def _ignore(number: int, frame: Any) -> None:
    pass


def _end_with_parent(mark: str) -> None:
    """The trainer's death ends the pipe, and with it the loop above; a hanging one does not see it."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "started by multiprocessing"
    connection.wait([parent.sentinel])
    time.sleep(SHORT_END_SECONDS)
    kill_marked(mark)
    _kill_group(os.getpid())
