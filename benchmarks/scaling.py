"""Environment steps and updates a second against the number of environments and processes, on this machine.

    python -m benchmarks.scaling                  # every row; about four minutes on two cores
    python -m benchmarks.scaling --rows sync      # those whose name has this in it; the first row always

Each row is a `covr fit` of the plain agent on cartpole-swingup, 64×64 pixels, with an update every fourth agent step,
in a process of its own. The clock runs from the first update on, until the run's last step, so neither start nor
warm-up count. Trust the ratios, not the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L

from covr_lightning.cli import WAIT_POLICY
from covr_lightning.cli import main as covr

REPEAT, WARMUP, AGENT_STEPS = 8, 64, 320
PER_AGENT_STEP = 0.25
COMMON = {
    "--config": "dmc_rad.yaml",
    "--name": "scaling",
    "--data.env.task": "cartpole-swingup",
    "--data.env.size": "64",
    "--data.env.rendering": "fast",
    "--data.env.action_repeat": str(REPEAT),
    "--data.batch_size": "32",
    "--data.warmup_agent_steps": str(WARMUP),
    "--data.max_env_steps": str(REPEAT * (WARMUP + AGENT_STEPS)),
    "--data.updates_per_agent_step": str(PER_AGENT_STEP),
    "--data.eval_every_env_steps": "1000000",
    "--data.eval_episodes": "1",
    "--data.replay_capacity": "2000",
    "--model.augmentation": "NoAugmentation",
    "--model.hidden": "256",
    "--model.filters": "16",
    "--model.strides": "[2, 2, 1, 1]",
    "--trainer.accelerator": "cpu",
    "--trainer.enable_progress_bar": "false",
    "--trainer.log_every_n_steps": "1000",
}
ENV_PROCESSES = {"--data.collection": "OneCollector", "--data.collection.env_processes": "{}"}


@dataclass(frozen=True)
class Row:
    """A way to collect.

    Attributes:
        name: What is printed.
        envs: Environments of each process of the run.
        settings: What differs from `COMMON`.
        processes: Processes of the run, started by torchrun.
    """

    name: str
    envs: int
    settings: dict[str, str]
    processes: int = 1


def workers(kind: str) -> dict[str, str]:
    """Two workers."""
    return {"--data.collection": kind, "--data.collection.workers": "2"}


ROWS = [
    *(Row("one collector", envs, {}) for envs in (1, 2, 4)),
    *(Row("one collector, env_processes", envs, ENV_PROCESSES) for envs in (2, 4)),
    *(Row("SyncWorkers, 2 workers", envs, workers("SyncWorkers")) for envs in (2, 4)),
    *(Row("AsyncWorkers, 2 workers", envs, workers("AsyncWorkers")) for envs in (2, 4)),
    *(Row("2 processes (gloo)", envs, {"--trainer.devices": "2"}, processes=2) for envs in (1, 2)),
]


class Clock(L.Callback):
    """Writes down how long the steps and updates took."""

    def __init__(self) -> None:
        self._began: tuple[float, int, int] | None = None

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Begin at the first update."""
        counters = trainer.datamodule.counters  # type: ignore[attr-defined]
        if self._began is None and counters.grad_steps:
            self._began = time.perf_counter(), counters.env_steps, counters.grad_steps
        self._now = time.perf_counter(), counters.env_steps, counters.grad_steps

    def on_train_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Write."""
        assert self._began is not None, "there are updates"
        seconds, env_steps, updates = (now - began for now, began in zip(self._now, self._began, strict=True))
        if trainer.is_global_zero:
            measured = {"env_steps": env_steps / seconds, "updates": updates / seconds, "seconds": seconds}
            Path(os.environ["SCALING_OUT"]).write_text(json.dumps(measured))


def measure(row: Row) -> dict[str, float]:
    """Run it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        command = [sys.executable]
        if row.processes > 1:
            command += ["-m", "torch.distributed.run", f"--nproc-per-node={row.processes}"]
        command += [__file__, "--fit"]
        settings = COMMON | row.settings | {"--data.num_envs": str(row.envs), "--runs_dir": folder}
        command += [part for setting in settings.items() for part in setting]
        # As `covr` sets it, which is too late here: the callback's class has PyTorch imported before.
        surroundings = WAIT_POLICY | os.environ | {"SCALING_OUT": str(out)}
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False)
        if not out.exists():
            sys.exit(f"{row.name} failed:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="only rows whose name has this in it, and the first")
    given = parser.parse_args()
    rows = [row for row in ROWS if row is ROWS[0] or given.rows.lower() in row.name.lower()]
    if given.rows and len(rows) == 1 and given.rows.lower() not in ROWS[0].name.lower():
        parser.error(f"--rows is {given.rows!r}; rows are {'; '.join(dict.fromkeys(row.name for row in ROWS))}.")
    first: dict[str, float] | None = None
    print("| | environments | env steps/s | updates/s | against the first row |\n|---|---|---|---|---|")
    for row in rows:
        measured = measure(row)
        first = first or measured
        print(
            f"| {row.name} | {row.envs * row.processes} | {measured['env_steps']:.0f} | {measured['updates']:.1f} | "
            f"{measured['env_steps'] / first['env_steps']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fit"]:
        sys.argv[1:] = ["fit", *sys.argv[2:], "--trainer.callbacks+=__main__.Clock"]
        sys.exit(covr())
    main()
