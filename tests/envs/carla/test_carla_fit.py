"""`covr fit --config carla_gp.yaml` over the real client and the real wire protocol."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.envs.carla.processes import NOTHING, Loopback, environment, watch

SMALL = """
data:
  init_args:
    max_env_steps: 320
    warmup_agent_steps: 16
    batch_size: 8
    eval_every_env_steps: 160
    eval_episodes: 1
    label_every_agent_steps: 2
model:
  init_args:
    filters: 4
    hidden: 16
    prior: {class_path: covr_lightning.agent.DelayedPrior, init_args: {lam: 2.0, after_rounds: 1}}
trainer:
  enable_progress_bar: false
  log_every_n_steps: 10
  callbacks:
    - class_path: covr_lightning.callbacks.ProgressiveFineTune
      init_args:
        schedule: {class_path: covr_lightning.finetune.LinearSchedule, init_args: {psi0_env_steps: 120}}
        filter: {class_path: covr_lightning.finetune.KeepAll}
        entropy_states: 16
        settings: {epochs: 1, max_steps: 2, batch_size: 4, accumulate: 1, gradient_checkpointing: false}
"""


@pytest.mark.timeout(600)
def test_a_short_training_on_the_ghost_pedestrian(
    carla_loopback: Callable[..., Loopback], untrained_vlm: Path, tmp_path: Path
) -> None:
    server = carla_loopback("ghost_pedestrian", 0, "--picture", "road")
    (tmp_path / "small.yaml").write_text(SMALL)
    command = [sys.executable, "-m", "covr_lightning.cli", "fit", "--config", "carla_gp.yaml", "--config", "small.yaml"]
    options = {
        "vlm.path": untrained_vlm,
        "vlm.lora.rank": 4,
        "data.env.port": server.port,
        "runs_dir": tmp_path / "runs",
    }
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(
        [*command, "--trainer.accelerator", "cpu"], cwd=tmp_path, env=environment(), capture_output=True, text=True,
        timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "carla_gp+small"
    with (run / "curve.csv").open() as file:
        curve = list(csv.DictReader(file))
    assert [int(row["env_steps"]) for row in curve] == [4, 160, 320]
    assert {"return", "distance", "collision", "lane_invasions"} <= curve[0].keys()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["task"] == "ghost-pedestrian"
    # One server for two environments: an evaluation takes it over, which is no loss.
    assert summary["lost_episodes"] == 0
    assert summary["rounds"][0]["env_steps"] >= 120
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert watch(server.port) == NOTHING, "the server is left as it was found"
