"""What the real client's map says of places on the scenarios' roads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from covr_lightning.envs.driving.carla.client import import_carla
from covr_lightning.envs.driving.carla.places import on_road
from covr_lightning.envs.driving.road.track import Track
from covr_lightning.envs.driving.scenario import load_scenario
from tests.envs.carla.loopback.opendrive import opendrive


@pytest.mark.parametrize("name", ["highway", "ghost_pedestrian"])
def test_all_of_the_road_is_on_it_and_nothing_beside_it(name: str) -> None:
    scenario, carla = load_scenario(name), import_carla()
    track, carla_map = Track(scenario.road), carla.Map(name, opendrive(scenario))
    (low, high), rng = track.bounds, np.random.default_rng(0)

    def lies_on_road(s: float, d: float) -> bool:
        pose = track.pose(s, d)
        return on_road(carla, carla_map, carla.Location(pose.x, -pose.y, 0.2))  # CARLA's y is to the right

    def places(count: int) -> Any:
        return rng.uniform(5, track.length - 5, count)

    for s in places(1000):
        assert lies_on_road(s, rng.uniform(low, high))
    for line in track.markings:
        assert all(lies_on_road(s, line + aside) for s in places(50) for aside in (-0.02, 0.0, 0.02))
    for d in (low - 0.2, low - 1, high + 0.2, high + 1, high + 8):
        assert not any(lies_on_road(s, d) for s in places(20))
    assert not lies_on_road(track.length + 5, (low + high) / 2)
