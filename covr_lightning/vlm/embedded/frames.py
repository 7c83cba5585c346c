"""Renders random placements of a scene together with what the simulator knows about them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from covr_lightning.vlm.embedded.scenes import Scene, Stage

IMAGE_SIZE = 128
RENDER_SIZES = (64, 84, 100, 128)
FULL_QUALITY_SHARE = 0.2


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
        full_quality_share: share of frames in the costlier look (see `Scene.open`).
    """
    rng = np.random.default_rng(seed)
    full_count = round(count * full_quality_share)
    pixels = np.empty((count, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    readings = np.empty((count, len(scene.readings)), dtype=np.float32)
    for full_quality, start, stop in ((True, 0, full_count), (False, full_count, count)):
        if start == stop:
            continue
        stage = scene.open(full_quality)
        for index in range(start, stop):
            size = int(rng.choice(sizes))
            stage.place(rng)
            pixels[index] = resize_frame(stage.picture(size))
            readings[index] = stage.read()
        stage.close()
    return Frames(pixels, readings)


def render_native_frames(stage: Stage, count: int, seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Renders `count` random placements at one size, not resized, as an environment would hand them out.

    Args:
        stage: where; it stays open.
        count: number of frames.
        seed: fixes placements.
        size: in pixels.

    Returns:
        Frames (N, 3, size, size) uint8 and readings (N, R) float32.
    """
    rng = np.random.default_rng(seed)
    pixels, readings = [], []
    for _ in range(count):
        stage.place(rng)
        pixels.append(stage.picture(size).transpose(2, 0, 1))
        readings.append(stage.read())
    return np.stack(pixels), np.stack(readings)
