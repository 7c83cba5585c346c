"""`covr export`: the policy alone, as torch.export and ONNX files that need nothing of this package.

At test time the small actor acts alone (the paper's Table 17). What is written takes the observation as the environment
gives it, (B, 3·k, H, W) uint8, and returns the deterministic action tanh μ, (B, A) in [−1, 1]: scaling and centring are
inside.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from covr_lightning.agent.sac import SACModule
from covr_lightning.errors import ConfigError

#: What is written: torch.export's archive, and ONNX.
POLICY_FILES = ("policy.pt2", "policy.onnx")
#: Frames that a written file is compared with the module on, and the largest difference of an action that is accepted.
CHECKED_FRAMES = 100
TOLERANCE = 1e-4


class Policy(nn.Module):
    """The deterministic actor as one module.

    Args:
        agent: Whose encoder and actor it takes.
    """

    def __init__(self, agent: SACModule) -> None:
        super().__init__()
        self.augmentation = agent.augmentation
        self.trunk, self.projection, self.actor = agent.trunk, agent.actor_projection, agent.actor

    def forward(self, pixels: Tensor) -> Tensor:
        """The action (B, A) of an observation (B, 3·k, H, W) uint8."""
        return torch.tanh(self.actor(self.projection(self.trunk(self.augmentation.centre(pixels))))[0])


@dataclass(frozen=True)
class Exported:
    """One written file.

    Attributes:
        path: The file.
        megabytes: Its size, 10⁶ bytes.
        milliseconds: Median time of one action, batch 1, on the CPU.
        difference: Largest difference of an action from the module's, over the frames compared.
    """

    path: Path
    megabytes: float
    milliseconds: float
    difference: float


def export_policy(agent: SACModule, folder: Path, seed: int = 0) -> list[Exported]:
    """Write ``policy.pt2`` (torch.export) and ``policy.onnx``, and check both against the module.

    Args:
        agent: The trained agent.
        folder: Where to write.
        seed: Of the frames that they are compared on.

    Raises:
        ConfigError: The packages for ONNX are missing.
        RuntimeError: A written file gives other actions than the module.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f'Exporting needs ONNX ({error.name} is missing): pip install "covr_lightning[export]".'
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    policy, spec = Policy(agent).cpu().eval(), agent.spec
    shape = (CHECKED_FRAMES, spec.channels, spec.frame_height, spec.frame_width)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    example = frames[:2].clone()  # a view would take all frames into the file
    batch = {"pixels": {0: torch.export.Dim("batch", min=1, max=4096)}}

    program = torch.export.export(policy, (example,), dynamic_shapes=batch)
    pt2, onnx = (folder / name for name in POLICY_FILES)
    torch.export.save(program, pt2)
    loaded = torch.export.load(pt2).module()

    torch.onnx.export(
        policy, (example,), str(onnx), dynamo=True, dynamic_shapes=batch, input_names=["pixels"],
        output_names=["action"], external_data=False, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])

    def run_onnx(pixels: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {"pixels": pixels.numpy()})[0]))

    with torch.no_grad():
        wanted = policy(frames)
        return [_checked(path, run, frames, wanted) for path, run in ((pt2, loaded), (onnx, run_onnx))]


def open_policy(file: Path, device: torch.device) -> tuple[Callable[[Tensor], object], tuple[int, ...]]:
    """Open what :func:`export_policy` wrote.

    Args:
        file: policy.pt2 or policy.onnx.
        device: Where policy.pt2 is to run; policy.onnx runs on the CPU.

    Returns:
        What turns observations (B, C, H, W) uint8, on that device, into actions (B, A); and (C, H, W).

    Raises:
        ConfigError: The file cannot be read, or ONNX Runtime is missing.
    """
    if file.suffix == ".onnx" and find_spec("onnxruntime") is None:
        raise ConfigError(f'Running {file} needs ONNX Runtime: pip install "covr_lightning[export]".')
    try:
        return _open_onnx(file) if file.suffix == ".onnx" else _open_pt2(file, device)
    except Exception as error:  # neither reader has an exception of its own
        kind = type(error).__name__
        raise ConfigError(f"The policy {file} cannot be read ({kind}): `covr export` writes it.") from error


def _open_pt2(file: Path, device: torch.device) -> tuple[Callable[[Tensor], object], tuple[int, ...]]:
    program = torch.export.load(file)
    assert program.example_inputs is not None, "export_policy gave an example"
    (example,), _ = program.example_inputs
    if device.type != "cpu":
        program = move_to_device_pass(program, device)
    return torch.inference_mode()(program.module()), tuple(example.shape[1:])


def _open_onnx(file: Path) -> tuple[Callable[[Tensor], object], tuple[int, ...]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (pixels,) = session.get_inputs()
    return lambda batch: np.asarray(session.run(None, {pixels.name: batch.numpy()})[0]), tuple(pixels.shape[1:])


def _checked(path: Path, run: Callable[[Tensor], Tensor], frames: Tensor, wanted: Tensor) -> Exported:
    one_by_one = torch.cat([run(frame[None]) for frame in frames])
    difference = max(float((run(frames) - wanted).abs().max()), float((one_by_one - wanted).abs().max()))
    if not difference <= TOLERANCE:
        path.unlink()
        raise RuntimeError(f"{path.name} differs from the policy by {difference:.2g} in an action; it is not kept.")
    times = []
    for frame in frames:
        start = time.perf_counter()
        run(frame[None])
        times.append(time.perf_counter() - start)
    return Exported(path, path.stat().st_size / 1e6, 1000 * statistics.median(times), difference)
