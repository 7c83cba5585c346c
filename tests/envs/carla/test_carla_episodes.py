"""Episodes on a loopback server, driven by the real client."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from covr_lightning.envs.driving.road.track import Track
from covr_lightning.envs.driving.scenario import load_scenario
from tests.envs.carla.processes import MIXED, NOTHING, Loopback, call


@pytest.fixture(scope="module")
def episode(server: Loopback):
    return call("episode", port=server.port)


def test_every_picture_belongs_to_its_tick(episode):
    """The server sends images later than it answers the tick; one that was not waited for would be an older one."""
    assert episode["lags"] == 0
    assert episode["same"] == 0


def test_markings_and_collisions_are_counted(episode):
    assert episode["metrics"]["lane_invasions"] >= 2
    # One hit of the van: a mass of 1800 · 2500 / 4300 = 1047 kg at some 6 to 10 m/s.
    assert 5e3 < episode["metrics"]["collision"] < 2e5
    hit = next(i for i, impulse in enumerate(episode["impulses"]) if impulse > 0)
    assert hit > 60, "the van stands 48 m ahead"
    assert episode["rewards"][hit] < episode["rewards"][hit - 1]


def test_pushing_on_ends_the_episode(episode):
    """20 ticks in a row with a collision."""
    hit = next(i for i, impulse in enumerate(episode["impulses"]) if impulse > 0)
    assert min(episode["terminated"]) >= hit + 19


def test_traffic_drives_at_its_speed(episode):
    assert all(metres > 20 for metres in episode["traffic_metres"])
    for speed, liked in zip(episode["traffic_speeds"], episode["liked_speeds"], strict=True):
        assert speed == pytest.approx(liked, abs=1.5)


def test_pedestrian_walks_when_the_car_comes_and_stops_on_the_other_side(episode):
    assert episode["walker_metres"] == pytest.approx(4.0, abs=0.2)


def test_view_has_the_right_signs(episode):
    # It begins with a turn to the right: the car points to the right of the lane, then is to the right of its middle.
    assert max(episode["heading_errors"][:30]) > 0.05
    assert max(episode["offsets"][:40]) > 0.1
    # The van's middle is 70 - 21 = 49 m ahead, less half of both lengths (2.3 and 2.8 m).
    assert episode["gaps"][0] == pytest.approx(44.0, abs=1.5)


def test_camera_has_the_scenarios_attributes(episode):
    camera = {
        "image_size_x": "128", "image_size_y": "128", "fov": "60.0", "gamma": "2.2", "iso": "100.0",
        "exposure_min_bright": "10.0", "exposure_max_bright": "12.0", "motion_blur_intensity": "0.45",
        "exposure_mode": "histogram",
    }  # fmt: skip
    assert camera.items() <= episode["camera"].items()
    assert episode["pixels"] == [9, 128, 128]


def test_closing_leaves_nothing(episode):
    assert episode["left"] == NOTHING


def test_fifty_resets_leave_no_actor_behind(server: Loopback):
    result = call("resets", port=server.port, count=50)
    # The van, the car and its three sensors, three vehicles, a pedestrian.
    assert result["counts"] == [9] * 50
    assert result["left"] == NOTHING


def test_the_same_seed_draws_the_same_start(server: Loopback):
    one, two, other = call("starts", port=server.port, seeds=[5, 5, 6])
    assert one == two
    assert one[0] != one[1]
    assert other[0] != one[0]


def test_what_a_tick_says_of_the_cars_place(server: Loopback):
    # Lanes 1 to 3 lie at y = 0 to 10.5, the shoulders beside them to -5 and 12, the sidewalks to -7 and 14.
    places = {
        "lane 3": [20, 8.75],
        "oncoming": [40, -1.75],
        "shoulder": [60, 11.2],
        "sidewalk": [80, 13.0],
        "grass": [85, 20.0],
    }
    found = call("reports", port=server.port, places=places)
    for name, tick in found.items():
        assert tick["off_road"] == (name in ("sidewalk", "grass")), name
        assert not tick["end_of_road"]
        # The car points along the road, and so the oncoming lane does not make its speed negative.
        assert tick["speed"] == pytest.approx(tick["velocity"], abs=0.05), name
        assert tick["speed"] > 1.5
    assert found["lane 3"]["lane_offset"] == pytest.approx(0.0, abs=0.05)
    assert found["oncoming"]["heading_error"] == pytest.approx(0.0, abs=0.02)
    assert found["shoulder"]["lane_offset"] == pytest.approx(11.2 - 8.75, abs=0.05)


def test_the_end_of_the_road(server: Loopback):
    x, y, _ = call("road_map", port=server.port)["places"]["end"]
    assert call("reports", port=server.port, places={"end": [x, y]})["end"]["end_of_road"]


def test_a_pedestrian_walks_on_time_and_counts_once_when_hit(carla_loopback: Callable[..., Loopback]):
    result = call("hits_a_walker", port=carla_loopback("ghost_pedestrian").port)
    assert result["walked"] > 1.5
    assert result["walked"] == pytest.approx(result["planned"], abs=1.0), "though CARLA's walkers begin slowly"
    assert result["after"] < 0.2
    assert result["hits"] == 1
    assert result["drives_on"]
    assert result["others"] == [False, False], "they wait for the car"


def test_red_and_blue_are_not_swapped(carla_loopback: Callable[..., Loopback]):
    picture = call("road_picture", port=carla_loopback("highway", 0, "--picture", "road").port, scenario="highway")
    red, _, blue = picture["sky"]
    assert blue > red + 5
    assert picture["moved"] > 2


def test_the_client_reads_the_road(server: Loopback):
    result = call("road_map", port=server.port)
    scenario = load_scenario(MIXED)
    track = Track(scenario.road)
    result["places"].pop("end")
    for place, (x, y, yaw) in result["places"].items():
        s, lane = float(place.split()[0]), int(place.split()[1])
        # Lane −k has its middle at d = (k − ½) · 3.5; the oncoming lane 1 at −1.75, pointing back.
        d = (abs(lane) - 0.5) * 3.5 * (1 if lane < 0 else -1)
        pose = track.pose(s, d)
        assert [x, -y] == pytest.approx([pose.x, pose.y], abs=0.01)
        turn = -np.radians(yaw) - pose.heading - (0 if lane < 0 else np.pi)
        assert np.cos(turn) == pytest.approx(1.0, abs=1e-4)
    assert result["marks"] == ["Broken", "Broken", "Solid"]
    assert result["kinds"] == [None, "Sidewalk", "Shoulder", "Driving", "Driving", "Shoulder", "Sidewalk", None]
    assert result["beyond"] == 0
