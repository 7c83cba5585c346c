"""A scenario's road as OpenDRIVE text, the form in which a CARLA server hands its map to the client."""

from __future__ import annotations

from covr_lightning.envs.driving.road.track import Track
from covr_lightning.envs.driving.scenario import Scenario

HEADER = (
    '<header revMajor="1" revMinor="4" name="loopback" version="1.0" north="0" south="0" east="0" west="0" '
    'date="2026-01-01T00:00:00"><geoReference><![CDATA[+proj=tmerc +lat_0=0 +lon_0=0 +k=1 +x_0=0 +y_0=0 +datum=WGS84]]>'
    "</geoReference></header>"
)


def opendrive(scenario: Scenario) -> str:
    """Write the road: its reference line, lanes to its right and left, shoulders and sidewalks.

    OpenDRIVE is right-handed, as `Track` is; the client flips y.
    """
    track = Track(scenario.road)
    road = scenario.carla.road_id
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<OpenDRIVE>{HEADER}'
        f'<road name="road {road}" length="{track.length:.6f}" id="{road}" junction="-1"><link/>'
        f'<type s="0" type="town"><speed max="90" unit="km/h"/></type>'
        f"<planView>{_geometries(track)}</planView>"
        '<elevationProfile><elevation s="0" a="0" b="0" c="0" d="0"/></elevationProfile><lateralProfile/>'
        '<lanes><laneOffset s="0" a="0" b="0" c="0" d="0"/><laneSection s="0">'
        f"{_lanes(scenario)}</laneSection></lanes></road></OpenDRIVE>\n"
    )


def _geometries(track: Track) -> str:
    parts, s = [], 0.0
    for length, curvature in track.shape.segments:
        x, y, heading = track.pose(s, 0.0)
        shape = f'<arc curvature="{curvature:.8f}"/>' if curvature else "<line/>"
        place = f's="{s:.6f}" x="{x:.6f}" y="{y:.6f}" hdg="{heading:.8f}" length="{length:.6f}"'
        parts.append(f"<geometry {place}>{shape}</geometry>")
        s += length
    return "".join(parts)


def _lanes(scenario: Scenario) -> str:
    shape = scenario.road
    right = (
        ["driving"] * shape.lanes + (["shoulder"] if shape.shoulder else []) + (["sidewalk"] if shape.sidewalk else [])
    )
    left = ["driving"] * shape.opposite_lanes + right[shape.lanes :]
    widths = {"driving": shape.lane_width, "shoulder": shape.shoulder, "sidewalk": shape.sidewalk}
    middle = "broken" if shape.opposite_lanes else "solid"
    return (
        "<left>"
        + "".join(_lane(i, left, widths) for i in range(len(left), 0, -1))
        + f'</left><center><lane id="0" type="none" level="false"><link/>{_mark(middle)}</lane></center><right>'
        + "".join(_lane(-i, right, widths) for i in range(1, len(right) + 1))
        + "</right>"
    )


def _lane(number: int, kinds: list[str], widths: dict[str, float]) -> str:
    kind, beyond = kinds[abs(number) - 1], kinds[abs(number) :]
    between = "broken" if "driving" in beyond else "solid"
    mark = between if kind == "driving" else "none"
    return (
        f'<lane id="{number}" type="{kind}" level="false"><link/>'
        f'<width sOffset="0" a="{widths[kind]:.6f}" b="0" c="0" d="0"/>{_mark(mark)}</lane>'
    )


def _mark(kind: str) -> str:
    change = "both" if kind == "broken" else "none"
    return (
        f'<roadMark sOffset="0" type="{kind}" weight="standard" material="standard" color="white" width="0.15" '
        f'laneChange="{change}"/>'
    )
