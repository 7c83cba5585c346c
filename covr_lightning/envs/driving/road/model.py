"""The MuJoCo model of a road: surface, markings, sky, and a stock of bodies that the scene moves about.

MuJoCo only draws here; motion and contact are computed elsewhere, so nothing collides and nothing has dynamics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mujoco
import numpy as np

from covr_lightning.envs.driving.road.track import Track
from covr_lightning.envs.driving.scenario import Scenario

#: Metres between two cross sections of the road's meshes.
STEP = 4.0
DASH, DASH_GAP, LINE_WIDTH = 3.0, 6.0, 0.2
SIDEWALK_HEIGHT = 0.15
#: Where bodies wait that nobody sees.
AWAY = (0.0, 0.0, -100.0)

HOUSES, TREES, POSTS = 26, 30, 24

GREY = (0.33, 0.33, 0.34, 1.0)
WHITE = (0.95, 0.95, 0.95, 1.0)


@dataclass(frozen=True)
class Look:
    """Colours and visibility of a weather.

    Attributes:
        sky: Colours of the sky at the zenith and at the horizon.
        fog: Metres where haze begins and where it hides everything.
        ambient: Light from everywhere.
        sun: Light from the sun.
        road: Colour that the road's surface is multiplied by.
    """

    sky: tuple[tuple[float, float, float], tuple[float, float, float]]
    fog: tuple[float, float]
    ambient: float
    sun: float
    road: float


DAY = Look(((0.50, 0.60, 0.72), (0.80, 0.83, 0.86)), (150.0, 380.0), 0.45, 0.45, 1.0)
RAIN = Look(((0.38, 0.41, 0.45), (0.55, 0.57, 0.60)), (40.0, 190.0), 0.42, 0.18, 0.62)


def build_model(scenario: Scenario, track: Track, cars: int, vans: int, pedestrians: int) -> mujoco.MjModel:
    """Compile the model.

    Args:
        scenario: For the road's shape, the weather and the camera.
        track: The road's course.
        cars: How many cars can be shown at once.
        vans: How many vans.
        pedestrians: How many pedestrians.
    """
    look = RAIN if scenario.raining else DAY
    spec = mujoco.MjSpec()
    _visuals(spec, look)
    size = scenario.camera.size
    spec.visual.global_.offheight, spec.visual.global_.offwidth = max(480, size), max(640, size)  # to draw in
    _materials(spec, look)
    _road(spec, scenario, track)
    for i in range(cars):
        _car(_body(spec, f"car{i}"))
    for i in range(vans):
        _van(_body(spec, f"van{i}"))
    for i in range(pedestrians):
        _pedestrian(_body(spec, f"pedestrian{i}"))
    town = scenario.road.surroundings == "town"
    for i in range(HOUSES):
        box(_body(spec, f"house{i}"), (0, 0, 0.5), (0.5, 0.5, 0.5), (1, 1, 1, 1), material="house")
    for i in range(TREES):
        _tree(_body(spec, f"tree{i}"))
    for i in range(POSTS):
        _lamp(_body(spec, f"post{i}")) if town else _rail_post(_body(spec, f"post{i}"))
    ego = _body(spec, "ego")
    # A MuJoCo camera looks along its −z; here along the car's x, with z up.
    ahead = (0.5, 0.5, -0.5, -0.5)
    where = (scenario.camera.x, 0, scenario.camera.z)
    ego.add_camera(name="front", pos=where, quat=ahead, fovy=scenario.camera.fov)
    return spec.compile()


def box(body: mujoco.MjsBody, pos: tuple, size: tuple, rgba: tuple, material: str = "") -> mujoco.MjsGeom:
    """Add a box (half sizes) that is drawn and nothing else."""
    return _geom(body, mujoco.mjtGeom.mjGEOM_BOX, pos, size, rgba, material)


def _geom(
    body: mujoco.MjsBody, kind: int, pos: tuple, size: tuple, rgba: tuple, material: str = "", **more: object
) -> mujoco.MjsGeom:
    padded = (*size, *(0.0,) * (3 - len(size)))
    return body.add_geom(
        type=kind, pos=pos, size=padded, rgba=rgba, material=material, contype=0, conaffinity=0, mass=0.0, **more
    )


def _body(spec: mujoco.MjSpec, name: str) -> mujoco.MjsBody:
    return spec.worldbody.add_body(name=name, mocap=True, pos=AWAY)


def _visuals(spec: mujoco.MjSpec, look: Look) -> None:
    spec.option.disableflags |= mujoco.mjtDisableBit.mjDSBL_CONTACT
    spec.stat.extent, spec.stat.center = 400.0, (100.0, 0.0, 2.0)
    visual = spec.visual
    # Software rendering: no multisampling, no shadows, coarse round shapes (these decide the frame rate).
    visual.quality.offsamples = visual.quality.shadowsize = 0
    visual.quality.numslices, visual.quality.numstacks, visual.quality.numquads = 10, 6, 1
    visual.headlight.ambient = (look.ambient,) * 3
    visual.headlight.diffuse = (0.25,) * 3
    visual.headlight.specular = (0.0,) * 3
    visual.map.znear, visual.map.zfar = 0.0005, 1.2
    visual.map.fogstart, visual.map.fogend = look.fog[0] / 400, look.fog[1] / 400
    visual.rgba.fog = visual.rgba.haze = (*look.sky[1], 1.0)
    spec.worldbody.add_light(
        type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, dir=(-0.3, 0.4, -1.0), diffuse=(look.sun,) * 3, castshadow=False
    )


def _materials(spec: mujoco.MjSpec, look: Look) -> None:
    role = mujoco.mjtTextureRole.mjTEXROLE_RGB
    plane, cube = mujoco.mjtTexture.mjTEXTURE_2D, mujoco.mjtTexture.mjTEXTURE_CUBE
    flat, checker = mujoco.mjtBuiltin.mjBUILTIN_FLAT, mujoco.mjtBuiltin.mjBUILTIN_CHECKER
    spec.add_texture(
        type=mujoco.mjtTexture.mjTEXTURE_SKYBOX, builtin=mujoco.mjtBuiltin.mjBUILTIN_GRADIENT,
        rgb1=look.sky[0], rgb2=look.sky[1], width=64, height=384,
    )  # fmt: skip
    dim = look.road
    spec.add_texture(
        name="asphalt", type=plane, builtin=flat, rgb1=tuple(c * dim for c in GREY[:3]), width=128, height=128,
        mark=mujoco.mjtMark.mjMARK_RANDOM, markrgb=tuple(c * dim * 1.25 for c in GREY[:3]), random=0.10,
    )  # fmt: skip
    spec.add_texture(
        name="grass", type=plane, builtin=checker, rgb1=(0.30 * dim, 0.42 * dim, 0.20 * dim),
        rgb2=(0.34 * dim, 0.46 * dim, 0.24 * dim), width=64, height=64,
    )  # fmt: skip
    spec.add_texture(
        name="house", type=cube, builtin=checker, rgb1=(1.0, 1.0, 1.0), rgb2=(0.72, 0.74, 0.78), width=64, height=384,
    )  # fmt: skip
    for name, repeat, uniform in (
        ("asphalt", (1.0, 1.0), False),
        ("grass", (0.08, 0.08), True),
        ("house", (1, 1), False),
    ):
        material = spec.add_material(name=name, texrepeat=repeat, texuniform=uniform, specular=0.0, shininess=0.0)
        material.textures[role] = name


def _road(spec: mujoco.MjSpec, scenario: Scenario, track: Track) -> None:
    shape = scenario.road
    left, right = track.bounds
    world = spec.worldbody
    ground = {"type": mujoco.mjtGeom.mjGEOM_PLANE, "pos": (0, 0, -0.06), "size": (0, 0, 1), "material": "grass"}
    world.add_geom(**ground, contype=0, conaffinity=0)
    ends = (-30.0, track.length + 200.0)
    _strip(spec, track, "surface", (left, 0.0), (right, 0.0), [ends], (1, 1, 1, 1), "asphalt")
    walk = (0.62, 0.61, 0.58, 1.0)
    if shape.sidewalk:
        for side, edge in ((-1, left), (1, right)):
            near, far = sorted((edge, edge + side * shape.sidewalk))
            _strip(spec, track, f"walk{side}", (near, SIDEWALK_HEIGHT), (far, SIDEWALK_HEIGHT), [ends], walk)
            low, high = sorted(((edge, 0.0), (edge, SIDEWALK_HEIGHT)), key=lambda dz: side * dz[1])
            _strip(spec, track, f"curb{side}", low, high, [ends], (0.45, 0.45, 0.44, 1))
    dashes = [(s, s + DASH) for s in np.arange(ends[0], ends[1] - DASH, DASH + DASH_GAP)]
    yellow = (0.85, 0.68, 0.15, 1.0)
    for i, d in enumerate(track.markings):
        solid = i in (0, len(track.markings) - 1)
        between = shape.opposite_lanes > 0 and abs(d) < 1e-6
        colour = yellow if between else WHITE
        pieces = [ends] if solid else dashes
        a, b = (d - LINE_WIDTH / 2, 0.012), (d + LINE_WIDTH / 2, 0.012)
        _strip(spec, track, f"line{i}", a, b, pieces, colour)
    if not shape.sidewalk:
        for side, edge in ((-1, left - 0.6), (1, right + 0.6)):
            _strip(spec, track, f"rail{side}", (edge, 0.45), (edge, 0.75), [ends], (0.66, 0.68, 0.70, 1.0), both=True)


def _strip(
    spec: mujoco.MjSpec,
    track: Track,
    name: str,
    a: tuple[float, float],
    b: tuple[float, float],
    pieces: list[tuple[float, float]],
    rgba: tuple,
    material: str = "",
    both: bool = False,
) -> None:
    """A ribbon along the road between a left line (d, z) and a right one, seen from above; `both`: also from below."""
    vertices: list[tuple[float, float, float]] = []
    texture: list[tuple[float, float]] = []
    faces: list[tuple[int, int, int]] = []
    for start, end in pieces:
        n = max(1, math.ceil((end - start) / STEP))
        first = len(vertices)
        for s in np.linspace(start, end, n + 1):
            for d, z in (a, b):
                pose = track.pose(float(s), d)
                vertices.append((pose.x, pose.y, z))
                texture.append((s / 8, (d + z) / 8))
        for i in range(first, first + 2 * n, 2):
            quad = [(i, i + 1, i + 2), (i + 1, i + 3, i + 2)]
            faces += quad
            if both:
                faces += [(p, r, q) for p, q, r in quad]
    mesh = spec.add_mesh(name=name, inertia=mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL)
    mesh.uservert = np.asarray(vertices, float).ravel()
    mesh.userface = np.asarray(faces).ravel()
    mesh.usertexcoord = np.asarray(texture, float).ravel()
    # Vertices run forward, a on the left of b: counter-clockwise from above is (a, b, next a).
    geom = {"type": mujoco.mjtGeom.mjGEOM_MESH, "meshname": name, "rgba": rgba, "material": material}
    spec.worldbody.add_geom(**geom, contype=0, conaffinity=0, mass=0.0)


def _wheels(body: mujoco.MjsBody, x: float, y: float, radius: float) -> None:
    turned = (math.cos(math.pi / 4), math.sin(math.pi / 4), 0, 0)
    for i in (-x, x):
        for j in (-y, y):
            where, size = (i, j, radius), (radius, 0.12)
            _geom(body, mujoco.mjtGeom.mjGEOM_CYLINDER, where, size, (0.05, 0.05, 0.05, 1), quat=turned)


def _car(body: mujoco.MjsBody) -> None:
    """The first and the third box take the car's colour (see `scene.py`)."""
    paint, glass = (0.7, 0.1, 0.1, 1), (0.12, 0.14, 0.18, 1)
    box(body, (0, 0, 0.72), (2.3, 0.92, 0.38), paint)
    box(body, (-0.25, 0, 1.32), (1.2, 0.80, 0.28), glass)
    box(body, (-0.25, 0, 1.63), (1.15, 0.78, 0.06), paint)
    for y in (-0.62, 0.62):
        box(body, (-2.31, y, 0.82), (0.03, 0.22, 0.09), (0.9, 0.05, 0.05, 1))
        box(body, (2.31, y, 0.75), (0.03, 0.22, 0.09), (0.95, 0.95, 0.8, 1))
    box(body, (-2.31, 0, 0.62), (0.02, 0.26, 0.07), (0.9, 0.9, 0.85, 1))
    _wheels(body, 1.4, 0.8, 0.33)


def _van(body: mujoco.MjsBody) -> None:
    paint, glass = (0.9, 0.9, 0.9, 1), (0.12, 0.14, 0.18, 1)
    box(body, (-0.4, 0, 1.45), (2.4, 1.05, 1.1), paint)
    box(body, (-2.81, 0, 1.95), (0.02, 0.85, 0.35), glass)
    box(body, (2.4, 0, 0.95), (0.4, 1.0, 0.6), paint)
    box(body, (2.05, 0, 1.95), (0.08, 0.9, 0.45), glass)
    for y in (-0.85, 0.85):
        box(body, (-2.81, y, 1.0), (0.03, 0.12, 0.22), (0.9, 0.05, 0.05, 1))
    _wheels(body, 1.75, 0.9, 0.36)


def _pedestrian(body: mujoco.MjsBody) -> None:
    capsule, sphere = mujoco.mjtGeom.mjGEOM_CAPSULE, mujoco.mjtGeom.mjGEOM_SPHERE
    _geom(body, capsule, (0, 0, 1.14), (0.21, 0.28), (0.90, 0.30, 0.10, 1))
    _geom(body, sphere, (0, 0, 1.66), (0.14,), (0.90, 0.70, 0.55, 1))
    for x, tilt in ((0.16, 0.25), (-0.16, -0.25)):
        leg = (math.cos(tilt / 2), 0, -math.sin(tilt / 2), 0)
        _geom(body, capsule, (x, 0, 0.45), (0.09, 0.36), (0.10, 0.10, 0.35, 1), quat=leg)
    for y in (0.27, -0.27):
        _geom(body, capsule, (0, y, 1.12), (0.06, 0.24), (0.90, 0.30, 0.10, 1))


def _tree(body: mujoco.MjsBody) -> None:
    _geom(body, mujoco.mjtGeom.mjGEOM_CYLINDER, (0, 0, 1.2), (0.18, 1.2), (0.35, 0.25, 0.15, 1))
    _geom(body, mujoco.mjtGeom.mjGEOM_ELLIPSOID, (0, 0, 3.6), (1.6, 1.6, 2.0), (0.15, 0.40, 0.15, 1))


def _lamp(body: mujoco.MjsBody) -> None:
    box(body, (0, 0, 3.0), (0.07, 0.07, 3.0), (0.35, 0.36, 0.38, 1))
    box(body, (0.6, 0, 6.0), (0.6, 0.08, 0.05), (0.35, 0.36, 0.38, 1))


def _rail_post(body: mujoco.MjsBody) -> None:
    box(body, (0, 0, 0.38), (0.06, 0.06, 0.38), (0.55, 0.57, 0.60, 1))
