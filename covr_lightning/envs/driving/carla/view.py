"""Where the driven car is, worked out from waypoints and the others' places."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from covr_lightning.envs.driving.simulator import RoadView

#: The lane ahead is followed this far, in steps of this length, metres.
REACH, STEP = 80.0, 2.0
#: A body counts as in the way if the car would pass it closer than this, metres.
MARGIN = 0.3


def look(carla_map: Any, ego: Any, others: Iterable[Any], oncoming: Callable[[Any], bool]) -> RoadView:
    """What a scripted driver sees.

    Args:
        carla_map: The map.
        ego: The driven car.
        others: Actors; only vehicles and walkers count.
        oncoming: Whether a waypoint's lane leads the wrong way.
    """
    place, velocity = ego.get_transform(), ego.get_velocity()
    waypoint = carla_map.get_waypoint(place.location)
    path = _path(waypoint, oncoming(waypoint))
    offset = float((_xy(place.location) - path[0, :2]) @ _right(path[0, 2]))
    gap, gap_speed = _nearest(path, offset, ego, others)
    return RoadView(
        speed=math.hypot(velocity.x, velocity.y),
        lane_offset=offset,
        heading_error=_wrapped(math.radians(place.rotation.yaw) - path[0, 2]),
        curvature=-_wrapped(path[1, 2] - path[0, 2]) / STEP if len(path) > 1 else 0.0,
        gap=gap,
        gap_speed=gap_speed,
    )


def _path(waypoint: Any, oncoming: bool) -> np.ndarray:
    """(n, 3) x, y and yaw (radians, to the right) along the lane, in the driven car's direction of the road."""
    points = []
    for _ in range(int(REACH / STEP) + 1):
        frame = waypoint.transform
        yaw = math.radians(frame.rotation.yaw) + (math.pi if oncoming else 0.0)
        points.append((frame.location.x, frame.location.y, yaw))
        following = waypoint.previous(STEP) if oncoming else waypoint.next(STEP)
        if not following:
            break
        waypoint = following[0]
    return np.array(points)


def _nearest(path: np.ndarray, offset: float, ego: Any, others: Iterable[Any]) -> tuple[float, float]:
    """Free metres to the nearest body in the way (or walker who comes into it), and its speed along the road."""
    best = (math.inf, 0.0)
    own = ego.bounding_box.extent
    for other in others:
        if other.id == ego.id or not other.type_id.startswith(("vehicle.", "walker.")):
            continue
        place, box = other.get_transform(), other.bounding_box.extent
        point = _xy(place.location)
        i = int(np.argmin(((path[:, :2] - point) ** 2).sum(1)))
        forward = np.array([math.cos(path[i, 2]), math.sin(path[i, 2])])
        along = i * STEP + float((point - path[i, :2]) @ forward)
        aside = float((point - path[i, :2]) @ _right(path[i, 2])) - offset
        free = along - own.x - box.x
        velocity = _xy(other.get_velocity())
        comes = other.type_id.startswith("walker.") and aside * float(velocity @ _right(path[i, 2])) < 0
        in_way = comes or abs(aside) < own.y + box.y + MARGIN
        if in_way and 0 < along <= REACH and free < best[0]:
            best = (free, float(velocity @ forward))
    return best


def _xy(vector: Any) -> np.ndarray:
    return np.array([vector.x, vector.y])


def _right(yaw: float) -> np.ndarray:
    return np.array([-math.sin(yaw), math.cos(yaw)])


def _wrapped(angle: float) -> float:
    return float((angle + math.pi) % (2 * math.pi) - math.pi)
