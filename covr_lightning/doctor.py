"""`covr doctor`: what is there, what is missing, and whether the default job could run."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import subprocess
import sys
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from covr_lightning.rendering import INSTALL_HINT

_NEEDED = (
    "torch",
    "torchrl",
    "tensordict",
    "lightning",
    "torchmetrics",
    "transformers",
    "peft",
    "dm_control",
    "mujoco",
)
_OPTIONAL = ("bitsandbytes", "carla", "vllm", "ray")

# Runs in a process of its own: a broken OpenGL library may end it.
_RENDER = """
import logging; logging.getLogger("absl").setLevel(logging.ERROR)
from covr_lightning.envs import DMControl
import os
env = DMControl(size=64).make(0)
pixels = env.reset()["pixels"]
assert pixels[-3:].float().std() > 1, "the frame is of one colour"
print(os.environ.get("MUJOCO_GL", "default"), tuple(pixels.shape))
"""
_VLM = """
import torch
from covr_lightning.envs import DMControl
from covr_lightning.vlm.vlm import VLM
vlm = VLM(); vlm.load(DMControl().spec)
print(f"{sum(p.numel() for p in vlm.model.parameters()) / 1e6:.1f} million parameters; says "
      + repr(vlm.answer(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))[0]))
"""


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: What was looked at.
        ok: Whether it is there.
        detail: Version, device, or what to do.
        needed: Whether the default job needs it.
    """

    name: str
    ok: bool
    detail: str
    needed: bool = False


def doctor() -> int:
    """Print the report.

    Returns:
        1 if the default job could not run, else 0.
    """
    checks = [_python(), *_packages(), _rendering(), _gpu(), _vlm(), _carla_server()]
    table = Table(title="covr doctor")
    for column in ("", "what", "found"):
        table.add_column(column)
    for check in checks:
        mark = "[green]ok[/]" if check.ok else ("[red]missing[/]" if check.needed else "[yellow]not there[/]")
        table.add_row(mark, check.name, check.detail)
    Console().print(table)
    missing = [check.name for check in checks if check.needed and not check.ok]
    if missing:
        print(f"The default job (covr fit --config quickstart.yaml) cannot run: {', '.join(missing)}.")
        return 1
    print("The default job (covr fit --config quickstart.yaml) can run.")
    return 0


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("Python", (3, 11) <= sys.version_info[:2] <= (3, 12), f"{version} (3.11 and 3.12 work)", needed=True)


def _packages() -> list[Check]:
    checks = []
    for name in (*_NEEDED, *_OPTIONAL):
        try:
            version, ok = importlib.metadata.version(name), True
        except importlib.metadata.PackageNotFoundError:
            version, ok = "not installed", False
        if name == "mujoco" and ok and int(version.split(".")[0]) >= 4:
            version, ok = f"{version}, but dm_control needs mujoco below 4", False
        checks.append(Check(f"package {name}", ok, version, needed=name in _NEEDED))
    return checks


def _in_subprocess(code: str, seconds: float = 300) -> tuple[bool, str]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {seconds:.0f} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"ended with status {done.returncode}"


def _rendering() -> Check:
    ok, detail = _in_subprocess(_RENDER)
    return Check(
        "rendering", ok, f"a frame was rendered: {detail}" if ok else f"{detail} — {INSTALL_HINT}", needed=True
    )


def _vlm() -> Check:
    ok, detail = _in_subprocess(_VLM)
    return Check("embedded VLM", ok, detail, needed=True)


def _gpu() -> Check:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Check("GPU", True, ", ".join(names))
    return Check("GPU", False, "no CUDA device: training runs on the CPU")


def _carla_server() -> Check:
    host, port = os.environ.get("CARLA_HOST") or "127.0.0.1", os.environ.get("CARLA_PORT") or "2000"
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        return Check("CARLA server", False, f"CARLA_PORT is {port!r}; it must be 1 to 65535")
    try:
        with socket.create_connection((host, int(port)), timeout=2):
            return Check("CARLA server", True, f"something listens on {host}:{port}")
    except OSError:
        return Check("CARLA server", False, f"nothing listens on {host}:{port} (CARLA_HOST, CARLA_PORT)")
