"""First step of the recipe: the vision tower learns to see by direct regression of the readings."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covr_lightning.vlm.embedded.frames import Frames
from covr_lightning.vlm.embedded.model import IMAGE_TOKENS, TEXT_WIDTH
from covr_lightning.vlm.embedded.shards import SHARDS, sharded

REGRESSION_BETA = 0.1
RECENT_DECAY = 0.95


def image_tokens(model: Any, pixels: Tensor) -> Tensor:
    """The tokens that the language side receives.

    Args:
        model: the embedded VLM.
        pixels: (B, 3, 128, 128) uint8, already resized.

    Returns:
        (B, 4, 192) float32.
    """
    normalised = pixels.float().div(127.5).sub(1.0)
    patches = model.model.vision_model(normalised).last_hidden_state
    return model.model.connector(patches)


def cosine_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Learning rate at `step` (from 1): linear warm-up, then a cosine down to 2 % of the peak."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / steps)))
    return peak * min(1.0, step / warmup) * (0.98 * cosine + 0.02)


def train_tower(
    model: Any,
    frames: list[Frames],
    steps: int,
    batch_size: int,
    peak_rate: float,
    seed: int,
    log: Callable[[str], None],
) -> None:
    """Trains the vision tower and the connector with one linear regression head per scene, thrown away afterwards.

    A linear head on the flattened tokens leaves every reading linearly decodable, which is what makes the language
    side's task easy.

    Args:
        model: the embedded VLM; only its tower and connector change.
        frames: one entry per scene.
        steps: optimizer steps.
        batch_size: frames per step; half of them are spread evenly over the scenes, half in proportion to the
            scenes' recent losses.
        peak_rate: AdamW's learning rate after the warm-up.
        seed: seeds the heads and the order of frames.
        log: receives a progress line now and then.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = [torch.from_numpy(scene.pixels) for scene in frames]
    readings = [torch.from_numpy(scene.readings) for scene in frames]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = nn.ModuleList(nn.Linear(IMAGE_TOKENS * TEXT_WIDTH, target.shape[1]) for target in readings)
    reader = _Reader(model, heads).train()
    optimizer = torch.optim.AdamW(reader.trained.parameters(), lr=peak_rate, weight_decay=0.01, betas=(0.9, 0.98))
    recent, mean_loss = torch.ones(len(frames)), 0.0
    with sharded(reader) as shards:
        for step in range(1, steps + 1):
            optimizer.param_groups[0]["lr"] = cosine_rate(step, steps, peak_rate, warmup=100)
            counts = _frames_per_scene(recent, batch_size)
            rows = [
                torch.randint(0, len(target), (count,), generator=generator)
                for target, count in zip(readings, counts, strict=True)
            ]
            # Every second frame of each scene; a scene with one frame is in the first half alone.
            halves = [
                partial(
                    _Reader.loss,
                    pixels=[scene[row[half::SHARDS]] for scene, row in zip(pixels, rows, strict=True)],
                    readings=[target[row[half::SHARDS]] for target, row in zip(readings, rows, strict=True)],
                    total=sum(counts),
                )
                for half in range(SHARDS)
            ]
            sums = torch.stack(shards.backward(halves)).sum(0)
            nn.utils.clip_grad_norm_(reader.trained.parameters(), 1.0)
            optimizer.step()
            recent = RECENT_DECAY * recent + (1 - RECENT_DECAY) * sums / torch.tensor(counts)
            mean_loss += float(sums.sum()) / sum(counts)
            if step % 100 == 0 or step == steps:
                log(f"vision {step}/{steps}: loss {mean_loss / (step % 100 or 100):.4f}, per scene {_rounded(recent)}")
                mean_loss = 0.0


class _Reader(nn.Module):
    """The model with one linear head per scene."""

    def __init__(self, model: Any, heads: nn.ModuleList) -> None:
        super().__init__()
        self.model = model
        self.heads = heads
        self.trained = nn.ModuleList([model.model.vision_model, model.model.connector, heads])

    def loss(self, pixels: list[Tensor], readings: list[Tensor], total: int) -> tuple[Tensor, Tensor]:
        """Smooth L1 over frames of all scenes, as a share of a batch of `total` frames; and its sum per scene (S,)."""
        if not any(len(scene) for scene in pixels):  # a batch of one frame per scene leaves nothing for the second half
            return 0.0 * next(self.trained.parameters()).sum(), torch.zeros(len(pixels))
        tokens = image_tokens(self.model, torch.cat(pixels)).split([len(scene) for scene in pixels])
        sums = torch.stack(
            [
                F.smooth_l1_loss(head(chunk.flatten(1)), target, beta=REGRESSION_BETA, reduction="sum")
                / target.shape[1]
                for head, chunk, target in zip(self.heads, tokens, readings, strict=True)
            ]
        )
        return sums.sum() / total, sums.detach()


def _frames_per_scene(recent: Tensor, batch_size: int) -> list[int]:
    """Splits a batch over scenes, at least one frame each."""
    share = 0.5 / len(recent) + 0.5 * recent / recent.sum()
    return [max(1, round(batch_size * float(part))) for part in share]


def _rounded(values: Tensor) -> list[float]:
    return [round(float(value), 3) for value in values]


@torch.no_grad()
def cached_tokens(model: Any, pixels: np.ndarray, batch_size: int = 100) -> Tensor:
    """Image tokens of many frames, (N, 4, 192), for training the language side without the tower."""
    model.eval()
    return torch.cat([image_tokens(model, chunk) for chunk in torch.from_numpy(pixels).split(batch_size)])
