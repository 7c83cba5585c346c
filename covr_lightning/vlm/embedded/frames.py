"""Renders random placements of a scene together with what the simulator knows about them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from covr_lightning.rendering import choose_backend
from covr_lightning.vlm.embedded.scenes import Physics, Scene

IMAGE_SIZE = 128
RENDER_SIZES = (64, 84, 100, 128)
FULL_QUALITY_SHARE = 0.2
PLAIN_FLAGS = {"shadow": False, "reflection": False}


@dataclass(frozen=True)
class Frames:
    """Rendered frames and their readings.

    Attributes:
        pixels: (N, 3, 128, 128) uint8, resized as the model's image processor resizes.
        readings: (N, R) float32 in [-1, 1], columns in the order of `Scene.readings`.
    """

    pixels: np.ndarray
    readings: np.ndarray


def resize_frame(frame: np.ndarray) -> np.ndarray:
    """Resizes one (H, W, 3) uint8 picture to (3, 128, 128), bicubic as in the image processor."""
    if frame.shape[:2] != (IMAGE_SIZE, IMAGE_SIZE):
        frame = np.asarray(Image.fromarray(frame).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(frame.transpose(2, 0, 1))


def load_physics(scene: Scene, full_quality: bool) -> Physics:
    """Opens a scene's simulator.

    Args:
        scene: what to open.
        full_quality: keep dm_control's multisampling; without it the first render is set up for none.
    """
    choose_backend()
    from dm_control import suite

    environment = suite.load(scene.domain, scene.task, task_kwargs={"random": 0})
    if not full_quality:
        environment.physics.model.vis.quality.offsamples = 0
    environment.reset()
    return environment.physics


def render_random(
    scene: Scene, physics: Physics, rng: np.random.Generator, size: int, full_quality: bool
) -> np.ndarray:
    """Places the scene at random and renders camera 0 as (size, size, 3) uint8; the state stays for reading."""
    scene.place(physics, rng)
    physics.forward()
    flags = None if full_quality else PLAIN_FLAGS
    return physics.render(height=size, width=size, camera_id=0, render_flag_overrides=flags)


def render_frames(
    scene: Scene,
    count: int,
    seed: int,
    sizes: tuple[int, ...] = RENDER_SIZES,
    full_quality_share: float = FULL_QUALITY_SHARE,
) -> Frames:
    """Renders `count` random placements as the model sees them.

    Args:
        scene: what to render.
        count: number of frames.
        seed: fixes placements, sizes and qualities.
        sizes: square render sizes in pixels, drawn uniformly.
        full_quality_share: share of frames with shadows, reflections and multisampling (dm_control's default
            pixels); the rest is rendered without them.
    """
    rng = np.random.default_rng(seed)
    full_count = round(count * full_quality_share)
    pixels = np.empty((count, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    readings = np.empty((count, len(scene.readings)), dtype=np.float32)
    for full_quality, start, stop in ((True, 0, full_count), (False, full_count, count)):
        if start == stop:
            continue
        physics = load_physics(scene, full_quality)
        for index in range(start, stop):
            frame = render_random(scene, physics, rng, int(rng.choice(sizes)), full_quality)
            pixels[index] = resize_frame(frame)
            readings[index] = scene.read(physics)
        physics.free()
    return Frames(pixels, readings)


def render_native_frames(
    scene: Scene, count: int, seed: int, size: int, full_quality: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Renders `count` random placements at one size and quality, not resized, as an environment would hand them out.

    Returns:
        Frames (N, 3, size, size) uint8 and readings (N, R) float32.
    """
    rng = np.random.default_rng(seed)
    physics = load_physics(scene, full_quality)
    pixels = np.empty((count, 3, size, size), dtype=np.uint8)
    readings = np.empty((count, len(scene.readings)), dtype=np.float32)
    for index in range(count):
        pixels[index] = render_random(scene, physics, rng, size, full_quality).transpose(2, 0, 1)
        readings[index] = scene.read(physics)
    physics.free()
    return pixels, readings
