"""`covr export`: the policy alone, as torch.export and ONNX files that need nothing of this package.

At test time the small actor acts alone (the paper's Table 17). What is written takes the observation as the environment
gives it, (B, 3·k, H, W) uint8, and returns the deterministic action tanh μ, (B, A) in [−1, 1]: scaling and centring are
inside. An actor that reads its previous action (ResAct) takes that as a second input, ``previous_action`` (B, A), zero
at an episode's first step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from covr_lightning.agent.networks import frozen
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

    def forward(self, pixels: Tensor, previous_action: Tensor | None = None) -> Tensor:
        """The action (B, A) of an observation (B, 3·k, H, W) uint8 and, if the actor reads it, of the action before."""
        z = self.projection(self.trunk(self.augmentation.centre(pixels)))
        return torch.tanh(self.actor(z, previous_action)[0])


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
        ConfigError: The packages for ONNX are missing, or the folder cannot be made.
        RuntimeError: A written file gives other actions than the module.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f'Exporting needs ONNX ({error.name} is missing): pip install "covr_lightning[export]".'
        ) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The folder {folder} cannot be made ({error.strerror}); give another --out.") from error
    policy, spec = Policy(agent).cpu().eval(), agent.spec
    generator = torch.Generator().manual_seed(seed)
    shape = (CHECKED_FRAMES, spec.channels, spec.frame_height, spec.frame_width)
    inputs = {"pixels": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)}
    if agent.needs_previous_action:
        inputs["previous_action"] = torch.rand(CHECKED_FRAMES, spec.action_dim, generator=generator) * 2 - 1
    example = tuple(value[:2].clone() for value in inputs.values())  # a view would take all frames into the file
    batch = torch.export.Dim("batch", min=1, max=4096)
    shapes = {name: {0: batch} for name in inputs}

    try:
        # What was there stays until all is checked; what is read again takes no gradients.
        with frozen(policy), TemporaryDirectory(dir=folder, prefix=".export-") as part:
            pt2, onnx = (Path(part, name) for name in POLICY_FILES)
            torch.export.save(torch.export.export(policy, example, dynamic_shapes=shapes), pt2)
            loaded = torch.export.load(pt2).module()
            torch.onnx.export(
                policy, example, str(onnx), dynamo=True, dynamic_shapes=shapes, input_names=[*inputs],
                output_names=["action"], external_data=False, verbose=False,
            )  # fmt: skip
            session = onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])

            def run_onnx(*values: Tensor) -> Tensor:
                given = {name: value.numpy() for name, value in zip(inputs, values, strict=True)}
                return torch.from_numpy(np.asarray(session.run(None, given)[0]))

            with torch.no_grad():
                wanted = policy(*inputs.values())
                exported = [
                    _checked(path, run, [*inputs.values()], wanted) for path, run in ((pt2, loaded), (onnx, run_onnx))
                ]
            return [replace(one, path=one.path.replace(folder / one.path.name)) for one in exported]
    except OSError as error:
        raise ConfigError(
            f"The policy cannot be written to {folder} ({error.strerror}); give another --out."
        ) from error


def open_policy(file: Path, device: torch.device) -> tuple[Callable[[Tensor], object], tuple[int, ...]]:
    """Open what :func:`export_policy` wrote.

    Args:
        file: policy.pt2 or policy.onnx.
        device: Where policy.pt2 is to run; policy.onnx runs on the CPU.

    Returns:
        What turns observations (B, C, H, W) uint8, on that device, into actions (B, A), the previous action being zero
        where one is read; and (C, H, W).

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
    (pixels, *others), _ = program.example_inputs
    if device.type != "cpu":
        program = move_to_device_pass(program, device)
    module = program.module()

    def run(batch: Tensor) -> Tensor:
        return module(batch, *(torch.zeros(len(batch), *other.shape[1:], device=batch.device) for other in others))

    return torch.inference_mode()(run), tuple(pixels.shape[1:])


def _open_onnx(file: Path) -> tuple[Callable[[Tensor], object], tuple[int, ...]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    pixels, *others = session.get_inputs()

    def run(batch: Tensor) -> object:
        zeros = {other.name: np.zeros((len(batch), *other.shape[1:]), np.float32) for other in others}
        return np.asarray(session.run(None, {pixels.name: batch.numpy(), **zeros})[0])

    return run, tuple(pixels.shape[1:])


def _checked(path: Path, run: Callable[..., Tensor], inputs: list[Tensor], wanted: Tensor) -> Exported:
    rows = list(zip(*(value.split(1) for value in inputs), strict=True))
    one_by_one = torch.cat([run(*row) for row in rows])
    difference = max(float((run(*inputs) - wanted).abs().max()), float((one_by_one - wanted).abs().max()))
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{path.name} differs from the policy by {difference:.2g} in an action; it is not kept.")
    times = []
    for row in rows:
        start = time.perf_counter()
        run(*row)
        times.append(time.perf_counter() - start)
    return Exported(path, path.stat().st_size / 1e6, 1000 * statistics.median(times), difference)
