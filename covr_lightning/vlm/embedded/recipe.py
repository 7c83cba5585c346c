"""Trains the embedded VLM from nothing, in five steps: render, see, answer, polish, form.

1. Render random placements of eight dm_control scenes and two of the built-in road, with what the simulators know.
2. Train the vision tower by direct regression (`vision.py`).
3. Freeze the tower and train the language side on questions about named readings (`language.py`).
4. Train everything together for a short while at a small rate.
5. Again, on answers whose form is what is hard about them.

No task's action, reward or control enters. Training counts steps, never time, and draws from seeded generators only:
the same seed, versions, renderer and number of threads give the same weights.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from covr_lightning.errors import ConfigError
from covr_lightning.vlm.embedded.evaluation import REPORT_FILE, evaluate_embedded_vlm
from covr_lightning.vlm.embedded.frames import Frames, render_frames
from covr_lightning.vlm.embedded.language import LanguageTask, train_language
from covr_lightning.vlm.embedded.model import build_model, build_processor, build_tokenizer
from covr_lightning.vlm.embedded.questions import Style, training_corpus
from covr_lightning.vlm.embedded.scenes import embedded_scenes
from covr_lightning.vlm.embedded.vision import cached_tokens, train_tower

PACKAGES = ("torch", "transformers", "tokenizers", "dm_control", "mujoco")


@dataclass(frozen=True)
class Recipe:
    """All numbers of the recipe; the defaults made the shipped weights.

    Attributes:
        frames_per_scene: training frames of each scene.
        held_out_per_scene: frames per scene in the report.
        held_out_per_task: frames per task prompt in the report.
        vision_steps: optimizer steps of the tower.
        vision_batch_size: frames per step over all scenes.
        vision_rate: peak learning rate.
        short_steps: optimizer steps of the language side on questions of nothing but the names, tower frozen.
        short_batch_size: questions per step.
        short_rate: peak learning rate.
        language_steps: optimizer steps of the language side on full prompts, tower frozen.
        language_batch_size: questions per step.
        language_rate: peak learning rate.
        joint_steps: optimizer steps of the whole model at the end.
        joint_batch_size: questions per step.
        joint_rate: peak learning rate.
        form_steps: optimizer steps of the whole model on the form of answers, last of all.
        form_batch_size: questions per step.
        form_rate: peak learning rate.
        render_processes: processes that render; 0 renders in this one. Does not change the frames.
    """

    frames_per_scene: int = 4000
    held_out_per_scene: int = 200
    held_out_per_task: int = 32
    vision_steps: int = 2400
    vision_batch_size: int = 64
    vision_rate: float = 1e-3
    short_steps: int = 1000
    short_batch_size: int = 64
    short_rate: float = 2e-3
    language_steps: int = 500
    language_batch_size: int = 32
    language_rate: float = 1e-3
    joint_steps: int = 100
    joint_batch_size: int = 32
    joint_rate: float = 2e-4
    form_steps: int = 250
    form_batch_size: int = 32
    form_rate: float = 3e-4
    render_processes: int = 2


def render_training_frames(recipe: Recipe, seed: int) -> list[Frames]:
    """Renders every scene's training frames, in the order of `embedded_scenes`."""
    names = list(embedded_scenes())
    jobs = [(name, recipe.frames_per_scene, 1000 * seed + index) for index, name in enumerate(names)]
    if recipe.render_processes == 0:
        return [_render_job(job) for job in jobs]
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(recipe.render_processes, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            return list(pool.map(_render_job, jobs))
        except BaseException:  # nobody wants what they are at any more
            for child in multiprocessing.active_children():
                if child not in others:
                    child.terminate()
            raise


def _end_with_parent() -> None:
    """Have a rendering process end when the one that started it does, however that ends; Ctrl-C is the latter's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "started by multiprocessing"

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _render_job(job: tuple[str, int, int]) -> Frames:
    name, count, seed = job
    return render_frames(embedded_scenes()[name], count, seed)


def train_embedded_vlm(
    out: Path | str, seed: int = 0, recipe: Recipe | None = None, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Trains the embedded VLM and writes it as an ordinary Hugging Face folder.

    The folder is written beside `out` and renamed into place at the end, with `report.json` (held-out errors beside a
    constant predictor's) and `README.md` in it.

    Args:
        out: the folder to write; one that this wrote before is replaced.
        seed: seeds frames, weights and questions.
        recipe: step counts and rates; None takes the defaults.
        log: receives progress lines.

    Returns:
        The report.

    Raises:
        ConfigError: `out` is a file, or a folder of something else.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and ((out / REPORT_FILE).is_file() or not any(out.iterdir()))):
        raise ConfigError(
            f"--out is {str(out)!r}, which exists and is no folder that `covr train-embedded-vlm` wrote (it has no "
            f"{REPORT_FILE}); give a new folder, as such a one is replaced."
        )
    recipe = recipe or Recipe()
    clock = _Clock(log)
    scenes = embedded_scenes()
    clock.log(f"rendering {recipe.frames_per_scene} frames of each of {len(scenes)} scenes")
    frames = render_training_frames(recipe, seed)

    tokenizer = build_tokenizer(training_corpus(scenes))
    processor = build_processor(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(tokenizer)
    clock.log(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens; training the vision tower")
    train_tower(model, frames, recipe.vision_steps, recipe.vision_batch_size, recipe.vision_rate, seed, clock.log)
    tokens = [cached_tokens(model, scene.pixels) for scene in frames]
    clock.log("training the language side")
    task = LanguageTask(model, processor, list(scenes.values()), seed)
    lessons: tuple[tuple[int, int, float, Style, list[torch.Tensor] | None], ...] = (
        (recipe.short_steps, recipe.short_batch_size, recipe.short_rate, "short", tokens),
        (recipe.language_steps, recipe.language_batch_size, recipe.language_rate, "full", tokens),
        (recipe.joint_steps, recipe.joint_batch_size, recipe.joint_rate, "full", None),
    )
    for index, (steps, batch_size, rate, style, cached) in enumerate(lessons):
        train_language(task, frames, cached, steps, batch_size, rate, seed + index, clock.log, style)
    _teach_form(model, processor, frames, recipe, seed + len(lessons), clock.log)

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.half().save_pretrained(partial)
    processor.save_pretrained(partial)
    medians = {name: np.median(scene.readings, axis=0).tolist() for name, scene in zip(scenes, frames, strict=True)}
    clock.log("evaluating on held-out frames")
    measured = evaluate_embedded_vlm(partial, recipe.held_out_per_scene, recipe.held_out_per_task, medians=medians)
    report = {
        **measured,
        "seed": seed,
        "recipe": asdict(recipe),
        "parameters": model.num_parameters(),
        "versions": {package: version(package) for package in PACKAGES},
        "threads": torch.get_num_threads(),
        **clock.minutes(),
    }
    (partial / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    (partial / "README.md").write_text(folder_readme(report))
    for file in partial.iterdir():
        file.chmod(0o644)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    clock.log(f"wrote {out}: mean ratio {report['mean_ratio']}, worst {report['worst_ratio']}")
    return report


def _teach_form(
    model: Any, processor: Any, frames: list[Frames], recipe: Recipe, seed: int, log: Callable[[str], None]
) -> None:
    """The last lesson: how many numbers to write, also behind prompts with commas and for a single name.

    Starts from weights rounded to half precision, as they are shipped, without auxiliary heads.
    """
    model.half().float()
    task = LanguageTask(model, processor, list(embedded_scenes().values()), seed, auxiliary_weight=0.0)
    train_language(task, frames, None, recipe.form_steps, recipe.form_batch_size, recipe.form_rate, seed, log, "form")


class _Clock:
    """Progress lines with wall and CPU minutes since the start, child processes included."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._wall, self._cpu = time.monotonic(), _cpu_seconds()

    def minutes(self) -> dict[str, float]:
        return {
            "wall_minutes": round((time.monotonic() - self._wall) / 60, 2),
            "cpu_minutes": round((_cpu_seconds() - self._cpu) / 60, 2),
        }

    def log(self, line: str) -> None:
        spent = self.minutes()
        self._log(f"[{spent['wall_minutes']:5.1f} min wall, {spent['cpu_minutes']:5.1f} min CPU] {line}")


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def report_table(report: dict[str, Any]) -> str:
    """The report's errors as a Markdown table."""
    lines = ["| scene | MAE | constant's MAE | ratio | unparsable |", "|---|---|---|---|---|"]
    for name, scene in report["scenes"].items():
        lines.append(
            f"| {name} | {scene['mae']:.3f} | {scene['constant_mae']:.3f} | {scene['ratio']:.2f} | "
            f"{scene['unparsable_rate']:.1%} |"
        )
    lines.append(f"| mean | | | {report['mean_ratio']:.2f} | |")
    return "\n".join(lines)


def folder_readme(report: dict[str, Any]) -> str:
    """The text of the folder's README.md."""
    return (
        "# Embedded tiny VLM\n\n"
        f"An Idefics3 of {report['parameters'] / 1e6:.1f} M parameters (float16) that covr_lightning trains by its own "
        "recipe so that the method runs without a model hub. It reads positions, angles and distances off frames of "
        "dm_control and of the built-in road and answers as `action:[0.02, -0.98]`. It saw no task's action, reward or "
        "control, and it is no stand-in for a real VLM: it knows nothing but these scenes.\n\n"
        "Greedy answers on held-out frames beside a constant predictor (the training frames' median per reading):\n\n"
        f"{report_table(report)}\n\n"
        f"Seed {report['seed']}; {report['wall_minutes']:.0f} minutes wall, {report['cpu_minutes']:.0f} minutes CPU. "
        "All figures: `report.json`. Opens with `AutoProcessor` and `AutoModelForImageTextToText`, no remote code and "
        "no torchvision.\n"
    )
