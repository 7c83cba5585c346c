"""Loopback servers for the tests of CARLA's client side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3]))

# The client is an optional dependency, and MessagePack one of developers.
if any(find_spec(name) is None for name in ("carla", "msgpack")):
    collect_ignore_glob = ["test_*.py"]

from tests.envs.carla.processes import MIXED, Loopback


@pytest.fixture
def carla_loopback() -> Iterator[Callable[..., Loopback]]:
    """Starts loopback servers: ``carla_loopback("highway", 0, "--picture", "road").port``."""
    servers: list[Loopback] = []

    def start(scenario: str = "highway", port: int = 0, *options: str) -> Loopback:
        servers.append(Loopback(scenario, port, *options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[Loopback]:
    """A loopback server of the mixed scenario, whose images come 5 ms after the tick's answer."""
    process = Loopback(MIXED, 0, "--lag-seconds", "0.005")
    yield process
    process.stop()
