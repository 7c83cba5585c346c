"""What the loopback server can spawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from covr_lightning.envs.driving.road.bodies import CAR, PEDESTRIAN, VAN, Kind

BOOL, INT, FLOAT, STRING, COLOR = range(1, 6)

#: (name, type, recommended values, may be set)
Attribute = tuple[str, int, list[str], bool]

ROLE: Attribute = ("role_name", STRING, ["front"], True)
CAMERA: list[Attribute] = [
    ROLE,
    ("image_size_x", INT, ["800"], True),
    ("image_size_y", INT, ["600"], True),
    ("fov", FLOAT, ["90.0"], True),
    ("sensor_tick", FLOAT, ["0.0"], True),
    ("gamma", FLOAT, ["2.2"], True),
    ("iso", FLOAT, ["100.0"], True),
    ("exposure_mode", STRING, ["histogram", "manual"], True),
    ("exposure_min_bright", FLOAT, ["10.0"], True),
    ("exposure_max_bright", FLOAT, ["12.0"], True),
    ("motion_blur_intensity", FLOAT, ["0.45"], True),
    ("enable_postprocess_effects", BOOL, ["true"], True),
]


def _vehicle(base_type: str = "car", wheels: int = 4) -> list[Attribute]:
    return [
        ("role_name", STRING, ["autopilot", "scenario", "ego_vehicle"], True),
        ("number_of_wheels", INT, [str(wheels)], False),
        ("base_type", STRING, [base_type], False),
        ("generation", INT, ["1"], False),
        ("color", COLOR, ["180,20,20", "20,20,180", "230,230,230"], True),
    ]


@dataclass(frozen=True)
class Blueprint:
    """One kind of actor.

    Attributes:
        name: Its id.
        attributes: Its attributes.
        kind: Its box; none for a sensor.
    """

    name: str
    attributes: list[Attribute]
    kind: Kind | None = None


BLUEPRINTS = [
    Blueprint("vehicle.tesla.model3", _vehicle(), CAR),
    Blueprint("vehicle.audi.a2", _vehicle(), CAR),
    Blueprint("vehicle.mercedes.sprinter", _vehicle("van"), VAN),
    Blueprint("vehicle.yamaha.yzf", _vehicle("motorcycle", 2), CAR),
    Blueprint("walker.pedestrian.0001", [ROLE, ("is_invincible", BOOL, ["true"], True)], PEDESTRIAN),
    Blueprint("sensor.camera.rgb", CAMERA),
    Blueprint("sensor.other.collision", [ROLE]),
    Blueprint("sensor.other.lane_invasion", [ROLE]),
]
BY_NAME = {blueprint.name: blueprint for blueprint in BLUEPRINTS}


def definitions() -> list[Any]:
    """The blueprints as the client expects them: number, id, tags, attributes with their recommended values."""
    return [
        [
            number,
            blueprint.name,
            blueprint.name.replace(".", ","),
            [[name, kind, values[0], values, free, False] for name, kind, values, free in blueprint.attributes],
        ]
        for number, blueprint in enumerate(BLUEPRINTS, 1)
    ]
