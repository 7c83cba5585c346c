"""Measures the embedded VLM on freshly rendered frames: its greedy answers beside a constant predictor's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from covr_lightning.errors import ConfigError
from covr_lightning.vlm.action_text import ActionText
from covr_lightning.vlm.decoding import greedy_answers
from covr_lightning.vlm.embedded.frames import RENDER_SIZES, render_native_frames
from covr_lightning.vlm.embedded.questions import reading_question
from covr_lightning.vlm.embedded.scenes import Scene, embedded_scenes, scene_of
from covr_lightning.vlm.inputs import VLMInputs
from covr_lightning.vlm.loading import embedded_folder, load_vlm
from covr_lightning.vlm.prompts import Prompt, dmc_tasks, prompt_for

REPORT_FILE = "report.json"
HELD_OUT_SEED = 1_000_003


def ask(model: Any, processor: Any, prompt: Prompt, frames: Tensor, batch_size: int = 64) -> list[str]:
    """The model's greedy texts for one prompt.

    Args:
        model: the VLM.
        processor: its processor.
        prompt: what is asked of every frame.
        frames: (N, 3, H, W) uint8.
        batch_size: frames per call.
    """
    inputs, codec = VLMInputs(processor, prompt), unit_codec(prompt.action_size)
    return [text for chunk in frames.split(batch_size) for text in greedy_answers(model, inputs, codec, chunk)]


def unit_codec(size: int) -> ActionText:
    """Codec for `size` values in [-1, 1]."""
    return ActionText([-1.0] * size, [1.0] * size)


def evaluate_scene(
    model: Any, processor: Any, scene: Scene, medians: Sequence[float], count: int, seed: int
) -> dict[str, Any]:
    """Asks for all of a scene's readings, in a random order per render size and quality.

    An unparsable answer counts as zeros.

    Args:
        model: the VLM.
        processor: its processor.
        scene: what to render and ask.
        medians: the training frames' median per reading: the constant predictor.
        count: frames in all, spread over the render sizes and qualities.
        seed: fixes frames and orders.

    Returns:
        Mean absolute errors of model and constant predictor, their ratio, per-reading errors and the unparsable rate.
    """
    rng = np.random.default_rng(seed)
    errors, constant_errors, unparsable = [], [], 0
    for pixels, readings in _held_out_frames(scene, count, seed):
        order = rng.permutation(len(scene.readings))
        question = reading_question(scene, [int(column) for column in order])
        codec = unit_codec(len(order))
        texts = ask(model, processor, question.prompt, torch.from_numpy(pixels))
        for text, truth in zip(texts, readings, strict=True):
            answer, valid = codec.decode(text)
            unparsable += not valid
            error = np.empty(len(order))
            error[order] = np.abs(answer.numpy() - truth[order])
            errors.append(error)
            constant_errors.append(np.abs(np.asarray(medians) - truth))
    mae, constant = np.mean(errors, axis=0), np.mean(constant_errors, axis=0)
    return {
        "mae": round(float(mae.mean()), 4),
        "constant_mae": round(float(constant.mean()), 4),
        "ratio": round(float(mae.mean() / constant.mean()), 4),
        "unparsable_rate": unparsable / count,
        "frames": count,
        "readings": {
            name: {
                "mae": round(float(mae[i]), 4),
                "constant_mae": round(float(constant[i]), 4),
                "train_median": round(float(medians[i]), 4),
            }
            for i, name in enumerate(scene.readings)
        },
    }


def _held_out_frames(scene: Scene, count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`count` frames and their readings, in one part for each quality and render size."""
    parts = [len(part) for part in np.array_split(np.arange(count), 2 * len(RENDER_SIZES))]
    with closing(scene.open(full_quality=False)) as stage:
        for number, size in enumerate(RENDER_SIZES):
            if parts[number]:
                yield render_native_frames(stage, parts[number], seed + 1 + number, size)
    # In full quality it rains on the highway, and rain goes on from picture to picture: each part begins anew.
    for number, size in enumerate(RENDER_SIZES, len(RENDER_SIZES)):
        if parts[number]:
            with closing(scene.open(full_quality=True)) as stage:
                yield render_native_frames(stage, parts[number], seed + 1 + number, size)


def unparsable_rate(model: Any, processor: Any, task: str, scene: Scene, count: int, seed: int) -> float:
    """Share of answers to a task's prompt that do not parse to the task's number of values."""
    prompt = prompt_for(task)
    with closing(scene.open(full_quality=False)) as stage:
        pixels, _ = render_native_frames(stage, count, seed, RENDER_SIZES[1])
    texts = ask(model, processor, prompt, torch.from_numpy(pixels))
    codec = unit_codec(prompt.action_size)
    return sum(not codec.decode(text)[1] for text in texts) / count


def evaluate_embedded_vlm(
    folder: Path | str | None = None,
    frames_per_scene: int = 200,
    frames_per_task: int = 32,
    seed: int = HELD_OUT_SEED,
    medians: dict[str, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """Recomputes the report on freshly rendered held-out frames.

    Args:
        folder: the VLM's folder; None means the shipped one.
        frames_per_scene: held-out frames per scene.
        frames_per_task: frames per task prompt for the unparsable rate.
        seed: seed of the held-out frames; training uses others.
        medians: training medians per scene; None reads them from the folder's report.

    Returns:
        `scenes` (see `evaluate_scene`), `mean_ratio`, `worst_ratio`, and `task_prompts` with unparsable rates.

    Raises:
        ConfigError: if the folder cannot be loaded, or medians are asked for and the folder has no report.
    """
    folder = embedded_folder() if folder is None else Path(folder)
    model, processor = load_vlm(folder)
    constants = _stored_medians(folder) if medians is None else medians
    scenes = embedded_scenes()
    results = {
        name: evaluate_scene(model, processor, scene, constants[name], frames_per_scene, seed + 100 * index)
        for index, (name, scene) in enumerate(scenes.items())
    }
    ratios = [result["ratio"] for result in results.values()]
    tasks = {
        task: unparsable_rate(model, processor, task, scene_of(task, scenes), frames_per_task, seed + 1000)
        for task in (*dmc_tasks(), "highway", "ghost-pedestrian")
        if frames_per_task
    }
    return {
        "scenes": results,
        "mean_ratio": round(float(np.mean(ratios)), 4),
        "worst_ratio": max(ratios),
        "task_prompts_unparsable_rate": tasks,
        "evaluation_seed": seed,
    }


def _stored_medians(folder: Path) -> dict[str, Sequence[float]]:
    report = folder / REPORT_FILE
    if not report.is_file():
        raise ConfigError(
            f"the VLM at vlm.path {str(folder)!r} has no {REPORT_FILE} with the training medians: valid choices are "
            "folders written by the embedded VLM's recipe"
        )
    scenes = json.loads(report.read_text())["scenes"]
    return {name: [reading["train_median"] for reading in scene["readings"].values()] for name, scene in scenes.items()}
