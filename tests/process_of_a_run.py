"""One of several processes of a run: `covr`, and afterwards what this process holds as a file.

process_of_a_run.py OUT [ENV_STEPS SIGNAL | training SIGNAL | save ENV_STEPS] -- ARGUMENTS OF COVR, with torchrun's
environment variables, or as Lightning starts it. The first process takes $LATE_SECONDS longer to end.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from pathlib import Path

import torch

from covr_lightning import processes
from covr_lightning.agent import SACModule
from covr_lightning.cli import main
from covr_lightning.data import ExperienceData
from covr_lightning.data.experience import Experience
from covr_lightning.finetune.module import VLMFineTuner

played: list[int] = []


def watch_evaluations() -> None:
    original = SACModule.validation_step

    def step(module: SACModule, seed: int, batch_idx: int = 0) -> object:
        if seed >= 0:
            played.append(int(seed))
        return original(module, seed, batch_idx)

    SACModule.validation_step = step  # type: ignore[method-assign, assignment]


def write_at_the_end(folder: Path) -> None:
    def on_train_end(module: SACModule) -> None:
        data: ExperienceData = module.trainer.datamodule  # type: ignore[attr-defined]
        rows = data.storage.get(range(len(data.storage)))
        held = {
            "weights": dict(module.state_dict()),
            "counters": data.counters.state_dict(),
            "envs": sorted(set(rows["env"].tolist())),
            "actions": rows["action"],
            "pixels": rows["pixels"],
            "next_pixels": rows["next", "pixels"],
            "done": rows["next", "done"],
            "rewards": rows["next", "reward"],
            "played": played,
            "batch_size": data.experience.replay._batch_size,  # type: ignore[union-attr]
            "global_step": module.trainer.global_step,
        }
        torch.save(held, folder / f"process_{processes.number()}.pt")

    SACModule.on_train_end = on_train_end  # type: ignore[method-assign, assignment]


def stop_at(env_steps: int, signum: signal.Signals) -> None:
    """Send a signal to this process alone, and to no other of the run."""
    original = ExperienceData._store

    def store(data: ExperienceData, *args: object) -> int:
        if data.counters.env_steps == env_steps:
            os.kill(os.getpid(), signum)
        return original(data, *args)  # type: ignore[arg-type]

    ExperienceData._store = store  # type: ignore[method-assign, assignment]


def stop_in_training(signum: signal.Signals) -> None:
    """Send a signal to this process alone in the first batch of a round."""
    original = VLMFineTuner.loss

    def loss(tuner: VLMFineTuner, *args: object, **kwargs: object) -> object:
        if not tuner.losses:
            os.kill(os.getpid(), signum)
        return original(tuner, *args, **kwargs)  # type: ignore[arg-type]

    VLMFineTuner.loss = loss  # type: ignore[method-assign, assignment]


def fail_to_save_at(env_steps: int) -> None:
    """Have this process alone run out of disk."""
    original = Experience.save

    def save(experience: Experience) -> object:
        if experience._counters.env_steps == env_steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(experience)

    Experience.save = save  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    dashes = sys.argv.index("--")
    own, arguments = sys.argv[1:dashes], sys.argv[dashes + 1 :]
    watch_evaluations()
    write_at_the_end(Path(own[0]))
    if len(own) > 1 and os.environ.get("LOCAL_RANK") == "1":
        match own[1]:
            case "training":
                stop_in_training(signal.Signals[own[2]])
            case "save":
                fail_to_save_at(int(own[2]))
            case env_steps:
                stop_at(int(env_steps), signal.Signals[own[2]])
    status = main(arguments)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        time.sleep(float(os.environ.get("LATE_SECONDS", "0")))
    sys.exit(status)
