"""Small rounds on the embedded architecture with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tensordict import TensorDict

from covr_lightning.envs import DMControl
from covr_lightning.finetune import KeepAll, UniformWeight
from covr_lightning.finetune.module import FineTuneSettings
from covr_lightning.finetune.round import RoundReport, fine_tune_round
from covr_lightning.vlm.vlm import VLM, LoRA

REACHER = DMControl("reacher-easy").spec


def vlm(folder: Path, **lora) -> VLM:
    model = VLM(str(folder), LoRA(**{"rank": 8, "alpha": 16, "dropout": 0.0, **lora}))
    model.load(REACHER)
    return model


def frames(n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 40, 40), dtype=torch.uint8, generator=g)


def rows(n: int) -> TensorDict:
    # Bright frames ask for the action (0.5, −0.5): one thing to learn.
    return TensorDict({"frame": frames(n), "action": torch.tensor([0.5, -0.5]).expand(n, 2)}, [n])


SETTINGS = FineTuneSettings(epochs=10, batch_size=8, accumulate=1, lr=3e-3, held_out=0.2, gradient_checkpointing=False)
CPU = {"accelerator": "cpu", "devices": 1}


def a_round(model: VLM, number: int = 1, **settings) -> RoundReport:
    report = RoundReport(number, 100, 20)
    return fine_tune_round(
        report, model, rows(20), torch.ones(20), 0.0, KeepAll(), UniformWeight(), replace(SETTINGS, **settings), CPU
    )
