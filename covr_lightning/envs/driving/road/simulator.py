"""The built-in road: a driving scenario that needs no server, simulated here and drawn by MuJoCo."""

from __future__ import annotations

import math

import numpy as np

from covr_lightning.envs.driving.road import bodies
from covr_lightning.envs.driving.road.bodies import CAR, PEDESTRIAN, VAN, Body
from covr_lightning.envs.driving.road.scene import RoadScene
from covr_lightning.envs.driving.road.track import Pose, Track
from covr_lightning.envs.driving.road.traffic import (
    Pedestrian,
    Vehicle,
    advance_vehicles,
    draw_pedestrians,
    draw_vehicles,
    pedestrian_velocity,
)
from covr_lightning.envs.driving.scenario import Scenario
from covr_lightning.envs.driving.simulator import DrivingSimulator, RoadView, Tick

#: A car closer than this to the driven car's start is left out, metres.
START_CLEARANCE = 8.0


class RoadSimulator(DrivingSimulator):
    """One scenario on the built-in road. Deterministic from its seed.

    Args:
        scenario: What happens on the road.
        seed: Of starts, traffic, pedestrians, paints and scenery.
    """

    repeatable = True

    def __init__(self, scenario: Scenario, seed: int) -> None:
        super().__init__(scenario, seed)
        self.track = Track(scenario.road)
        self.scene = RoadScene(scenario, seed)
        self.vehicles: list[Vehicle] = []
        self.pedestrians: list[Pedestrian] = []
        self.ego, self.speed = Pose(0, 0, 0), 0.0

    def reset(self) -> None:
        """Draw a start, traffic, pedestrians and scenery."""
        start = self.scenario.ego
        s = float(self.rng.uniform(*start.s))
        d = self.scenario.lane_middle(int(self.rng.choice(start.lanes)))
        self.ego, self.speed = self.track.pose(s, d), 0.0
        near = CAR.length + START_CLEARANCE
        self.vehicles = [
            v for v in draw_vehicles(self.scenario, self.rng) if v.wanted == 0 or v.d != d or abs(v.s - s) > near
        ]
        self.pedestrians = draw_pedestrians(self.scenario, self.rng)
        self.scene.reset(self.rng, s)

    def tick(self, steer: float, throttle: float) -> Tick:
        """Move everybody; a driven car that runs into somebody loses the speed at which it does, and stays outside.

        So in front of somebody it stops or takes their speed, and along somebody's side it drives on. The others'
        motion is their own.
        """
        dt = self.scenario.tick_seconds
        before = self.ego
        pose, speed = bodies.drive(self.ego, self.speed, steer, throttle, dt)
        s, d = self.track.project(pose.x, pose.y)
        along = speed * math.cos(pose.heading - self.track.heading(s))
        advance_vehicles(self.vehicles, (s, d, along), self.scenario, dt)
        for pedestrian in self.pedestrians:
            pedestrian.advance(s, along, dt)

        ahead = math.cos(pose.heading), math.sin(pose.heading)
        collision = 0.0
        for other, body in self._others():
            touch = bodies.contact(Body(pose, CAR, (speed * ahead[0], speed * ahead[1])), body)
            if touch is not None:
                (x, y), depth, approach = touch
                collision += bodies.impulse(CAR, body.kind, approach)
                pose = Pose(pose.x + depth * x, pose.y + depth * y, pose.heading)
                speed = max(0.0, min(speed, speed + approach * (x * ahead[0] + y * ahead[1])))
                if isinstance(other, Pedestrian):
                    other.hit = True
        crossed = self._crossed_markings(before, pose)
        self.ego, self.speed = pose, speed
        s, d = self.track.project(pose.x, pose.y)
        low, high = self.track.bounds
        return Tick(
            speed=speed * math.cos(pose.heading - self.track.heading(s)),
            velocity=speed,
            collision=collision,
            lane_invasions=crossed,
            off_road=not low <= d <= high,
            end_of_road=s >= self.track.length,
        )

    def _others(self) -> list[tuple[Vehicle | Pedestrian, Body]]:
        """Everybody but the driven car, and their bodies."""
        others: list[tuple[Vehicle | Pedestrian, Body]] = []
        for v in self.vehicles:
            heading = self.track.heading(v.s)
            velocity = (v.speed * math.cos(heading), v.speed * math.sin(heading))
            others.append((v, Body(v.pose(self.track), v.kind, velocity)))
        for p in self.pedestrians:
            others.append((p, Body(p.pose(self.track), PEDESTRIAN, pedestrian_velocity(p, self.track))))
        return others

    def _crossed_markings(self, before: Pose, after: Pose) -> int:
        """How often a corner of the driven car passed over a marking, as CARLA's LaneInvasionSensor reports them."""
        crossed = 0
        for a, b in zip(bodies.corners(before, CAR), bodies.corners(after, CAR), strict=True):
            d0, d1 = self.track.project(*a)[1], self.track.project(*b)[1]
            crossed += sum(min(d0, d1) < m <= max(d0, d1) for m in self.track.markings)
        return crossed

    def frame(self) -> np.ndarray:
        """The front camera's picture."""
        vehicles = [("van" if v.kind is VAN else "car", v.pose(self.track)) for v in self.vehicles]
        return self.scene.render(self.ego, vehicles, [p.pose(self.track) for p in self.pedestrians])

    def view(self) -> RoadView:
        """Where the driven car is."""
        s, d = self.track.project(self.ego.x, self.ego.y)
        width = self.scenario.road.lane_width
        lane = min(max(1, math.ceil(d / width)), self.scenario.road.lanes)
        gap, gap_speed = math.inf, 0.0
        for other, body in self._others():
            other_s, other_d = self.track.project(body.pose.x, body.pose.y)
            free = other_s - s - (CAR.length + body.kind.length) / 2
            in_path = abs(other_d - d) < (CAR.width + body.kind.width) / 2 + 0.3
            if isinstance(other, Pedestrian):
                in_path = in_path or other.walks_towards(d)
            if other_s > s and in_path and free < gap:
                heading = self.track.heading(other_s)
                gap, gap_speed = free, body.velocity[0] * math.cos(heading) + body.velocity[1] * math.sin(heading)
        off = (self.track.heading(s) - self.ego.heading + math.pi) % (2 * math.pi) - math.pi
        return RoadView(
            speed=self.speed,
            lane_offset=d - self.scenario.lane_middle(lane),
            heading_error=off,
            curvature=self.track.curvature(s),
            gap=gap,
            gap_speed=gap_speed,
        )

    def close(self) -> None:
        """Free the renderer."""
        self.scene.close()
