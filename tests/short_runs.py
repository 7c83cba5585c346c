"""A whole run that takes seconds: COVR on cartpole with 40×40 pixels with a VLM of random weights."""

from __future__ import annotations

import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from tensordict import TensorDictBase

from covr_lightning.cli import main
from covr_lightning.data.frame_storage import FrameStackStorage
from covr_lightning.data.replay_parts import ReplayParts
from covr_lightning.saving.checkpoints import load_checkpoint
from covr_lightning.saving.manifest import manifests_of

# 40 environment steps an agent step, so an episode has 25 of them and the run 150; rounds after 30 and 90 agent steps;
# guidance from the first round on.
SMALL_SETTINGS = {
    "--config": "quickstart.yaml",
    "--seed_everything": "0",
    "--data.seed": "0",
    "--model.seed": "0",
    "--data.max_env_steps": "6000",
    "--data.env.action_repeat": "40",
    "--data.warmup_agent_steps": "20",
    "--data.batch_size": "8",
    "--data.env.size": "40",
    "--data.eval_every_env_steps": "3000",
    "--data.eval_episodes": "1",
    "--data.label_every_agent_steps": "2",
    "--data.label_batch_size": "8",
    "--model.augmentation.size": "32",
    "--model.hidden": "16",
    "--model.filters": "4",
    "--trainer.log_every_n_steps": "10",
    "--trainer.enable_progress_bar": "false",
    "--trainer.accelerator": "cpu",
}
SMALL = [part for setting in SMALL_SETTINGS.items() for part in setting]


def fit(folder: Path, vlm: Path, *more: str) -> int:
    """Run it in this process."""
    return main(fit_arguments(folder, vlm, *more))


def fit_arguments(folder: Path, vlm: Path, *more: str) -> list[str]:
    """Its command line."""
    return ["fit", *SMALL, "--runs_dir", str(folder), "--vlm.path", str(vlm), *short_rounds(folder), *more]


def short_rounds(folder: Path) -> list[str]:
    """A config that shortens the rounds: nested callback settings compose from a second file."""
    path = folder / "short.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(
        """
trainer:
  callbacks:
    - class_path: covr_lightning.callbacks.ProgressiveFineTune
      init_args:
        schedule: {class_path: covr_lightning.finetune.LinearSchedule, init_args: {psi0_env_steps: 1200}}
        filter: {class_path: covr_lightning.finetune.KeepAll}
        entropy_states: 16
        settings: {epochs: 1, max_steps: 2, batch_size: 4, accumulate: 1, lr: 1.0e-3, held_out: 0.2,
                   gradient_checkpointing: false}
"""
    )
    return ["--config", str(path), "--name", "run"]


def replay(run: Path) -> TensorDictBase:
    """All rows of the last checkpoint's replay, with their stacked observations."""
    [manifest] = manifests_of(load_checkpoint(run / "checkpoints" / "last.ckpt"))
    storage = FrameStackStorage(manifest["max_size"])
    ReplayParts(run / "replay").restore(storage, manifest)
    return storage.get(range(len(storage)))


def env_steps_saved(checkpoint: Path) -> int:
    """Environment steps at which it was saved; −1 without one."""
    if not checkpoint.exists():
        return -1
    return torch.load(checkpoint, weights_only=True, mmap=True)["ExperienceData"]["counters"]["env_steps"]


def kill_after(process: BaseProcess, checkpoint: Path, env_steps: int, seconds: float) -> None:
    """Kill −9 a run, `seconds` after it has saved at `env_steps` or later, and in any case something new.

    The moment hangs on what the run has done, not on how fast it goes, so the run cannot be over before.
    """
    needed, seen = max(env_steps, env_steps_saved(checkpoint) + 1), 0
    while True:
        written = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        if written != seen and env_steps_saved(checkpoint) >= needed:
            break
        seen = written
        assert process.is_alive(), f"the run was over before it had saved at {needed} environment steps"
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run was over before it was killed"
