"""The road's course: straights and arcs, from places along the road to the plane and back.

Coordinates are right-handed: x forward and y left at the road's beginning, headings in radians counter-clockwise. Along
the road a place is (s, d): metres along the reference line, metres to the right of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from covr_lightning.envs.driving.scenario import RoadShape


class Pose(NamedTuple):
    """A place in the plane: metres, metres, radians counter-clockwise from x."""

    x: float
    y: float
    heading: float


@dataclass(frozen=True)
class _Segment:
    """An arc (or a straight) that begins at `start`, `s` metres along the road."""

    s: float
    length: float
    curvature: float
    start: Pose

    def centre(self, along: float) -> Pose:
        x, y, h = self.start
        if self.curvature == 0:
            return Pose(x + along * math.cos(h), y + along * math.sin(h), h)
        end = h + self.curvature * along
        return Pose(
            x + (math.sin(end) - math.sin(h)) / self.curvature, y - (math.cos(end) - math.cos(h)) / self.curvature, end
        )

    def project(self, x: float, y: float) -> tuple[float, float]:
        """(metres along this segment without bounds, metres right of it)."""
        x0, y0, h = self.start
        dx, dy = x - x0, y - y0
        if self.curvature == 0:
            return dx * math.cos(h) + dy * math.sin(h), dx * math.sin(h) - dy * math.cos(h)
        k = self.curvature
        # From the circle's middle, which lies 1/k to the left.
        rx, ry = dx + math.sin(h) / k, dy - math.cos(h) / k
        angle = math.atan2(ry * math.copysign(1, k), rx * math.copysign(1, k)) - (h - math.pi / 2)
        turned = (angle + math.pi) % (2 * math.pi) - math.pi
        return turned / k, (math.hypot(rx, ry) - abs(1 / k)) * math.copysign(1, k)


class Track:
    """The course of a road.

    Args:
        shape: Its geometry; the first segment begins at (0, 0) and points along x.
    """

    def __init__(self, shape: RoadShape) -> None:
        self.shape = shape
        self._segments: list[_Segment] = []
        s, pose = 0.0, Pose(0.0, 0.0, 0.0)
        for length, curvature in shape.segments:
            segment = _Segment(s, length, curvature, pose)
            self._segments.append(segment)
            s, pose = s + length, segment.centre(length)
        self.length = s
        paved = shape.opposite_lanes * shape.lane_width + shape.shoulder
        #: d between which a car is on the road, shoulders included.
        self.bounds = (-paved, shape.lanes * shape.lane_width + shape.shoulder)
        #: d of every lane marking, from left to right.
        self.markings = [k * shape.lane_width for k in range(-shape.opposite_lanes, shape.lanes + 1)]

    def _at(self, s: float) -> _Segment:
        for segment in self._segments:
            if s < segment.s + segment.length:
                return segment
        return self._segments[-1]

    def pose(self, s: float, d: float) -> Pose:
        """The place (s, d) in the plane, heading along the road. Straight on beyond either end of the road."""
        segment = self._at(s)
        along = s - segment.s
        inside = min(max(along, 0.0), segment.length)
        x, y, h = segment.centre(inside)
        beyond = along - inside
        return Pose(x + beyond * math.cos(h) + d * math.sin(h), y + beyond * math.sin(h) - d * math.cos(h), h)

    def heading(self, s: float) -> float:
        """Direction of the road at s, radians."""
        return self.pose(s, 0.0).heading

    def curvature(self, s: float) -> float:
        """Curvature of the road at s, 1/m; positive bends left."""
        return self._at(s).curvature

    def project(self, x: float, y: float) -> tuple[float, float]:
        """The place (s, d) of a point: its nearest point on the reference line, and metres to the right of that."""
        best = (0.0, math.inf)
        for i, segment in enumerate(self._segments):
            along, d = segment.project(x, y)
            before = i == 0 and along < 0
            after = i == len(self._segments) - 1 and along > segment.length
            if (-1e-6 <= along <= segment.length + 1e-6 or before or after) and abs(d) < abs(best[1]):
                best = (segment.s + along, d)
        return best
