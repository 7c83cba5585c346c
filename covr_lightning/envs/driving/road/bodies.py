"""The driven car's motion, and which bodies touch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from covr_lightning.envs.driving.road.track import Pose

#: m/s below which bodies do not count as coming together.
_STANDING = 1e-9


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


class Body(NamedTuple):
    """Place, box and velocity (m/s in the plane) of somebody on the road."""

    pose: Pose
    kind: Kind
    velocity: tuple[float, float]


CAR = Kind(4.6, 1.9, 1800.0)
VAN = Kind(5.6, 2.1, 2500.0)
#: A car that hits a pedestrian meets a wall.
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


class Contact(NamedTuple):
    """Where two overlapping boxes met.

    Attributes:
        normal: Unit vector from the other body to this one, across the sides that met.
        depth: How far they overlap along it, metres.
        approach: Speed at which they come together along it, m/s; 0 if they do not.
    """

    normal: tuple[float, float]
    depth: float
    approach: float


def contact(body: Body, other: Body) -> Contact | None:
    """Whether, and across which sides, two oriented boxes touch; None if they do not.

    They overlap if no side of either box has the other wholly outside (separating axes). Of these axes the one along
    which the boxes came to overlap last, at their present velocities, is that of the sides that met; boxes that do not
    come together have that of the least overlap.
    """
    (pose, kind, velocity), (other_pose, other_kind, other_velocity) = body, other
    reach = math.hypot(kind.length, kind.width) / 2 + math.hypot(other_kind.length, other_kind.width) / 2
    dx, dy = pose.x - other_pose.x, pose.y - other_pose.y
    if math.hypot(dx, dy) > reach:
        return None
    mine, theirs = corners(pose, kind), corners(other_pose, other_kind)
    found: list[tuple[float, float, Contact]] = []
    for heading in (pose.heading, pose.heading + math.pi / 2, other_pose.heading, other_pose.heading + math.pi / 2):
        c, s = math.cos(heading), math.sin(heading)
        if dx * c + dy * s < 0:
            c, s = -c, -s
        a, b = ([x * c + y * s for x, y in box] for box in (mine, theirs))
        depth = max(b) - min(a)
        if depth < 0:
            return None
        approach = (other_velocity[0] - velocity[0]) * c + (other_velocity[1] - velocity[1]) * s
        since = depth / approach if approach > _STANDING else math.inf
        found.append((since, depth, Contact((c, s), depth, max(0.0, approach))))
    return min(found, key=lambda one: one[:2])[2]


def impulse(kind: Kind, other: Kind, approach: float) -> float:
    """Impulse (N·s) of a perfectly inelastic, frictionless impact: μ·Δv with the reduced mass μ = 1/(1/m₁ + 1/m₂).

    Args:
        kind: One body.
        other: The other body.
        approach: Δv, the speed at which they come together across the sides that met, m/s.
    """
    return approach / (1 / kind.mass + 1 / other.mass)
