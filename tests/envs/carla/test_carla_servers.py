"""Servers of our own, several servers, one shared server."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from covr_lightning import processes
from covr_lightning.envs.driving.carla import Carla, CarlaServer
from covr_lightning.envs.driving.carla.server import group_lives
from covr_lightning.errors import ConfigError
from tests.envs.carla.processes import MIXED, NOTHING, Client, Loopback, call, fake_installation

Start = Callable[..., Loopback]


def test_two_environments_on_two_ports(carla_loopback: Start):
    ports = [carla_loopback(MIXED).port, carla_loopback(MIXED).port]
    result = call("two_ports", ports=ports)
    assert result["used"] == ports
    assert "2 servers" in result["error"]
    assert result["reused"] == ports[1]
    assert result["distance"] > 0
    one, two = zip(*result["frames"], strict=True)
    # The first is stepped 30 times, the second every third time: neither ticks the other.
    assert one[-1] - one[0] == 29
    assert two[-1] - two[0] == 9


def test_one_server_shared_by_two_environments(carla_loopback: Start):
    result = call("shared", port=carla_loopback(MIXED).port)
    assert result["cut"]["truncated"]
    assert not result["cut"]["terminated"]
    for name in ("first", "other", "again", "still"):
        assert not result[name]["done"], name
    assert result["count"] == 9, "only one of the two has actors"
    assert result["left"] == NOTHING


def test_a_town_is_loaded_while_the_server_waits_for_ticks(carla_loopback: Start):
    """A state that arrives while the client's library loads a town kills the process now and then."""
    result = call("loads_a_town", tries=1, port=carla_loopback(MIXED).port)
    assert result["loads"] == [[True, True]]
    assert result["map"].endswith("Town05")
    assert result["substeps"] == 7, "settings are put back, also past a load"


def test_a_server_ends_only_its_own_processes(tmp_path: Path):
    result = call("own_servers", root=str(fake_installation(tmp_path, MIXED)))
    assert abs(result["ports"][0] - result["ports"][1]) >= 3
    assert result["alive"] == [False, True]
    assert result["reachable"]
    assert result["after"] == [False, False]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_leaves_no_server(tmp_path: Path, signum: signal.Signals):
    client = Client("keeps_a_server", root=str(fake_installation(tmp_path, MIXED)))
    group = client.line()
    assert group_lives(group)
    client.process.send_signal(signum)
    assert client.process.wait(10) == -signum
    deadline = time.monotonic() + 15
    while group_lives(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not group_lives(group)


def test_a_folder_without_carla_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"no CarlaUE4\.sh in"):
        CarlaServer(tmp_path)
    monkeypatch.setenv("CARLA_ROOT", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no CarlaUE4\.sh in"):
        CarlaServer()
    monkeypatch.delenv("CARLA_ROOT")
    with pytest.raises(ConfigError, match="CARLA_ROOT"):
        CarlaServer()


def test_a_server_that_ends_at_once_is_refused(tmp_path: Path):
    script = tmp_path / "CarlaUE4.sh"
    script.write_text("#!/bin/sh\nexit 3\n")
    script.chmod(0o755)
    with pytest.raises(ConfigError, match="status 3"):
        CarlaServer(tmp_path).start()


def test_the_command_line_of_a_server(tmp_path: Path):
    script = tmp_path / "CarlaUE4.sh"
    script.write_text('#!/bin/sh\necho "$@" > "$(dirname "$0")/said"\nexit 3\n')
    script.chmod(0o755)
    with pytest.raises(ConfigError, match=r"status 3; to see why, run: .*-carla-rpc-port=2345 -quality-level=Low"):
        CarlaServer(tmp_path, 2345, ["-quality-level=Low"]).start()
    assert (tmp_path / "said").read_text() == "-RenderOffScreen -nosound -carla-rpc-port=2345 -quality-level=Low\n"


def test_servers_take_graphics_adapters_in_turn():
    low = ["-quality-level=Low"]
    factory = Carla("highway", carla_root="/opt/carla", graphics_adapters=[2, 0], server_arguments=low)
    placed = [factory.placed(number, 4, False) for number in (0, 1, 2, 3, None)]
    said = [one.arguments_of_server() for one in placed]
    assert said == [[f"-graphicsadapter={n}", *low] for n in (2, 0, 2, 0, 2)]
    assert Carla("highway", carla_root="/opt/carla").placed(1, 4, False).arguments_of_server() == []
    with pytest.raises(ConfigError, match=r"data\.env\.graphics_adapters is \[1\], which is for servers that the run"):
        Carla("highway", graphics_adapters=[1])


def test_servers_that_start_together_have_ports_of_their_own(tmp_path: Path):
    root = fake_installation(tmp_path, MIXED)
    ports = [CarlaServer(root).port for _ in range(3)]  # the locks of the first go with it
    kept = [CarlaServer(root) for _ in range(3)]
    assert len({server.port for server in kept}) == 3
    code = f"from covr_lightning.envs.driving.carla import CarlaServer; print(CarlaServer({str(root)!r}).port)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) not in {server.port for server in kept}
    assert all(port % 3 == ports[0] % 3 for port in ports), "triples do not overlap"


def ports_of(
    monkeypatch: pytest.MonkeyPatch, port: int | list[int], envs: int, together: bool, count: int
) -> list[Any]:
    """Ports of a run's environments: those that collect, then each process's for evaluation."""
    factory = Carla("highway", port=port)
    monkeypatch.setattr(processes, "count", lambda: count)
    ports = [factory.placed(number, envs, together).port for number in range(envs)]
    for rank in range(count):
        monkeypatch.setattr(processes, "number", lambda rank=rank: rank)
        ports.append(factory.placed(None, envs, together).port)
    return ports


@pytest.mark.parametrize(
    ("port", "envs", "together", "count", "ports"),
    [
        (1, 1, True, 1, [1, 1]),
        ([1, 2], 1, True, 1, [1, 2]),
        ([1, 2], 1, False, 1, [1, 2]),
        ([1, 2, 3, 4], 2, True, 2, [1, 2, 3, 4]),
        ([1, 2, 3, 4, 5], 4, False, 1, [1, 2, 3, 4, 5]),
        ([1, 2, 3, 4, 5], 1, True, 1, [1, 5]),
    ],
)
def test_every_environment_of_a_run_has_its_server(
    monkeypatch: pytest.MonkeyPatch, port: Any, envs: int, together: bool, count: int, ports: list[int]
):
    assert ports_of(monkeypatch, port, envs, together, count) == ports


@pytest.mark.parametrize(
    ("port", "envs", "together", "count", "sentence"),
    [
        (1, 2, True, 1, "one server, but 2 environments collect: give a list of 3 ports, the last for evaluation"),
        (1, 1, False, 1, "one server, but 1 environment collects in processes of their own: give a list of 2 ports"),
        (1, 2, True, 2, "one server, but 2 environments collect: give a list of 4 ports, the last 2 for evaluation"),
        ([1], 1, True, 1, r"1 servers \(1\), but 1 environment collects and 1 evaluates: give a list of 2 ports"),
        ([1, 2, 3], 2, False, 2, "3 servers .* 2 environments collect and 2 evaluate: give a list of 4 ports"),
    ],
)
def test_too_few_servers(
    monkeypatch: pytest.MonkeyPatch, port: Any, envs: int, together: bool, count: int, sentence: str
):
    with pytest.raises(ConfigError, match=sentence):
        ports_of(monkeypatch, port, envs, together, count)


def test_an_evaluation_alone_needs_no_more_than_its_server(monkeypatch: pytest.MonkeyPatch):
    assert Carla("highway", port=[7]).placed(None, 8, False).port == 7
    assert Carla("highway", port=7).placed(None, 8, False).port == 7


@pytest.mark.parametrize("settings", [{"carla_root": "/x", "tm_port": 8000}, {"port": [1, 2], "tm_port": 8000}])
def test_settings_that_exclude_each_other(settings: dict):
    with pytest.raises(ConfigError, match="tm_port"):
        Carla("highway", **settings)
