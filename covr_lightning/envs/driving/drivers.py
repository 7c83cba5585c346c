"""Scripted drivers: points of reference for what a policy reaches."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from covr_lightning.envs.driving.simulator import RoadView


class Driver(Protocol):
    """Chooses [steer, throttle] from where the car is."""

    def action(self, view: RoadView) -> tuple[float, float]:
        """Steer and throttle, both in [−1, 1]."""
        ...


class LaneKeepingDriver:
    """Keeps to the middle of its lane and its distance to whatever is ahead in it. It never overtakes.

    Steering: a proportional law on offset and heading, plus the wheel angle that the road's curvature takes. Speed: as
    fast as it likes, but never faster than it can brake within the free road ahead.

    Args:
        speed: m/s that it likes.
        wheelbase: Of the driven car, metres.
        max_wheel_angle: The front wheels' angle at steer 1, radians.
    """

    def __init__(self, speed: float = 8.0, wheelbase: float = 2.9, max_wheel_angle: float = math.radians(30)) -> None:
        self.speed = speed
        self.wheelbase = wheelbase
        self.max_wheel_angle = max_wheel_angle

    def action(self, view: RoadView) -> tuple[float, float]:
        """Steer and throttle.

        Args:
            view: Where the car is.
        """
        pace = max(view.speed, 3.0)
        angle = -math.atan(view.curvature * self.wheelbase) - 0.8 * view.heading_error
        angle -= math.atan(0.4 * view.lane_offset / pace)
        steer = min(max(angle / self.max_wheel_angle, -1.0), 1.0)
        room = max(0.0, view.gap - 3.0)
        safe = view.gap_speed + math.sqrt(2 * 4.0 * room) if math.isfinite(room) else math.inf
        wanted = min(self.speed, safe)
        throttle = 0.5 * (wanted - view.speed) + (0.1 if wanted > 1 else 0.0)
        if wanted < view.speed - 2:
            throttle = -1.0
        return steer, min(max(throttle, -1.0), 1.0)


class RandomDriver:
    """Uniform actions, as an agent takes in its warm-up.

    Args:
        seed: Seed.
    """

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)

    def action(self, view: RoadView) -> tuple[float, float]:
        """Steer and throttle, each uniform in [−1, 1]."""
        steer, throttle = self._rng.uniform(-1, 1, 2)
        return float(steer), float(throttle)
