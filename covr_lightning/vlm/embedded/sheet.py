"""A picture of single answers beside their frames, to be looked at."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from covr_lightning.vlm.embedded.evaluation import HELD_OUT_SEED, ask, unit_codec
from covr_lightning.vlm.embedded.frames import IMAGE_SIZE, render_native_frames
from covr_lightning.vlm.embedded.questions import reading_question
from covr_lightning.vlm.embedded.scenes import embedded_scenes
from covr_lightning.vlm.loading import embedded_folder, load_vlm

TEXT_COLUMN = 270
LINE_HEIGHT = 15
FAR_OFF = 0.25


def contact_sheet(
    out: Path | str, folder: Path | str | None = None, per_scene: int = 3, seed: int = HELD_OUT_SEED + 7
) -> None:
    """Writes a PNG with one row per scene: held-out frames, what was asked, the answer and the truth.

    Answers further than 0.25 from the truth stand in red.

    Args:
        out: the PNG to write.
        folder: the VLM's folder; None means the shipped one.
        per_scene: frames per scene.
        seed: fixes frames and the order of the questions.
    """
    model, processor = load_vlm(embedded_folder() if folder is None else folder)
    scenes = embedded_scenes()
    font = ImageFont.load_default(size=11)
    width = IMAGE_SIZE + TEXT_COLUMN
    sheet = Image.new("RGB", (per_scene * width, len(scenes) * (IMAGE_SIZE + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    rng = np.random.default_rng(seed)
    for row, scene in enumerate(scenes.values()):
        with closing(scene.open(full_quality=False)) as stage:
            pixels, readings = render_native_frames(stage, per_scene, seed + row, IMAGE_SIZE)
        order = [int(column) for column in rng.permutation(len(scene.readings))]
        prompt = reading_question(scene, order).prompt
        texts = ask(model, processor, prompt, torch.from_numpy(pixels))
        for column, (frame, truth, text) in enumerate(zip(pixels, readings[:, order], texts, strict=True)):
            left, top = column * width, row * (IMAGE_SIZE + 4)
            sheet.paste(Image.fromarray(frame.transpose(1, 2, 0)), (left, top))
            answer, valid = unit_codec(len(order)).decode(text)
            draw.text((left + IMAGE_SIZE + 6, top), "asked: answer (truth)" if valid else text, "gray", font)
            for line, (name, value, true) in enumerate(zip(prompt.action_names, answer.tolist(), truth, strict=True)):
                color = "firebrick" if abs(value - true) > FAR_OFF else "black"
                place = (left + IMAGE_SIZE + 6, top + (line + 1) * LINE_HEIGHT)
                draw.text(place, f"{name}: {value:.2f} ({true:.2f})", color, font)
    sheet.save(out, optimize=True)
