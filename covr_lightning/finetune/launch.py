"""Training an adapter in processes of its own: the rows go over on disk, and the adapter comes back on disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from tensordict import TensorDict
from torch import Tensor

from covr_lightning.errors import ConfigError, check_positive
from covr_lightning.finetune import supervisor
from covr_lightning.finetune.module import FineTuneSettings
from covr_lightning.finetune.saved_rows import RowsOfRound, save_rows
from covr_lightning.saving.round_files import RoundFiles
from covr_lightning.vlm.vlm import VLM

#: What would make a child believe that it is a process of the job that starts it.
_OF_A_LAUNCHER = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK",
    "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "PL_GLOBAL_SEED",
)  # fmt: skip
_PREFIXES_OF_A_LAUNCHER = ("MASTER_", "ROLE_", "TORCHELASTIC_")


@dataclass
class SeparateLaunch:
    """Trains a round's adapter by ``covr fit --config vlm_sft.yaml`` in a subprocess, on devices of its own.

    Rows, weights, settings and the VLM's description go over in a folder ``round_NNN_job`` beside the adapter; the
    config says on what it runs (``trainer``). The round itself stays here: what is kept, held out and weighed, and the
    measuring before and after. The folder is removed after a success; after a failure it stays, with ``output.log``.

    Attributes:
        config: A config of saved rows; its ``trainer`` and what `arguments` set hold, its ``vlm``, ``data`` and
            ``settings`` give way to those of this run.
        command: What runs ``covr``; by default ``[PYTHON, -m, covr_lightning.cli]``, with torchrun
            ``[torchrun, --nproc-per-node=8, -m, covr_lightning.cli]``. No shell reads it.
        arguments: More arguments, e.g. ``[--trainer.devices, "8", --trainer.strategy, ddp]``.
        timeout_minutes: After that the training counts as failed, and is stopped.
    """

    config: str = "vlm_sft.yaml"
    command: list[str] = field(default_factory=lambda: [sys.executable, "-m", "covr_lightning.cli"])
    arguments: list[str] = field(default_factory=list)
    timeout_minutes: float = 240.0

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if not self.command:
            raise ConfigError("launch.command is an empty list; it must name a program.")
        check_positive("launch.timeout_minutes", self.timeout_minutes)

    def train(
        self,
        vlm: VLM,
        frames: Tensor,
        actions: Tensor,
        weights: Tensor,
        settings: FineTuneSettings,
        round_: int,
        env_steps: int,
        adapter: Path,
    ) -> tuple[list[float], list[str]]:
        """Train the adapter elsewhere and put it in force; after a failure the one before stays in force.

        Args:
            vlm: Gets the trained adapter.
            frames: (N, 3, H, W) uint8.
            actions: (N, A).
            weights: (N,) ≥ 0.
            settings: How to train.
            round_: The round's number.
            env_steps: Environment steps at which it is due.
            adapter: Folder where the trained adapter shall lie.

        Returns:
            As :func:`~covr_lightning.finetune.training.train_adapter`.
        """
        job = adapter.with_name(f"round_{round_:03d}_job")
        shutil.rmtree(job, ignore_errors=True)  # of a run that was stopped in this round
        job.mkdir(parents=True)
        rows = TensorDict({"frame": frames, "action": actions}, [len(frames)])
        save_rows(job / "rows.safetensors", RowsOfRound(rows, weights, 0.0, round_, env_steps, vlm.spec))
        config = _config(vlm, replace(settings, held_out=0.0), job)
        (job / "job.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
        command = [
            *self.command, "fit", "--config", self.config, "--config", str(job / "job.yaml"), *self.arguments,
        ]  # fmt: skip
        why = _run(command, job / "output.log", 60 * self.timeout_minutes)
        trained = RoundFiles(job / "run" / "rounds", round_)
        try:
            report = json.loads(trained.report.read_text()) if not why else {}
            failures = report.get("failures", [])
            if not why:
                shutil.rmtree(adapter, ignore_errors=True)  # of a run that was stopped in this round
                trained.adapter.rename(adapter)
                vlm.load_adapter(adapter, round_)
        except (OSError, ValueError) as error:  # a ConfigError is a ValueError
            shutil.rmtree(adapter, ignore_errors=True)
            why, failures = f"it ended well, but its adapter cannot be used ({error})", []
        if why:
            return [], [f"the separate launch failed: {why}; see {job / 'output.log'}"]
        shutil.rmtree(job)
        return report["losses"], failures


def _config(vlm: VLM, settings: FineTuneSettings, job: Path) -> dict[str, Any]:
    """The part of the child's config that this run knows, as plain values."""
    assert vlm.prompt is not None, "load comes first"
    lora, prompt = asdict(vlm.lora), asdict(vlm.prompt)
    lora["targets"] = lora["targets"] if isinstance(lora["targets"], str) else list(lora["targets"])
    prompt["action_names"] = list(prompt["action_names"])
    before = vlm.adapter_folder(job / "adapter_before")
    package = "covr_lightning.finetune"
    return {
        "runs_dir": str(job),
        "name": "run",
        "vlm": {
            "path": vlm.path, "dtype": vlm.dtype, "quantization": vlm.quantization, "lora": lora, "prompt": prompt,
            "image_position": vlm.image_position, "adapter": None if before is None else str(before), "engine": None,
            "frames": vlm.frames,
        },
        "data": {
            "class_path": f"{package}.SavedRows",
            "init_args": {
                "rows": str(job / "rows.safetensors"), "score": None, "entropy": None,
                "filter": {"class_path": f"{package}.KeepAll"}, "weight": {"class_path": f"{package}.ScoreAsWeight"},
            },
        },
        "model": {"class_path": f"{package}.VLMFineTuner", "init_args": {"settings": asdict(settings)}},
    }  # fmt: skip


def _run(command: list[str], log: Path, seconds: float) -> str:
    """Run a command to its end or to the time limit; why it failed, or nothing. It does not outlive this process."""
    read, write = os.pipe()  # closed by the system when this process is gone, which ends the command
    supervised = [sys.executable, "-I", supervisor.__file__, str(read), *command]
    with log.open("wb") as output, os.fdopen(read), os.fdopen(write, "wb"):
        # A session of its own, so that whatever it starts can be stopped with it.
        process = subprocess.Popen(
            supervised, env=_environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True, pass_fds=(read,),
        )  # fmt: skip
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"it was stopped after {seconds / 60:g} minutes"
        finally:
            _stop(process)
    if status == 0:
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    ended = f"status {status}" if status > 0 else f"signal {signal.Signals(-status).name}"
    return f"it ended with {ended} ({last[:300]})"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the supervisor and all that the command has started: first asked to, for torchrun ends its workers then."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=supervisor.SECONDS_TO_STOP + 5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _environment() -> dict[str, str]:
    """This process's environment without what tells a child that it is one of several."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_A_LAUNCHER and not name.startswith(_PREFIXES_OF_A_LAUNCHER)
    }
