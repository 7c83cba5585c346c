"""Reward and ends of episodes by hand arithmetic, and scenarios read from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from covr_lightning.envs.driving.rules import Progress, advance, tick_reward
from covr_lightning.envs.driving.scenario import EpisodeRules, load_scenario, shipped_scenarios
from covr_lightning.envs.driving.simulator import Tick
from covr_lightning.errors import ConfigError


def test_highway_reward_by_hand() -> None:
    # Eq. 7: 8 m/s · 0.05 s − 1e-4 · 2000 N·s − 1 · |−0.1| = 0.4 − 0.2 − 0.1; crossing a marking costs nothing.
    tick = Tick(speed=8.0, velocity=8.0, collision=2000.0, lane_invasions=3)
    assert tick_reward(tick, -0.1, load_scenario("highway").reward, 0.05) == pytest.approx(0.1)


def test_ghost_pedestrian_reward_by_hand() -> None:
    # Eq. 8: 8 · 0.05 − 1e-3 · 2000 − 1e-2 · 3 − 0.1 · 0.5 = 0.4 − 2 − 0.03 − 0.05.
    tick = Tick(speed=8.0, velocity=8.0, collision=2000.0, lane_invasions=3)
    assert tick_reward(tick, 0.5, load_scenario("ghost_pedestrian").reward, 0.05) == pytest.approx(-1.68)


def run(ticks: list[Tick], rules: EpisodeRules) -> Progress:
    progress = Progress()
    for tick in ticks:
        progress = advance(progress, tick, rules)
        if progress.ended:
            break
    return progress


MOVING, HIT, STUCK = Tick(5, 5), Tick(0, 1, collision=10.0), Tick(0, 0.01)


@pytest.mark.parametrize(
    ("ticks", "ended", "env_steps", "terminated"),
    [
        ([MOVING] * 2000, "time", 1000, False),
        # 19 colliding ticks in a row are forgiven if the next one is free, the 20th is not.
        ([HIT] * 19 + [MOVING] + [HIT] * 19 + [MOVING] * 2000, "time", 1000, False),
        ([MOVING] * 7 + [HIT] * 30, "collision", 27, True),
        # Speed is looked at every 100 ticks: standing at the 99th does not matter.
        ([STUCK] * 99 + [MOVING] * 2000, "time", 1000, False),
        ([STUCK] * 300, "stuck", 100, True),
        ([MOVING] * 150 + [STUCK] * 300, "stuck", 200, True),
        ([MOVING, Tick(5, 5, off_road=True)], "off_road", 2, True),
        ([MOVING, Tick(5, 5, end_of_road=True)], "end_of_road", 2, False),
    ],
)
def test_ends(ticks: list[Tick], ended: str, env_steps: int, terminated: bool) -> None:
    progress = run(ticks, EpisodeRules())
    assert (progress.ended, progress.env_steps) == (ended, env_steps)
    assert (progress.terminated, progress.truncated) == (terminated, not terminated)


@pytest.mark.parametrize("speed", [0.0, -5.0])  # across the road, and back along it
def test_a_car_that_moves_is_not_stuck_whatever_its_direction(speed: float) -> None:
    progress = run([Tick(speed, 5.0)] * 1000, EpisodeRules())
    assert (progress.ended, progress.env_steps) == ("time", 1000)


def test_every_shipped_scenario_loads() -> None:
    assert set(shipped_scenarios()) == {"highway", "highway_a", "highway_b", "ghost_pedestrian"}
    for name in shipped_scenarios():
        scenario = load_scenario(name)
        assert scenario.name == name
        camera = scenario.camera
        assert (camera.size, camera.fov, camera.gamma, camera.iso, camera.motion_blur) == (128, 60, 2.2, 100, 0.45)
        assert (camera.exposure_min_bright, camera.exposure_max_bright) == (10, 12)
        assert (scenario.rules.max_env_steps, scenario.tick_seconds) == (1000, 0.05)
    highway, a, b = (load_scenario(name) for name in ("highway", "highway_a", "highway_b"))
    assert highway.task == a.task == b.task == "highway"
    assert (highway.raining, a.raining, b.raining) == (False, False, True)
    assert (highway.traffic.vehicles, a.traffic.vehicles) == ((10, 10), (0, 5))
    assert a.ego.s != highway.ego.s
    assert len(load_scenario("ghost_pedestrian").crossings) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\n", "cannot be used"),
        ("speed: 3\n", "speed"),
        ("name: [", "cannot be used"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_scenario(str(path))
    assert "mine.yaml" in str(error.value)


def test_wrong_lane_and_start_are_named(tmp_path: Path) -> None:
    good = shipped_scenarios()["highway"].read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(good.replace("ego: {s: [100, 110], lanes: [1, 2, 3, 4]}", "ego: {s: [100, 110], lanes: [5]}"))
    with pytest.raises(ConfigError, match="lane 5, but its road has lanes 1 to 4"):
        load_scenario(str(path))
    path.write_text(good.replace("ego: {s: [100, 110]", "ego: {s: [9000, 9100]"))
    with pytest.raises(ConfigError, match=r"its road is 1635\.4 m long"):
        load_scenario(str(path))
    with pytest.raises(ConfigError, match="ghost_pedestrian, highway"):
        load_scenario("motorway")


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("traffic", "vehicles"), [10, 5], r"traffic\.vehicles: \[10, 5\]; it must be a range"),
        (("traffic", "speed"), [-1.0, 5.0], r"traffic\.speed: \[-1, 5\]; it must be a range from 0"),
        (("crossings", 0, "speed"), [3.0, 1.0], r"crossings\.0\.speed: \[3, 1\]"),
        (("crossings", 1, "s"), 9000.0, r"crossings at s = 9000, but its road is 700 m long"),
        (("parked", 0, "s"), -1.0, r"parked at s = -1, but its road is 700 m long"),
        (("rules", "stuck_check_env_steps"), 0, r"rules\.stuck_check_env_steps: 0; it must be at least 1"),
        (("camera", "size"), 0, r"camera\.size: 0; it must be at least 1"),
        (("tick_seconds",), 0.0, r"tick_seconds: 0; it must be above 0"),
        (("tick_seconds",), float("nan"), r"tick_seconds: nan; it must be above 0"),
        (("ego", "lanes"), [], r"ego\.lanes: \[\]; it must name a lane"),
        (("camera", "fov"), 200.0, r"camera\.fov: 200; it must lie between 0 and 180"),
        (("road", "lane_width"), -3.0, r"road\.lane_width: -3; it must be above 0"),
        (("road", "shoulder"), -1.0, r"road\.shoulder: -1; it must be 0 or more"),
        (("road", "opposite_lanes"), -1, r"road\.opposite_lanes: -1; it must be 0 or more"),
        (("road", "surroundings"), "desert", r"cannot be used"),
        (("road", "segments"), [[100.0]], r"cannot be used"),
        (("road", "segments"), [[1200.0, 0.01]], r"1200 m and curvature 0\.01; .* 120° at most: divide it"),
    ],
)
def test_a_scenario_that_would_fail_later_is_refused(
    keys: tuple[str | int, ...], value: Any, message: str, tmp_path: Path
) -> None:
    content = yaml.safe_load(shipped_scenarios()["ghost_pedestrian"].read_text())
    below: Any = content
    for key in keys[:-1]:
        below = below[key] if not isinstance(below, dict) else below.setdefault(key, {})
    below[keys[-1]] = value
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=rf"The scenario .*mine\.yaml .*{message}"):
        load_scenario(str(path))
