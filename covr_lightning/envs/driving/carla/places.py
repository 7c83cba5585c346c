"""Whether a place is on the road, by CARLA's map."""

from __future__ import annotations

from typing import Any

#: What counts as road, the most likely first; sidewalks, medians and grass do not.
ROAD_LANES = ("Driving", "Shoulder", "Bidirectional", "Parking", "Stop", "Entry", "Exit", "OnRamp", "OffRamp")
#: A place this far outside a lane is in it: the map's curves are polygons, and neighbours leave gaps of centimetres.
TOLERANCE = 0.1
#: A place further than this along a lane from its nearest waypoint lies beyond its end, metres.
BEYOND = 3.0


def on_road(carla: Any, carla_map: Any, location: Any) -> bool:
    """Whether a place lies on a lane that belongs to the road.

    Not `get_waypoint` with ``project_to_road=False``: that looks at the lane whose middle is nearest alone. On Town01's
    road 12, whose shoulders are 0.3 m wide, it finds nothing in the outer 0.9 m of each driving lane, and on the bends
    of Town04's road 45 nothing within 2 cm of the line between two lanes (CARLA 0.9.16).

    Args:
        carla: The client's module.
        carla_map: The map.
        location: The place.
    """
    for name in ROAD_LANES:
        lane = carla_map.get_waypoint(location, project_to_road=True, lane_type=getattr(carla.LaneType, name))
        if lane is None:
            continue
        frame = lane.transform
        right, forward = frame.get_right_vector(), frame.get_forward_vector()
        x, y = location.x - frame.location.x, location.y - frame.location.y
        aside, along = x * right.x + y * right.y, x * forward.x + y * forward.y
        if abs(aside) <= lane.lane_width / 2 + TOLERANCE and abs(along) <= BEYOND:
            return True
    return False
