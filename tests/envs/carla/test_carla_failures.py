"""Servers that die, hang, are missing, or do not fit; clients that are interrupted or killed."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from covr_lightning.envs.driving.carla import Carla, connection
from covr_lightning.envs.driving.carla.client import weather
from covr_lightning.errors import ConfigError
from tests.envs.carla.processes import MIXED, NOTHING, Client, Loopback, call, fake_installation, watch

Start = Callable[..., Loopback]


def test_a_server_of_ours_killed_five_times_is_restarted(tmp_path: Path):
    result = call("killed", root=str(fake_installation(tmp_path, MIXED)), times=5)
    assert result["lost"] == 5
    for cut in result["cuts"]:
        assert cut["truncated"]
        assert not cut["terminated"]
    assert min(result["driven"]) > 0
    assert not result["after"]["done"]
    assert not result["alive"]


def test_a_server_of_ours_that_hangs_is_restarted(tmp_path: Path):
    result = call("frozen", root=str(fake_installation(tmp_path, MIXED)))
    assert result["cut"]["truncated"]
    assert not result["after"]["done"]
    assert result["another"]
    assert not result["alive"]


def test_a_foreign_server_killed_in_mid_episode_is_reconnected_to(carla_loopback: Start):
    server = carla_loopback(MIXED)
    client = Client("outlives", port=server.port)
    assert client.line() == "driving"
    server.stop()
    client.tell()
    assert client.line() == "cut"
    carla_loopback(MIXED, server.port)
    result = client.result()
    assert result["cut"]["truncated"]
    assert not result["cut"]["terminated"]
    assert not result["after"]["done"]


def test_a_hanging_server_cuts_the_episode_after_the_timeout(carla_loopback: Start):
    server = carla_loopback(MIXED)
    result = call("hanging", port=server.port, pid=server.process.pid)
    assert result["cut"]["truncated"]
    assert 1.0 < result["seconds"] < 6.0
    assert not result["after"]["done"]
    assert result["lost"] == 1
    assert result["count"] == 9, "the actors of the episode that was cut are gone"
    assert result["substeps"] == 7, "the server's own settings are put back, not those of before the reconnect"


def test_a_server_that_stays_away_is_one_sentence(carla_loopback: Start):
    server = carla_loopback(MIXED)
    client = Client("gone_for_good", port=server.port)
    client.line()
    server.stop()
    client.tell()
    error = client.result()
    assert f"127.0.0.1:{server.port}" in error
    assert "did not come back in 2 attempts (data.env.reconnects: 1)" in error


def test_no_server_is_one_sentence_within_the_timeout():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    result = call("refused", scenario="ghost_pedestrian", port=port, timeout_seconds=2.0)
    assert result["seconds"] < 3.5
    for part in (f"127.0.0.1:{port}", f"CarlaUE4.sh -RenderOffScreen -carla-rpc-port={port}", "road_gp.yaml"):
        assert part in result["error"]
    assert "\n" not in result["error"]


def test_something_else_on_the_port_is_one_sentence_too():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        result = call("refused", scenario="highway", port=mute.getsockname()[1], timeout_seconds=1.0)
    assert "road_hw.yaml" in result["error"]


def test_ctrl_c_in_mid_episode_cleans_up(carla_loopback: Start):
    server = carla_loopback(MIXED)
    client = Client("drives_on", port=server.port)
    assert client.line() == "driving"
    client.process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in client.errors()
    assert watch(server.port) == NOTHING


def test_a_killed_clients_actors_are_removed_by_the_next(carla_loopback: Start):
    server = carla_loopback(MIXED)
    client = Client("drives_on", port=server.port)
    client.line()
    client.process.kill()
    client.process.wait()
    result = call("one_driver", port=server.port)
    assert result["count"] == 9
    assert not result["after"]["done"]


def test_a_server_that_another_process_drives_on_is_refused(carla_loopback: Start):
    server = carla_loopback(MIXED)
    client = Client("drives_on", port=server.port)
    client.line()
    error = call("refused", scenario=MIXED, port=server.port)["error"]
    assert f"Process {client.process.pid}" in error
    client.line()  # it drives on undisturbed
    client.process.kill()


def test_a_process_of_another_machine_is_known_by_its_ticks(carla_loopback: Start):
    server = carla_loopback(MIXED)
    client = Client("drives_on", port=server.port, machine="elsewhere")
    client.line()
    error = call("refused", scenario=MIXED, port=server.port)["error"]
    assert f"Process {client.process.pid} of another machine" in error
    client.line()  # it drives on undisturbed
    client.process.kill()
    client.process.wait()
    result = call("one_driver", port=server.port)
    assert result["count"] == 9, "those that it left are gone"


def test_a_number_that_another_process_has_now_is_not_the_old_process():
    mine = connection._started(os.getpid())
    assert mine
    assert connection._started(1) != mine
    assert connection._started(2**22 + 1) == ""


def test_a_server_without_the_town_is_refused(carla_loopback: Start):
    error = call("refused", scenario="highway", port=carla_loopback(MIXED).port)["error"]
    assert "no map Town04" in error
    assert "Town05" in error


def test_a_server_of_another_release_is_refused(carla_loopback: Start):
    error = call("refused", scenario=MIXED, port=carla_loopback(MIXED, 0, "--release", "0.9.13").port)["error"]
    assert "pip install carla==0.9.13" in error


def test_unknown_weather_is_refused():
    with pytest.raises(ConfigError, match=r"'Snow'.*CloudyNoon"):
        weather("Snow")


def test_a_missing_client_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "carla", None)
    with pytest.raises(ConfigError, match=r'pip install "covr_lightning\[carla\]"'):
        Carla("highway", port=1).make(0)
