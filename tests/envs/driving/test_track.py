"""The road's course against a slow integration of its curvature."""

from __future__ import annotations

import math

import numpy as np
import pytest

from covr_lightning.envs.driving.road.track import Track
from covr_lightning.envs.driving.scenario import RoadShape, load_scenario

SHAPE = RoadShape(lanes=3, lane_width=3.5, segments=[[100, 0.0], [150, 0.01], [80, -0.02], [50, 0.0]], shoulder=1.0)


def naive(shape: RoadShape, s: float, step: float = 0.001) -> tuple[float, float, float]:
    """Walk along the road in millimetres."""
    x = y = h = done = 0.0
    for length, curvature in shape.segments:
        for _ in range(round(min(length, max(0.0, s - done)) / step)):
            x, y, h = x + step * math.cos(h), y + step * math.sin(h), h + step * curvature
        done += length
    return x, y, h


@pytest.mark.parametrize("s", [0.0, 40.0, 100.0, 180.0, 250.0, 300.0, 379.0])
def test_pose_is_the_integral_of_the_curvature(s: float) -> None:
    assert Track(SHAPE).pose(s, 0.0) == pytest.approx(naive(SHAPE, s), abs=2e-3)


def test_d_is_to_the_right() -> None:
    # At the beginning the road points along x, so right is −y.
    assert Track(SHAPE).pose(10.0, 2.0) == pytest.approx((10.0, -2.0, 0.0))


def test_projection_undoes_the_pose() -> None:
    rng = np.random.default_rng(0)
    for shape in (SHAPE, load_scenario("highway").road, load_scenario("ghost_pedestrian").road):
        track = Track(shape)
        for _ in range(300):
            s, d = float(rng.uniform(0, track.length)), float(rng.uniform(-12, 25))
            x, y, _ = track.pose(s, d)
            assert track.project(x, y) == pytest.approx((s, d), abs=1e-6)


def test_before_and_after_the_road_it_goes_straight_on() -> None:
    track = Track(SHAPE)
    assert track.length == 380.0
    for s in (-20.0, 395.0):
        assert track.project(*track.pose(s, 1.5)[:2]) == pytest.approx((s, 1.5), abs=1e-9)


def test_bounds_and_markings() -> None:
    assert Track(SHAPE).bounds == (-1.0, 11.5)
    assert Track(SHAPE).markings == [0.0, 3.5, 7.0, 10.5]
    street = Track(load_scenario("ghost_pedestrian").road)
    assert street.bounds == pytest.approx((-4.3, 4.3))
    assert street.markings == [-4.0, 0.0, 4.0]


def test_curvature() -> None:
    track = Track(SHAPE)
    assert [track.curvature(s) for s in (50, 100, 240, 260, 1000)] == [0.0, 0.01, 0.01, -0.02, 0.0]
