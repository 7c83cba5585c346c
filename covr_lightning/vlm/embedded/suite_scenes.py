"""Eight dm_control scenes: random placements and named readings.

Axes follow the picture of camera 0: x points right, z up (reacher, seen from above: y up). Every reading is a pure
function of `physics` and lies in [-1, 1]; lengths are in metres and angles in radians before scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

from covr_lightning.rendering import choose_backend
from covr_lightning.vlm.embedded.scenes import Scene, Stage
from covr_lightning.vlm.prompts import DMC_SYSTEM

Physics = Any
Reading = Callable[[Physics], float]

MAX_PLACEMENT_TRIES = 50
PLAIN_FLAGS = {"shadow": False, "reflection": False}


@dataclass(frozen=True)
class SuiteScene(Scene):
    """One dm_control environment.

    Attributes:
        name: key used in reports and files.
        domain: dm_control suite domain.
        task: dm_control suite task whose initialisation sets what is visible.
        caption: what the picture shows; follows "The picture shows".
        put: puts all joints (and targets) at random; the caller runs the forward kinematics afterwards.
        functions: reading's name to pure function of physics, each in [-1, 1].
        system: the system text of its tasks.
    """

    name: str
    domain: str
    task: str
    caption: str
    put: Callable[[Physics, Generator], None]
    functions: dict[str, Reading]
    system: str = DMC_SYSTEM

    @property
    def readings(self) -> Sequence[str]:
        """Their names."""
        return tuple(self.functions)

    def open(self, full_quality: bool) -> SuiteStage:
        """Opens dm_control's environment; without `full_quality` its first render is set up for no multisampling."""
        return SuiteStage(self, full_quality)


class SuiteStage(Stage):
    """An opened dm_control scene.

    Args:
        scene: what to open.
        full_quality: keep shadows, reflections and multisampling.
    """

    def __init__(self, scene: SuiteScene, full_quality: bool) -> None:
        choose_backend()
        from dm_control import suite

        environment = suite.load(scene.domain, scene.task, task_kwargs={"random": 0})
        if not full_quality:
            environment.physics.model.vis.quality.offsamples = 0
        environment.reset()
        self.physics: Physics = environment.physics
        self._scene = scene
        self._flags = None if full_quality else PLAIN_FLAGS

    def place(self, rng: Generator) -> None:
        """Places the bodies and runs the forward kinematics."""
        self._scene.put(self.physics, rng)
        self.physics.forward()

    def picture(self, size: int) -> np.ndarray:
        """Camera 0."""
        return self.physics.render(height=size, width=size, camera_id=0, render_flag_overrides=self._flags)

    def read(self) -> np.ndarray:
        """All readings, clipped to [-1, 1]."""
        values = [reading(self.physics) for reading in self._scene.functions.values()]
        return np.clip(np.asarray(values, dtype=np.float32), -1.0, 1.0)

    def close(self) -> None:
        """Frees the simulator."""
        self.physics.free()


def _scaled(value: float, low: float, high: float) -> float:
    """Maps [low, high] linearly to [-1, 1]."""
    return float(2.0 * (value - low) / (high - low) - 1.0)


def _joint(name: str, low: float, high: float) -> Reading:
    """Angle or slide of one joint, scaled from [low, high]."""
    return lambda physics: _scaled(physics.named.data.qpos[name].item(), low, high)


def _sine(name: str, multiple: int = 1) -> Reading:
    """Sine of a joint angle times `multiple`."""
    return lambda physics: float(np.sin(multiple * physics.named.data.qpos[name].item()))


def _cosine(name: str, multiple: int = 1) -> Reading:
    """Cosine of a joint angle times `multiple`."""
    return lambda physics: float(np.cos(multiple * physics.named.data.qpos[name].item()))


def _body(name: str, axis: str, low: float, high: float) -> Reading:
    """World coordinate of one body, scaled from [low, high]."""
    return lambda physics: _scaled(float(physics.named.data.xpos[name, axis]), low, high)


def _geom(name: str, axis: str, low: float, high: float) -> Reading:
    """World coordinate of one geom, scaled from [low, high]."""
    return lambda physics: _scaled(float(physics.named.data.geom_xpos[name, axis]), low, high)


def _geom_distance(first: str, second: str, high: float) -> Reading:
    """Distance between two geoms' centres, scaled from [0, high]."""

    def distance(physics: Physics) -> float:
        positions = physics.named.data.geom_xpos
        return _scaled(float(np.linalg.norm(positions[first] - positions[second])), 0.0, high)

    return distance


def _tilt_sine(physics: Physics) -> float:
    """Sine of the torso's pitch; positive leans right."""
    return float(physics.named.data.xmat["torso", "xz"])


def _tilt_cosine(physics: Physics) -> float:
    """Cosine of the torso's pitch; 1 is upright."""
    return float(physics.named.data.xmat["torso", "zz"])


def _feet(pick: Callable[..., float], axis: str, low: float, high: float) -> Reading:
    """The larger or smaller of the walker's two foot coordinates; x is taken from the torso."""

    def reading(physics: Physics) -> float:
        positions = physics.named.data.xpos
        origin = float(positions["torso", "x"]) if axis == "x" else 0.0
        return _scaled(pick(float(positions[f"{side}_foot", axis]) for side in ("left", "right")) - origin, low, high)

    return reading


def _foot_from_torso(physics: Physics) -> float:
    """Horizontal place of the hopper's foot from its torso."""
    positions = physics.named.data.xpos
    return _scaled(float(positions["foot", "x"] - positions["torso", "x"]), -0.9, 0.9)


def _lowest_point(physics: Physics) -> float:
    """Height of the lowest point of all capsules, metres; planes are left out."""
    model, data = physics.model, physics.data
    capsules = np.asarray(model.geom_bodyid) > 0
    half_extent = np.abs(np.asarray(data.geom_xmat)[capsules, 8]) * np.asarray(model.geom_size)[capsules, 1]
    bottoms = np.asarray(data.geom_xpos)[capsules, 2] - half_extent - np.asarray(model.geom_size)[capsules, 0]
    return float(bottoms.min())


def _place_above_floor(physics: Physics, rng: Generator) -> None:
    """Lifts the root so that the lowest point touches the floor (half of the time) or floats up to 0.4 m above."""
    physics.named.data.qpos["rootz"] = 0.0
    physics.forward()
    clearance = rng.uniform(0.0, 0.4) if rng.random() < 0.5 else 0.0
    physics.named.data.qpos["rootz"] = clearance - _lowest_point(physics)


def _place_joints(physics: Physics, rng: Generator, ranges: dict[str, tuple[float, float]]) -> None:
    for name, (low, high) in ranges.items():
        physics.named.data.qpos[name] = rng.uniform(low, high)


def _any_or_small_tilt(rng: Generator, spread: float) -> float:
    """Pitch in radians: mostly within `spread` of the standing pose, at times anything."""
    return rng.normal(0.0, spread) if rng.random() < 0.7 else rng.uniform(-np.pi, np.pi)


def _place_cartpole(physics: Physics, rng: Generator) -> None:
    _place_joints(physics, rng, {"slider": (-1.6, 1.6), "hinge_1": (-np.pi, np.pi)})


def _upright_angle(joint: str) -> Reading:
    """Absolute angle from upright: -1 upright, 1 hanging."""

    def reading(physics: Physics) -> float:
        angle = physics.named.data.qpos[joint].item()
        return _scaled(float(abs(np.arctan2(np.sin(angle), np.cos(angle)))), 0.0, np.pi)

    return reading


def _place_reacher(physics: Physics, rng: Generator) -> None:
    _place_joints(physics, rng, {"shoulder": (-np.pi, np.pi), "wrist": (-2.79, 2.79)})
    angle, radius = rng.uniform(-np.pi, np.pi), rng.uniform(0.05, 0.2)
    physics.named.model.geom_pos["target", "x"] = radius * np.sin(angle)
    physics.named.model.geom_pos["target", "y"] = radius * np.cos(angle)


_CHEETAH = {
    "bthigh": (-0.52, 1.05),
    "bshin": (-0.87, 0.87),
    "bfoot": (-1.0, 0.87),
    "fthigh": (-1.0, 0.5),
    "fshin": (-1.2, 0.87),
    "ffoot": (-0.49, 0.49),
}


def _place_cheetah(physics: Physics, rng: Generator) -> None:
    _place_joints(physics, rng, {"rootx": (-2.0, 2.0), **_CHEETAH})
    physics.named.data.qpos["rooty"] = _any_or_small_tilt(rng, 0.5)
    _place_above_floor(physics, rng)


def _place_walker(physics: Physics, rng: Generator) -> None:
    ranges = {"rootx": (-2.0, 2.0)}
    for side in ("left", "right"):
        ranges |= {f"{side}_hip": (-0.35, 1.4), f"{side}_knee": (-2.0, 0.0), f"{side}_ankle": (-0.78, 0.78)}
    _place_joints(physics, rng, ranges)
    physics.named.data.qpos["rooty"] = _any_or_small_tilt(rng, 0.5)
    _place_above_floor(physics, rng)


_HOPPER = {"waist": (-0.52, 0.52), "hip": (-2.0, 0.17), "knee": (0.09, 2.3), "ankle": (-0.78, 0.78)}


def _place_hopper(physics: Physics, rng: Generator) -> None:
    _place_joints(physics, rng, {"rootx": (-2.0, 2.0), **_HOPPER})
    physics.named.data.qpos["rooty"] = _any_or_small_tilt(rng, 0.5)
    _place_above_floor(physics, rng)


def _without_contact(physics: Physics, place: Callable[[], None]) -> None:
    """Repeats `place` until no two bodies touch, so that nothing hides inside another body."""
    for _ in range(MAX_PLACEMENT_TRIES):
        place()
        physics.forward()
        if physics.data.ncon == 0:
            return


_FINGER = {"proximal": (-3.4, 0.3), "distal": (-1.9, 1.9)}


def _place_finger(physics: Physics, rng: Generator) -> None:
    _without_contact(physics, lambda: _place_joints(physics, rng, {**_FINGER, "hinge": (-np.pi, np.pi)}))


def _place_ball_in_cup(physics: Physics, rng: Generator) -> None:
    def place() -> None:
        cup_x, cup_z = rng.uniform(-0.22, 0.22), rng.uniform(-0.25, 0.2)
        angle, length = rng.uniform(-np.pi, np.pi), 0.3 * np.sqrt(rng.random())
        if rng.random() < 0.4:
            angle, length = np.pi + rng.normal(0.0, 0.5), 0.3
        ball_x = cup_x + length * np.sin(angle)
        ball_height = max(0.03, 0.6 + cup_z - 0.108 + length * np.cos(angle))
        physics.named.data.qpos["cup_x"], physics.named.data.qpos["cup_z"] = cup_x, cup_z
        physics.named.data.qpos["ball_x"], physics.named.data.qpos["ball_z"] = ball_x, ball_height - 0.2

    _without_contact(physics, place)


def _place_pendulum(physics: Physics, rng: Generator) -> None:
    _place_joints(physics, rng, {"hinge": (-np.pi, np.pi)})


def suite_scenes() -> tuple[Scene, ...]:
    """The eight scenes."""
    return (
        SuiteScene(
            "cartpole",
            "cartpole",
            "swingup",
            "a pole hinged on a cart that slides along a rail",
            _place_cartpole,
            {
                "cart_position": _joint("slider", -1.7, 1.7),
                "pole_angle_sine": _sine("hinge_1"),
                "pole_angle_cosine": _cosine("hinge_1"),
                "pole_angle_from_upright": _upright_angle("hinge_1"),
            },
        ),
        SuiteScene(
            "reacher",
            "reacher",
            "easy",
            "a two-link arm and a round target, seen from above",
            _place_reacher,
            {
                "fingertip_x": _geom("finger", "x", -0.25, 0.25),
                "fingertip_y": _geom("finger", "y", -0.25, 0.25),
                "target_x": _geom("target", "x", -0.2, 0.2),
                "target_y": _geom("target", "y", -0.2, 0.2),
                "target_distance": _geom_distance("finger", "target", 0.44),
                "shoulder_angle_sine": _sine("shoulder"),
                "shoulder_angle_cosine": _cosine("shoulder"),
            },
        ),
        SuiteScene(
            "cheetah",
            "cheetah",
            "run",
            "a two-legged cheetah from the side, its head to the right",
            _place_cheetah,
            {
                "torso_tilt_sine": _tilt_sine,
                "torso_tilt_cosine": _tilt_cosine,
                "torso_height": _body("torso", "z", 0.0, 1.3),
                "back_thigh_angle": _joint("bthigh", *_CHEETAH["bthigh"]),
                "back_shin_angle": _joint("bshin", *_CHEETAH["bshin"]),
                "front_thigh_angle": _joint("fthigh", *_CHEETAH["fthigh"]),
                "front_shin_angle": _joint("fshin", *_CHEETAH["fshin"]),
            },
        ),
        SuiteScene(
            "walker",
            "walker",
            "walk",
            "a two-legged walker from the side, facing right",
            _place_walker,
            {
                "torso_tilt_sine": _tilt_sine,
                "torso_tilt_cosine": _tilt_cosine,
                "torso_height": _body("torso", "z", 0.0, 1.8),
                "leading_foot_x": _feet(max, "x", -1.1, 1.1),
                "trailing_foot_x": _feet(min, "x", -1.1, 1.1),
                "upper_foot_height": _feet(max, "z", 0.0, 1.8),
                "lower_foot_height": _feet(min, "z", 0.0, 1.8),
            },
        ),
        SuiteScene(
            "finger",
            "finger",
            "spin",
            "a two-link finger on the left and a spinner on the right",
            _place_finger,
            {
                "fingertip_x": _geom("fingertip", "x", -0.55, 0.15),
                "fingertip_z": _geom("fingertip", "z", 0.05, 0.75),
                "proximal_angle": _joint("proximal", *_FINGER["proximal"]),
                "distal_angle": _joint("distal", *_FINGER["distal"]),
                "spinner_double_angle_sine": _sine("hinge", 2),
                "spinner_double_angle_cosine": _cosine("hinge", 2),
            },
        ),
        SuiteScene(
            "ball_in_cup",
            "ball_in_cup",
            "catch",
            "a cup and a ball on a string",
            _place_ball_in_cup,
            {
                "cup_x": _body("cup", "x", -0.25, 0.25),
                "cup_z": _body("cup", "z", 0.3, 0.85),
                "ball_x": _body("ball", "x", -0.5, 0.5),
                "ball_z": _body("ball", "z", 0.0, 1.0),
                "ball_distance": _geom_distance("ball", "cup_part_2", 0.35),
            },
        ),
        SuiteScene(
            "hopper",
            "hopper",
            "hop",
            "a one-legged hopper from the side, its nose to the right",
            _place_hopper,
            {
                "torso_tilt_sine": _tilt_sine,
                "torso_tilt_cosine": _tilt_cosine,
                "torso_height": _body("torso", "z", 0.0, 1.5),
                "hip_angle": _joint("hip", *_HOPPER["hip"]),
                "knee_angle": _joint("knee", *_HOPPER["knee"]),
                "foot_x": _foot_from_torso,
                "foot_height": _body("foot", "z", 0.0, 1.5),
            },
        ),
        SuiteScene(
            "pendulum",
            "pendulum",
            "swingup",
            "a pendulum that turns about a fixed point",
            _place_pendulum,
            {
                "pole_angle_sine": _sine("hinge"),
                "pole_angle_cosine": _cosine("hinge"),
                "pole_angle_from_upright": _upright_angle("hinge"),
            },
        ),
    )
