"""The driven car's motion, and which bodies touch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from covr_lightning.envs.driving.road.track import Pose


@dataclass(frozen=True)
class Kind:
    """A kind of body: a box as seen from above.

    Attributes:
        length: Metres.
        width: Metres.
        mass: Kilograms.
    """

    length: float
    width: float
    mass: float


CAR = Kind(4.6, 1.9, 1800.0)
VAN = Kind(5.6, 2.1, 2500.0)
#: CARLA moves its walkers by hand: a car that hits one meets a wall. So here.
PEDESTRIAN = Kind(0.5, 0.5, math.inf)

#: The driven car: wheelbase and largest angle of the front wheels (m, rad).
WHEELBASE = 2.9
MAX_WHEEL_ANGLE = math.radians(30)
#: Accelerations (m/s²) at full throttle, at full brake, of the coasting engine; drag (1/m).
FULL_THROTTLE = 4.0
FULL_BRAKE = 8.0
ENGINE_BRAKE = 0.6
DRAG = 0.004


def drive(pose: Pose, speed: float, steer: float, throttle: float, dt: float) -> tuple[Pose, float]:
    """One step of the kinematic bicycle model about the rear axle's direction, with drag.

    Args:
        pose: Of the car's middle.
        speed: m/s, never negative: the car has no reverse gear.
        steer: −1 to 1, positive to the right.
        throttle: −1 to 1, positive accelerates, otherwise brakes.
        dt: Seconds.

    Returns:
        The next pose and speed.
    """
    steer, throttle = min(max(steer, -1.0), 1.0), min(max(throttle, -1.0), 1.0)
    push = FULL_THROTTLE * throttle if throttle > 0 else FULL_BRAKE * throttle - ENGINE_BRAKE
    speed = max(0.0, speed + dt * (push - DRAG * speed * speed))
    turn = -speed / WHEELBASE * math.tan(MAX_WHEEL_ANGLE * steer) * dt
    middle = pose.heading + turn / 2
    x, y = pose.x + dt * speed * math.cos(middle), pose.y + dt * speed * math.sin(middle)
    return Pose(x, y, pose.heading + turn), speed


def corners(pose: Pose, kind: Kind) -> list[tuple[float, float]]:
    """The four corners of a body's box in the plane."""
    c, s = math.cos(pose.heading), math.sin(pose.heading)
    half = [(i * kind.length / 2, j * kind.width / 2) for i, j in ((1, 1), (1, -1), (-1, -1), (-1, 1))]
    return [(pose.x + a * c - b * s, pose.y + a * s + b * c) for a, b in half]


def touching(pose: Pose, kind: Kind, other: Pose, other_kind: Kind) -> bool:
    """Whether two oriented boxes overlap (separating axes: no side of either box has the other wholly outside)."""
    reach = math.hypot(kind.length, kind.width) / 2 + math.hypot(other_kind.length, other_kind.width) / 2
    if math.hypot(pose.x - other.x, pose.y - other.y) > reach:
        return False
    mine, theirs = corners(pose, kind), corners(other, other_kind)
    for heading in (pose.heading, pose.heading + math.pi / 2, other.heading, other.heading + math.pi / 2):
        c, s = math.cos(heading), math.sin(heading)
        a = [x * c + y * s for x, y in mine]
        b = [x * c + y * s for x, y in theirs]
        if max(a) < min(b) or max(b) < min(a):
            return False
    return True


def impulse(kind: Kind, velocity: tuple[float, float], other: Kind, other_velocity: tuple[float, float]) -> float:
    """Impulse (N·s) of a perfectly inelastic impact: μ·|Δv| with the reduced mass μ = 1/(1/m₁ + 1/m₂).

    Args:
        kind: One body.
        velocity: Its velocity in the plane, m/s.
        other: The other body.
        other_velocity: Its velocity.
    """
    mu = 1 / (1 / kind.mass + 1 / other.mass)
    return mu * math.hypot(velocity[0] - other_velocity[0], velocity[1] - other_velocity[1])
