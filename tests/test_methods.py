"""Every method's config trains, in a run of seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from covr_lightning.cli import main

# 100 environment steps an agent step: episodes of 10, a run of 30, the first update after the eighth.
SMALL = {
    "data.env.action_repeat": "100",
    "data.env.rendering": "fast",
    "data.max_env_steps": "3000",
    "data.warmup_agent_steps": "8",
    "data.batch_size": "8",
    "data.replay_capacity": "100",
    "data.eval_episodes": "1",
    "model.hidden": "16",
    "model.filters": "4",
    "trainer.enable_progress_bar": "false",
    "trainer.log_every_n_steps": "10",
    "trainer.accelerator": "cpu",
}
# The frame's size and, for methods with a size of their own, the augmentation's.
SIZES = {"drq": (36, None), "svea": (36, None), "curl": (40, 32), "deepmdp": (36, None), "flare": (36, 40)}
SIZES |= {"resact": (36, None), "spr": (40, 32), "per": (36, None), "ere": (36, None)}


@pytest.mark.parametrize("method", SIZES)
def test_a_method_trains(method: str, tmp_path: Path) -> None:
    size, augmented = SIZES[method]
    settings = SMALL | {"data.env.size": str(size)} | ({"model.augmentation.size": str(augmented)} if augmented else {})
    command = ["--config", f"dmc_{method}.yaml", "--runs_dir", str(tmp_path), "--name", "run"]
    assert main(["fit", *command, *(part for name, v in settings.items() for part in (f"--{name}", v))]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["env_steps"] == 3000
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["ExperienceData"]["counters"]["grad_steps"] == 23
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
