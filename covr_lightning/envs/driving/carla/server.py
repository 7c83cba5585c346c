"""A CARLA server of our own: started from an installation, ended by its process group and by nothing else."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from covr_lightning.envs.driving.carla.client import answers, free_ports_at, import_carla
from covr_lightning.errors import ConfigError

logger = logging.getLogger(__name__)

#: Where the search for free ports begins, past CARLA's own 2000 to 2002.
FIRST_PORT = 2100
#: A server that has not answered by then does not come up; the first start compiles shaders.
START_SECONDS = 180.0
#: How long it may take to end before it is killed.
END_SECONDS = 10.0
SCRIPT = "CarlaUE4.sh"
#: How many triples of ports are looked at.
TRIES = 500

#: A shell that waits for a line. Its other end is closed without one when Python is killed, by whatever signal; then it
#: ends the process group that is its $0, as :meth:`CarlaServer.stop` does.
_WATCH = """
read -r line && exit
kill -TERM "-$0"
for second in 1 2 3 4 5 6 7 8 9 10; do sleep 1; kill -0 "-$0" || exit; done
kill -KILL "-$0"
"""


class CarlaServer:
    """One off-screen CARLA server in a process group of its own.

    It is ended with :meth:`stop`, which also runs when Python exits. Where Python is killed, a shell that watches it
    ends the server within a second or, if the server ignores SIGTERM, ten.

    Args:
        root: Folder of the installation, with ``CarlaUE4.sh`` in it; by default the environment variable
            ``CARLA_ROOT``.
        port: The first of its three ports; by default three free ones are sought, which no other server of this class
            gets on this machine until this process ends.
        arguments: Of its command line, behind those for off-screen rendering and the port.

    Raises:
        ConfigError: There is no ``CarlaUE4.sh``.
    """

    host = "127.0.0.1"

    def __init__(self, root: str | Path | None = None, port: int | None = None, arguments: Sequence[str] = ()) -> None:
        self.script = find_script(root)
        self.arguments = list(arguments)
        self._lock: FileLock | None = None
        if port is None:
            self._lock, port = _own_ports()
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether the process lives. It may hang all the same."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Its process and process-group id."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start it, after ending what is left of an earlier one, and wait until it answers.

        Raises:
            ConfigError: It ended at once, or does not answer.
        """
        self.stop()
        command = [str(self.script), "-RenderOffScreen", "-nosound", f"-carla-rpc-port={self.port}", *self.arguments]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        self._watch = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, str(self._process.pid)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        atexit.register(self.stop)
        try:
            self._wait(" ".join(command))
        except BaseException:
            self.stop()
            raise
        logger.info("CARLA server %d listens on port %d.", self._process.pid, self.port)

    def _wait(self, command: str) -> None:
        carla = import_carla()
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if not self.running:
                assert self._process
                raise ConfigError(
                    f"The CARLA server ended at once with status {self._process.returncode}; to see why, run: {command}"
                )
            if answers(self.host, self.port):
                client = carla.Client(self.host, self.port)
                client.set_timeout(10.0)
                try:
                    client.get_server_version()
                    client.get_world()  # answers only once the town is there
                    return
                except RuntimeError:
                    pass  # it listens, but is still loading
            time.sleep(0.2)
        raise ConfigError(f"The CARLA server does not answer after {START_SECONDS:g} s; to see why, run: {command}")

    def stop(self) -> None:
        """End the server's process group. Safe to call twice."""
        process, self._process = self._process, None
        watch, self._watch = self._watch, None
        atexit.unregister(self.stop)
        if process is None:
            return
        # The script starts the server as its child, so the group may outlive its leader.
        for way in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, way)
            except ProcessLookupError:
                break
            if _ended(process, END_SECONDS):
                break
        process.wait()
        if watch is not None:
            watch.communicate(b"ended\n")


def _own_ports() -> tuple[FileLock, int]:
    """Three free ports, and the lock that keeps them: a server listens only seconds after it is started."""
    for port in range(FIRST_PORT, FIRST_PORT + 3 * TRIES, 3):
        if not free_ports_at(port, 3):
            continue
        lock = FileLock(Path(tempfile.gettempdir()) / f"covr-carla-{port}.lock")
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):  # another process has them, or another user had
            continue
        return lock, port
    raise ConfigError(f"There are no three free ports in a row from {FIRST_PORT} upwards: end what listens there.")


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        process.poll()
        if not group_lives(process.pid):
            return True
        time.sleep(0.1)
    return False


def group_lives(group: int) -> bool:
    """Whether a process group has members that are not zombies, which nobody reaps in many a container."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, number = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has just ended
        if int(number) == group and state != "Z":
            return True
    return False


def find_script(root: str | Path | None = None) -> Path:
    """``CarlaUE4.sh`` of an installation.

    Args:
        root: Folder of the installation; by default the environment variable ``CARLA_ROOT``.

    Raises:
        ConfigError: It is not there.
    """
    folder = root or os.environ.get("CARLA_ROOT")
    if not folder:
        raise ConfigError(
            "To start a CARLA server, say where CARLA is installed: data.env.carla_root, or the environment variable "
            "CARLA_ROOT."
        )
    script = Path(folder).expanduser() / SCRIPT
    if not script.is_file():
        raise ConfigError(f"There is no {SCRIPT} in {folder} (data.env.carla_root, or the variable CARLA_ROOT).")
    return script
