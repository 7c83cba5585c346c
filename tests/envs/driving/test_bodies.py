"""The driven car's motion and contacts, by hand and against a naive version."""

from __future__ import annotations

import math

import numpy as np
import pytest

from covr_lightning.envs.driving.road import bodies
from covr_lightning.envs.driving.road.bodies import CAR, PEDESTRIAN, VAN, Body, Kind, contact, corners, drive, impulse
from covr_lightning.envs.driving.road.track import Pose


def test_full_throttle_from_rest_by_hand() -> None:
    # One tick: v = 4 · 0.05 = 0.2, x = 0.2 · 0.05 = 0.01.
    pose, speed = drive(Pose(0, 0, 0), 0.0, 0.0, 1.0, 0.05)
    assert speed == pytest.approx(0.2)
    assert pose == pytest.approx((0.01, 0.0, 0.0))


def test_brakes_to_a_stop_and_not_beyond() -> None:
    pose, speed = Pose(0, 0, 0), 8.0
    for ticks in range(1, 100):  # noqa: B007
        pose, speed = drive(pose, speed, 0.0, -1.0, 0.05)
        if speed == 0:
            break
    # 8 m/s at about 8.6 to 8.9 m/s² stop within 8/8.6 = 0.93 s = 19 ticks and 8²/(2·8.6) = 3.7 m.
    assert ticks <= 19
    assert pose.x < 3.8
    assert drive(pose, 0.0, 0.0, -1.0, 0.05) == (pose, 0.0)


def test_zero_throttle_slows_by_engine_and_drag() -> None:
    # 8 − 0.05 · (0.6 + 0.004 · 8²) = 7.9572
    assert drive(Pose(0, 0, 0), 8.0, 0.0, 0.0, 0.05)[1] == pytest.approx(7.9572)


def test_positive_steer_turns_right_with_the_bicycle_models_radius() -> None:
    # R = L / tan δ; with steer ½ δ = 15°, R = 2.9 / tan 15° = 10.82 m. A quarter circle to the right.
    pose, speed, radius = Pose(0, 0, 0), 5.0, bodies.WHEELBASE / math.tan(math.radians(15))
    hold = bodies.DRAG * 25 / bodies.FULL_THROTTLE
    while pose.heading > -math.pi / 2:
        pose, speed = drive(pose, speed, 0.5, hold, 0.002)
    assert (pose.x, pose.y) == pytest.approx((radius, -radius), abs=0.05)


def test_a_tick_goes_along_the_chord_of_its_arc() -> None:
    # At 5 m/s for 0.05 s about R = 2.9 / tan 15° = 10.82 m: the car turns by 0.25 / R = 0.0231 to the right, and goes
    # 0.25 m into the direction of half of that.
    turn = 0.25 * math.tan(math.radians(15)) / 2.9
    pose, _ = drive(Pose(0, 0, 0), 5.0, 0.5, bodies.DRAG * 25 / bodies.FULL_THROTTLE, 0.05)
    assert pose == pytest.approx((0.25 * math.cos(turn / 2), -0.25 * math.sin(turn / 2), -turn))


def test_actions_beyond_the_bounds_are_clipped() -> None:
    assert drive(Pose(0, 0, 0), 5.0, 3.0, 9.0, 0.05) == drive(Pose(0, 0, 0), 5.0, 1.0, 1.0, 0.05)


def inside(x: float, y: float, pose: Pose, kind: Kind) -> bool:
    dx, dy = x - pose.x, y - pose.y
    c, s = math.cos(pose.heading), math.sin(pose.heading)
    return abs(dx * c + dy * s) <= kind.length / 2 and abs(dy * c - dx * s) <= kind.width / 2


def naive_touching(a: Pose, kind_a: Kind, b: Pose, kind_b: Kind) -> bool:
    """A fine grid of points of one box, any of them inside the other."""
    c, s = math.cos(a.heading), math.sin(a.heading)
    for u in np.linspace(-kind_a.length / 2, kind_a.length / 2, 60):
        for v in np.linspace(-kind_a.width / 2, kind_a.width / 2, 30):
            if inside(a.x + u * c - v * s, a.y + u * s + v * c, b, kind_b):
                return True
    return False


def touching(a: Pose, kind_a: Kind, b: Pose, kind_b: Kind) -> bool:
    return contact(Body(a, kind_a, (0.0, 0.0)), Body(b, kind_b, (0.0, 0.0))) is not None


def test_touching_equals_a_search_over_points() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        other = (CAR, VAN, PEDESTRIAN)[rng.integers(3)]
        a, b = Pose(0, 0, rng.uniform(-3, 3)), Pose(rng.uniform(-6, 6), rng.uniform(-4, 4), rng.uniform(-3, 3))
        exact = touching(a, CAR, b, other)
        hits += exact
        assert exact == touching(b, other, a, CAR)
        # A corner may touch between two points of the grid: then a box larger by a grid step finds it.
        grown = Kind(CAR.length + 0.2, CAR.width + 0.2, CAR.mass)
        if naive_touching(a, CAR, b, other):
            assert exact
        if exact:
            assert naive_touching(a, grown, b, other)
    assert 50 < hits < 250


def test_corners_by_hand() -> None:
    kind = Kind(4.0, 2.0, 1.0)
    assert np.allclose(corners(Pose(1, 1, math.pi / 2), kind), [(0, 3), (2, 3), (2, -1), (0, -1)])


def test_impulse_grows_with_the_speed_at_which_bodies_meet() -> None:
    # μ of two cars of 1800 kg is 900 kg; 900 · 6 = 5400 N·s.
    assert impulse(CAR, CAR, 6.0) == pytest.approx(5400)
    assert impulse(CAR, CAR, 0.0) == 0.0
    # A pedestrian does not give way: μ is the car's mass.
    assert impulse(CAR, PEDESTRIAN, 5.0) == pytest.approx(1800 * 5)


@pytest.mark.parametrize(
    ("car", "other", "normal", "depth", "approach"),
    [
        # From behind into a car that stands: half a metre inside, though it is only 0.4 m inside sideways.
        ((10.0, 0.0), (4.1, 1.5, CAR, (0.0, 0.0)), (-1.0, 0.0), 0.5, 10.0),
        # Side by side at the same speed: whichever way is out soonest, and no impact.
        ((10.0, 0.0), (1.0, 1.85, CAR, (10.0, 0.0)), (0.0, -1.0), 0.05, 0.0),
        # The other one drifts into this one's side.
        ((10.0, 0.0), (1.0, 1.85, CAR, (10.0, -0.5)), (0.0, -1.0), 0.05, 0.5),
        # A pedestrian walks into its flank, behind its middle, from the left.
        ((8.0, 0.0), (-1.33, 1.15, PEDESTRIAN, (0.0, -1.3)), (0.0, -1.0), 0.05, 1.3),
        # A pedestrian before its bonnet, walking the same way across.
        ((8.0, 0.0), (2.35, 0.9, PEDESTRIAN, (0.0, -1.3)), (-1.0, 0.0), 0.2, 8.0),
        # Hit from behind.
        ((5.0, 0.0), (-4.5, 0.0, CAR, (8.0, 0.0)), (1.0, 0.0), 0.1, 3.0),
    ],
)
def test_the_sides_that_met(
    car: tuple[float, float],
    other: tuple[float, float, Kind, tuple[float, float]],
    normal: tuple[float, float],
    depth: float,
    approach: float,
) -> None:
    x, y, kind, velocity = other
    met = contact(Body(Pose(0, 0, 0), CAR, car), Body(Pose(x, y, 0), kind, velocity))
    assert met is not None
    assert met.normal == pytest.approx(normal)
    assert (met.depth, met.approach) == pytest.approx((depth, approach))
