"""The moving traffic's driver: starts the process of :mod:`.autopilot` and talks to it."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from covr_lightning.envs.driving.carla.client import answers, free_port
from covr_lightning.envs.driving.simulator import SimulatorLost
from covr_lightning.errors import ConfigError

#: Default traffic-manager port minus server port: 8000 for a server at 2000, as is CARLA's custom.
PORT_OFFSET = 6000
#: Metres that vehicles keep between each other.
GAP = 2.5
#: Building the manager's own map of a large town may take so long.
START_SECONDS = 60.0


class TrafficDriver:
    """CARLA's traffic manager in another process, which may die with the server.

    Args:
        host: The server.
        port: The server.
        tm_port: Port of the traffic manager; by default the first free one from 6000 above the server's.
        timeout_seconds: Of every call.

    Raises:
        SimulatorLost: It could not be started.
        ConfigError: `tm_port` is taken.
    """

    def __init__(self, host: str, port: int, tm_port: int | None, timeout_seconds: float) -> None:
        self.server = (host, port)
        self.timeout_seconds = timeout_seconds
        self.tm_port = free_port(min(port + PORT_OFFSET, 60000)) if tm_port is None else tm_port
        if tm_port is not None and free_port(tm_port) != tm_port:
            raise ConfigError(f"The traffic manager's port {tm_port} is taken: set data.env.tm_port to a free one.")
        script = Path(__file__).with_name("autopilot.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), host, str(port), str(self.tm_port), str(timeout_seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._unread = b""
        self._asked = 0
        try:
            self._answer(START_SECONDS + timeout_seconds)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def drive(self, speeds: Mapping[int, float], seed: int, lane_changes: bool) -> None:
        """Drive these vehicles.

        Args:
            speeds: Speed (m/s) that each actor likes.
            seed: Of what the manager draws.
            lane_changes: Whether they may change lanes.
        """
        kmh = {str(actor): 3.6 * speed for actor, speed in speeds.items()}
        self._ask({"do": "drive", "seed": seed, "lane_changes": lane_changes, "gap": GAP, "kmh": kmh})

    def tick(self) -> int:
        """Tick the server.

        Returns:
            The frame.
        """
        return int(self._ask({"do": "tick"})["frame"])

    def rest(self) -> None:
        """Let go of all vehicles."""
        self._ask({"do": "rest"})

    def close(self, seconds: float = 1.0) -> None:
        """End the process. Safe to call twice.

        Args:
            seconds: How long it may take to sign off at the server.
        """
        if self._process.stdin and not self._process.stdin.closed:
            with suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        self._asked += 1
        try:
            self._process.stdin.write(json.dumps({"id": self._asked, **request}).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise SimulatorLost("the traffic manager's process has ended") from error
        # It waits for the server itself, so it gets a little longer than one call may take.
        return self._answer(2 * self.timeout_seconds + 1.0)

    def _answer(self, seconds: float) -> dict[str, Any]:
        answer: dict[str, Any] = {"id": -1}
        while answer["id"] != self._asked:  # Ctrl-C may have left an earlier answer unread
            answer = json.loads(self._line(seconds))
        if "error" in answer:
            raise SimulatorLost(f"the traffic manager reports: {answer['error']}")
        return answer

    def _line(self, seconds: float) -> bytes:
        """The next line that the process prints."""
        assert self._process.stdout
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(min(1.0, max(0.0, deadline - time.monotonic()))):
                    if time.monotonic() >= deadline:
                        raise SimulatorLost(f"the traffic manager has not answered for {seconds:g} s")
                    if not answers(*self.server):
                        raise SimulatorLost("the server is gone")
                    continue
                chunk = os.read(self._process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise SimulatorLost("the traffic manager's process has ended")
                self._unread += chunk
        line, self._unread = self._unread.split(b"\n", 1)
        return line
