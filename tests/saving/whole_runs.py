"""The small run that tests of whole runs begin, end and go on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

# An agent step is 40 environment steps, an episode 25 agent steps; evaluations at 40, 1000 and 2000 environment steps.
SETTINGS = """
data:
  class_path: covr_lightning.data.ExperienceData
  init_args:
    env: {class_path: covr_lightning.envs.DMControl, init_args: {task: cartpole-swingup, action_repeat: 40, size: 40}}
    max_env_steps: 2000
    warmup_agent_steps: 20
    batch_size: 8
    replay_capacity: 1000
    eval_every_env_steps: 1000
    eval_episodes: 1
model:
  class_path: covr_lightning.agent.SACModule
  init_args:
    prior: {class_path: covr_lightning.agent.NoPrior}
    augmentation: {class_path: covr_lightning.agent.RandomCrop, init_args: {size: 32}}
    hidden: 16
    filters: 4
trainer: {accelerator: cpu, enable_progress_bar: false, log_every_n_steps: 10}
"""


def command(tmp_path: Path, name: str, options: dict[str, Any] | None = None, runs: Path | None = None) -> list[str]:
    """The command line of a small run in `tmp_path`, saved as `options` of RunCheckpoint say."""
    config = yaml.safe_load(SETTINGS)
    if options is not None:
        config["trainer"]["callbacks"] = [
            {"class_path": "covr_lightning.callbacks.RunCheckpoint", "init_args": options}
        ]
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return [name, "--config", str(path), "--runs_dir", str(runs or tmp_path), "--name", "run"]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())
