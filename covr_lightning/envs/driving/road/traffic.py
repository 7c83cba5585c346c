"""Everybody else on the road: cars that keep their distance, and pedestrians who cross."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from covr_lightning.envs.driving.road.bodies import CAR, VAN, Kind
from covr_lightning.envs.driving.road.track import Pose, Track
from covr_lightning.envs.driving.scenario import Crossing, Scenario

#: Intelligent Driver Model (Treiber et al., 2000): acceleration and comfortable braking (m/s²), time gap (s), least gap
#: (m).
IDM_ACCELERATION, IDM_BRAKING, IDM_TIME_GAP, IDM_LEAST_GAP = 1.5, 2.5, 1.2, 2.0
#: Hardest braking, m/s².
HARDEST_BRAKING = 8.0
#: Sideways speed of a lane change, m/s.
LANE_CHANGE_SPEED = 1.2


@dataclass
class Vehicle:
    """A car or van on the road.

    Attributes:
        s: Metres along the road.
        d: Metres right of the reference line.
        speed: m/s along the road.
        wanted: Speed it likes, m/s; 0 for a parked one.
        kind: Its box.
        goal_d: Where a lane change leads.
    """

    s: float
    d: float
    speed: float
    wanted: float
    kind: Kind
    goal_d: float

    def pose(self, track: Track) -> Pose:
        """Its place in the plane; a car that changes lanes points a little to the side."""
        x, y, heading = track.pose(self.s, self.d)
        aside = 0.0 if self.speed < 0.1 else math.atan2(LANE_CHANGE_SPEED, max(self.speed, 3.0))
        return Pose(x, y, heading - aside * float(np.sign(self.goal_d - self.d)))


@dataclass
class Pedestrian:
    """Somebody who waits and then crosses.

    Attributes:
        crossing: The scenario's entry.
        d: Metres right of the reference line.
        trigger_seconds: The driven car's time to arrival at which they start.
        speed: While walking, m/s.
        walking: Whether they walk now.
        hit: Whether a car ran into them; they stay there.
    """

    crossing: Crossing
    d: float
    trigger_seconds: float
    speed: float
    walking: bool = False
    hit: bool = False

    def pose(self, track: Track) -> Pose:
        """Their place in the plane, facing the way they cross."""
        x, y, heading = track.pose(self.crossing.s, self.d)
        return Pose(x, y, heading + math.copysign(math.pi / 2, self.crossing.start_d - self.crossing.end_d))

    def walks_towards(self, d: float) -> bool:
        """Whether their way leads across the line d."""
        return self.walking and min(self.d, self.crossing.end_d) < d < max(self.d, self.crossing.end_d)

    def advance(self, ego_s: float, ego_speed: float, dt: float) -> None:
        """Start when the driven car is near, walk, stop on the other side."""
        ahead = self.crossing.s - ego_s
        near = max(self.crossing.trigger_metres, self.trigger_seconds * ego_speed)
        if not self.hit and 0 < ahead <= near and self.d == self.crossing.start_d:
            self.walking = True
        self.walking = self.walking and not self.hit
        if self.walking:
            way = self.crossing.end_d - self.d
            step = min(abs(way), self.speed * dt)
            self.d += math.copysign(step, way)
            self.walking = abs(way) > step


def draw_vehicles(scenario: Scenario, rng: np.random.Generator) -> list[Vehicle]:
    """The scenario's traffic at random places (with `min_gap` between two in a lane), then its parked vehicles."""
    t = scenario.traffic
    count = int(rng.integers(t.vehicles[0], t.vehicles[1] + 1))
    vehicles: list[Vehicle] = []
    for _ in range(50 * count):
        if len(vehicles) == count:
            break
        s, d = float(rng.uniform(*t.s)), scenario.lane_middle(int(rng.choice(t.lanes)))
        wanted = float(rng.uniform(*t.speed))
        if all(v.d != d or abs(v.s - s) > t.min_gap + CAR.length for v in vehicles):
            vehicles.append(Vehicle(s, d, wanted, wanted, CAR, d))
    for parked in scenario.parked:
        vehicles.append(Vehicle(parked.s, parked.d, 0.0, 0.0, kind_of(parked.vehicle), parked.d))
    return vehicles


def kind_of(blueprint: str) -> Kind:
    """The box of a CARLA blueprint's name."""
    return VAN if any(word in blueprint for word in ("van", "sprinter", "truck", "t2", "ambulance")) else CAR


def draw_pedestrians(scenario: Scenario, rng: np.random.Generator) -> list[Pedestrian]:
    """The scenario's pedestrians, with drawn trigger distances and speeds."""
    return [
        Pedestrian(c, c.start_d, float(rng.uniform(*c.trigger_seconds)), float(rng.uniform(*c.speed)))
        for c in scenario.crossings
    ]


def advance_vehicles(
    vehicles: Sequence[Vehicle], ego: tuple[float, float, float], scenario: Scenario, dt: float
) -> None:
    """Let every moving vehicle follow the one in front of it by the Intelligent Driver Model.

    Args:
        vehicles: All vehicles; changed in place.
        ego: The driven car's (s, d, speed along the road); the others keep their distance to it as well.
        scenario: For the lanes and whether vehicles may change them.
        dt: Seconds.
    """
    everybody = [(v.s, v.d, v.goal_d, v.speed, v.kind.length) for v in vehicles]
    everybody.append((ego[0], ego[1], ego[1], ego[2], CAR.length))
    for vehicle in vehicles:
        if vehicle.wanted == 0:
            continue
        gap, lead_speed = _lead(vehicle, vehicle.d, everybody)
        if vehicle.goal_d != vehicle.d:
            other = _lead(vehicle, vehicle.goal_d, everybody)
            gap, lead_speed = min((gap, lead_speed), other)
        elif scenario.traffic.lane_changes and gap < 2 * vehicle.speed and lead_speed < vehicle.wanted - 1:
            vehicle.goal_d = _free_lane(vehicle, everybody, scenario)
        vehicle.speed = max(0.0, vehicle.speed + dt * _idm(vehicle, gap, lead_speed))
        vehicle.s += dt * vehicle.speed
        way = vehicle.goal_d - vehicle.d
        if abs(way) <= LANE_CHANGE_SPEED * dt:
            vehicle.d = vehicle.goal_d
        else:
            vehicle.d += math.copysign(LANE_CHANGE_SPEED * dt, way)


Somebody = tuple[float, float, float, float, float]


def _lead(vehicle: Vehicle, d: float, everybody: Sequence[Somebody]) -> tuple[float, float]:
    """Gap (bumper to bumper, metres) to the next body ahead on the strip around d, and its speed."""
    best = (math.inf, vehicle.wanted)
    for s, other_d, other_goal, speed, length in everybody:
        gap = s - vehicle.s - (length + vehicle.kind.length) / 2
        beside = min(abs(other_d - d), abs(other_goal - d)) < vehicle.kind.width + 0.2
        if s > vehicle.s and beside and gap < best[0]:
            best = (gap, speed)
    return best


def _idm(vehicle: Vehicle, gap: float, lead_speed: float) -> float:
    """Acceleration a·(1 − (v/v₀)⁴ − (g*/g)²), g* = g₀ + max(0, vT + v·Δv/(2√(ab))), m/s²."""
    v = vehicle.speed
    free = 1 - (v / vehicle.wanted) ** 4
    if math.isinf(gap):
        return IDM_ACCELERATION * free
    closing = v * (v - lead_speed) / (2 * math.sqrt(IDM_ACCELERATION * IDM_BRAKING))
    wanted_gap = IDM_LEAST_GAP + max(0.0, v * IDM_TIME_GAP + closing)
    return max(-HARDEST_BRAKING, IDM_ACCELERATION * (free - (wanted_gap / max(gap, 0.1)) ** 2))


def _free_lane(vehicle: Vehicle, everybody: Sequence[Somebody], scenario: Scenario) -> float:
    """The d of a neighbouring lane that is free 15 m back and 25 m ahead; the vehicle's own if there is none."""
    for d in (vehicle.d - scenario.road.lane_width, vehicle.d + scenario.road.lane_width):
        if not scenario.lane_middle(1) - 0.1 <= d <= scenario.lane_middle(scenario.road.lanes) + 0.1:
            continue
        near = [s - vehicle.s for s, d2, goal, _, _ in everybody if min(abs(d2 - d), abs(goal - d)) < 2.0]
        if all(ahead < -15 or ahead > 25 for ahead in near):
            return d
    return vehicle.d


def pedestrian_velocity(pedestrian: Pedestrian, track: Track) -> tuple[float, float]:
    """Velocity of a pedestrian in the plane, m/s."""
    if not pedestrian.walking:
        return 0.0, 0.0
    heading = pedestrian.pose(track).heading
    return pedestrian.speed * math.cos(heading), pedestrian.speed * math.sin(heading)
