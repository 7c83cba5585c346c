"""Starts loopback servers and client processes; usable from any test: ``from tests.envs.carla.processes import …``.

The real client aborts its process when a message has a wrong layout, so clients run in processes of their own.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[3]
MIXED = str(Path(__file__).with_name("mixed.yaml"))


#: What an observer sees on a server that was left as it was found.
NOTHING = {"actors": [], "synchronous": False}


def environment() -> dict[str, str]:
    """Environment of the processes: one thread, and the repository's root to import from."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class Loopback:
    """A loopback server in a process of its own.

    Args:
        scenario: Name or path.
        port: Its port; any free one for 0.
        options: Further options of ``python -m tests.envs.carla.loopback``, e.g. ``"--picture", "road"``.
    """

    def __init__(self, scenario: str = "highway", port: int = 0, *options: str) -> None:
        command = [sys.executable, "-m", "tests.envs.carla.loopback", "--scenario", scenario, "--port", str(port)]
        self.process = subprocess.Popen(
            [*command, *options], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        word, number = self.process.stdout.readline().split()
        assert word == "ready"
        self.port = int(number)

    def stop(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


@contextmanager
def loopback(scenario: str = "highway", port: int = 0, *options: str) -> Iterator[Loopback]:
    """A loopback server for a while."""
    server = Loopback(scenario, port, *options)
    try:
        yield server
    finally:
        server.stop()


def fake_installation(folder: Path, scenario: str) -> Path:
    """A folder that looks like CARLA's: its ``CarlaUE4.sh`` starts the loopback server."""
    script = folder / "CarlaUE4.sh"
    script.write_text(
        "#!/bin/sh\n"
        'for word in "$@"; do case "$word" in -carla-rpc-port=*) port="${word#*=}";; esac; done\n'
        f"cd '{ROOT}'\n"
        f"'{sys.executable}' -m tests.envs.carla.loopback --scenario '{scenario}' --port \"$port\"\n"
    )
    script.chmod(0o755)
    return folder


class Client:
    """A function of :mod:`tests.envs.carla.clients` in a process of its own.

    Args:
        name: The function.
        arguments: Its keyword arguments.
    """

    def __init__(self, name: str, **arguments: Any) -> None:
        self.log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.envs.carla.clients", name, json.dumps(arguments)],
            cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
        )  # fmt: skip

    def line(self) -> Any:
        """The next thing it says."""
        assert self.process.stdout
        text = self.process.stdout.readline()
        assert text, self.errors()
        return json.loads(text)

    def tell(self) -> None:
        """Let it go on."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def errors(self) -> str:
        """What it wrote to its standard error."""
        self.process.wait(60)
        self.log.seek(0)
        return self.log.read()

    def result(self, timeout: float = 120) -> Any:
        """What the function returns; its process has to end well."""
        out, _ = self.process.communicate(timeout=timeout)
        assert self.process.returncode == 0, f"status {self.process.returncode}\n{out}\n{self.errors()}"
        return json.loads(out.splitlines()[-1])


def call(name: str, timeout: float = 120, tries: int = 2, **arguments: Any) -> Any:
    """Run a function of :mod:`tests.envs.carla.clients` in a process of its own and return what it returns.

    The process is forked from one that has imported everything already, which saves seconds each time.

    CARLA's client aborts or crashes its process now and then for reasons of its own (one of several hundred such
    calls, on a busy machine): that is reported as a warning, and tried again. An exception is never tried again.
    """
    while True:
        tries -= 1
        result, status, log = _call_once(name, timeout, arguments)
        if tries and result is None and status in (-signal.SIGABRT, -signal.SIGSEGV):
            warnings.warn(f"CARLA's client crashed in {name}, status {status}:\n{log}", stacklevel=2)
            continue
        assert result is not None, f"status {status}\n{log}"
        assert status == 0, f"status {status}\n{log}"
        return result[0]


def _call_once(name: str, timeout: float, arguments: dict[str, Any]) -> tuple[list[Any] | None, int | None, str]:
    """What the function returned, in a list; how its process ended; what it wrote to its standard error."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.envs.carla.clients"])
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r") as log:
        process = context.Process(target=_run, args=(name, arguments, theirs, log.name))
        process.start()
        theirs.close()
        try:
            result = ours.recv() if ours.poll(timeout) else None
        except EOFError:
            result = None
        process.join(10)
        process.kill()
        return result, process.exitcode, log.read()


def _run(name: str, arguments: dict[str, Any], answer: Connection, log: str) -> None:
    from tests.envs.carla import clients

    with open(log, "w") as file:
        os.dup2(file.fileno(), 2)
    faulthandler.enable()  # the client's library aborts the process when it meets what it does not expect
    answer.send([getattr(clients, name)(**arguments)])


def watch(port: int) -> dict[str, Any]:
    """Who and what another client sees on a server; see :mod:`tests.envs.carla.observer`."""
    command = [sys.executable, "-m", "tests.envs.carla.observer", str(port)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=True)
    return dict(json.loads(done.stdout))
