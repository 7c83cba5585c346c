"""`covr benchmark inference`: memory and time an image of the VLM and of the exported policy (Table 17)."""

from __future__ import annotations

import csv
import math
import platform
from argparse import ArgumentError
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import transformers
from jsonargparse import ArgumentParser
from torch import Tensor

from covr_lightning.envs import TASKS, CarRacing, DMControl, EnvFactory, PointReach, Road
from covr_lightning.errors import ConfigError
from covr_lightning.export import POLICY_FILES, open_policy
from covr_lightning.measuring import Measured, measure, weights_megabytes
from covr_lightning.random_state import own_randomness
from covr_lightning.vlm.decoding import Decoder, Decoding, greedy_answers
from covr_lightning.vlm.prompts import POINT_REACH, prompt_for
from covr_lightning.vlm.vlm import VLM
from covr_lightning.yaml_errors import one_sentence

#: Fewest calls that a median is taken of.
FEWEST_CALLS = 5
_OTHERS: dict[str, Callable[[], EnvFactory]] = {
    "highway": lambda: Road("highway"),
    "ghost-pedestrian": lambda: Road("ghost_pedestrian"),
    "carracing": CarRacing,
    POINT_REACH: PointReach,
}


@dataclass(frozen=True)
class Row:
    """One line of the table; NaN is what was not measured.

    Attributes:
        what: What was asked, and how.
        pictures: Where its pictures came from.
        device: What it ran on.
        batch_size: Pictures per call.
        weights_mb: Its weights, 10⁶ bytes; of an exported policy the size of the file.
        working_mb: Peak memory of a call above what was taken before it, 10⁶ bytes (see
            :func:`~covr_lightning.measuring.working_megabytes`).
        total_mb: Both together.
        seconds_an_image: Median over calls of a call's time by its pictures.
        deviation: Standard deviation of the same.
        calls: Calls measured; 0 is a published figure.
    """

    what: str
    pictures: str
    device: str
    batch_size: int
    weights_mb: float
    working_mb: float
    total_mb: float
    seconds_an_image: float
    deviation: float
    calls: int


def _published(what: str, seconds: float, deviation: float, megabytes: float) -> Row:
    nan = math.nan
    return Row(f"published: {what}", "the paper's", "the paper's", 1, nan, nan, megabytes, seconds, deviation, 0)


#: The paper's Table 17: mean, standard deviation, memory. Our notes of the paper do not name its machine.
PUBLISHED = (
    _published("Qwen2.5-VL-3B", 4.4409, 0.7023, 8344),
    _published("Qwen2-VL-2B", 4.9421, 0.6146, 7060),
    _published("LLaVA-1.5-7B", 3.6634, 1.0392, 14722),
    _published("policy", 0.0012, 0.0003, 10),
)


def benchmark(arguments: list[str]) -> int:
    """Run ``covr benchmark``.

    Args:
        arguments: What follows it on the command line.

    Raises:
        ConfigError: An argument cannot work.

    Returns:
        Exit status.
    """
    if arguments[:1] not in (["inference"], ["-h"], ["--help"]):
        raise ConfigError(
            f"Unknown benchmark {' '.join(arguments[:1])!r}; `covr benchmark` can be followed by inference."
        )
    parser = _parser()
    try:
        given = parser.parse_args(arguments[1:] if arguments[0] == "inference" else arguments)
    except ArgumentError as error:
        raise ConfigError(one_sentence(str(error), parser)) from error
    device = _device(given.device)
    if min(given.batch_size) < 1 or given.images < max(given.batch_size):
        raise ConfigError(
            f"--images is {given.images} and --batch_size {' '.join(map(str, given.batch_size))}; there must be at "
            "least as many images as the largest batch takes, and each batch takes at least 1."
        )
    if given.out is not None and given.out.is_dir():
        raise ConfigError(f"--out is {str(given.out)!r}, which is a folder; it must be the name of a CSV to write.")
    transformers.utils.logging.disable_progress_bar()
    policies = _policy_files(given.policy)
    frames, source = pictures(given.task, given.images)
    rows = vlm_rows(VLM(given.vlm.path, dtype=given.vlm.dtype), given.task, frames, source, given.batch_size, device)
    for file in policies:
        rows += policy_rows(file, given.batch_size, given.images, device)
    _print([*rows, *PUBLISHED])
    if given.out is not None:
        _write([*rows, *PUBLISHED], given.out)
    return 0


def pictures(task: str, count: int) -> tuple[Tensor, str]:
    """Frames of a task's environment under random actions, or random pixels where it cannot be drawn.

    Args:
        task: One that has a prompt.
        count: Number of frames N.

    Returns:
        (N, 3, H, W) uint8, and what they are.

    Raises:
        ConfigError: The task has no prompt.
    """
    try:
        prompt_for(task)
    except ConfigError as error:
        raise ConfigError(str(error).replace("YAML key vlm.prompt", "--task")) from error
    factory = _factory(task)
    with own_randomness(0):
        try:
            rollout = factory.make(seed=0).rollout(count, break_when_any_done=False)
            return rollout["pixels"][:, -3:], f"frames of {task}"
        except ConfigError:
            shape = (count, 3, factory.spec.frame_height, factory.spec.frame_width)
            return torch.randint(0, 256, shape, dtype=torch.uint8), "random pixels"


def vlm_rows(
    vlm: VLM, task: str, frames: Tensor, source: str, batch_sizes: Iterable[int], device: torch.device
) -> list[Row]:
    """Measure a VLM: the library's generate one by one, as the paper did, and this package's labelling in batches.

    Args:
        vlm: Not loaded yet.
        task: Whose prompt it is asked.
        frames: (N, 3, H, W) uint8.
        source: What they are.
        batch_sizes: Frames per call of labelling.
        device: Where to ask.
    """
    vlm.to(device)
    vlm.load(_factory(task).spec)
    ways: list[tuple[str, int, Callable[[Tensor], object]]] = [
        ("generate", 1, lambda batch: greedy_answers(vlm.model, vlm.inputs, vlm.codec, batch, device))
    ]
    for batch_size in batch_sizes:
        for constrained in (False, True):
            decoder = Decoder(vlm.inputs, vlm.codec, Decoding(constrained=constrained))
            decoder.answers(vlm.model, frames[:1], device)  # settles its way
            way = f"labelling ({decoder.way}{', constrained' if constrained else ''})"
            ways.append((way, batch_size, partial(decoder.answers, vlm.model, device=device)))
    millions = sum(parameter.numel() for parameter in vlm.model.parameters()) / 1e6
    dtype = str(vlm.model.dtype).removeprefix("torch.")
    weights = weights_megabytes(vlm.model)
    rows = []
    for way, batch_size, ask in ways:
        measured = _in_batches(ask, frames, batch_size, device)
        what = f"{vlm.path} ({millions:.1f} M parameters, {dtype}): {way}"
        rows.append(_row(what, source, device, batch_size, weights, measured))
    return rows


def policy_rows(file: Path, batch_sizes: Iterable[int], images: int, device: torch.device) -> list[Row]:
    """Measure one file of ``covr export`` on random pixels.

    Args:
        file: policy.pt2, or policy.onnx, which runs on the CPU whatever the device.
        batch_sizes: Observations per call.
        images: Number of different observations.
        device: Where to run policy.pt2.

    Raises:
        ConfigError: The file is not what `covr export` writes, or ONNX Runtime is missing.
    """
    device = torch.device("cpu") if file.suffix == ".onnx" else device
    run, shape = open_policy(file, device)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, *shape), dtype=torch.uint8, generator=generator).to(device)
    weights = file.stat().st_size / 1e6
    return [
        _row(file.name, "random pixels", device, size, weights, _in_batches(run, pixels, size, device))
        for size in batch_sizes
    ]


def _in_batches(ask: Callable[[Tensor], object], frames: Tensor, batch_size: int, device: torch.device) -> Measured:
    calls = max(FEWEST_CALLS, math.ceil(len(frames) / batch_size))
    places = [(torch.arange(batch_size) + n * batch_size) % len(frames) for n in range(calls)]
    batches = [frames[place] for place in places]
    return measure(lambda n: ask(batches[n]), calls, device)


def _row(what: str, source: str, device: torch.device, batch_size: int, weights: float, measured: Measured) -> Row:
    seconds, deviation = measured.median / batch_size, measured.deviation / batch_size
    working, calls = measured.working_mb, len(measured.seconds)
    name = _device_name(device)
    return Row(what, source, name, batch_size, weights, working, weights + working, seconds, deviation, calls)


def _policy_files(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    if not folder.is_dir():
        raise ConfigError(f"--policy is {str(folder)!r}: there is no such folder.")
    files = [folder / name for name in POLICY_FILES if (folder / name).is_file()]
    if not files:
        raise ConfigError(
            f"--policy is {str(folder)!r}, where neither {' nor '.join(POLICY_FILES)} is: `covr export` writes them."
        )
    return files


def _factory(task: str) -> EnvFactory:
    return DMControl(task) if task in TASKS else _OTHERS[task]()


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is 'cuda', but PyTorch sees no CUDA device; it can be auto or cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="covr benchmark inference",
        description="Memory and time an image, of a VLM and of an exported policy (the paper's Table 17).",
        exit_on_error=False,
    )
    parser.add_argument(
        "--vlm.path", type=str, default="embedded", help="embedded, a Hugging Face folder or a hub name"
    )
    parser.add_argument(
        "--vlm.dtype", type=Literal["float32", "bfloat16"], default="float32", help="of the VLM's weights"
    )
    parser.add_argument("--task", type=str, default="cartpole-swingup", help="whose prompt and frames the VLM gets")
    parser.add_argument("--policy", type=Path | None, default=None, help="folder that `covr export` wrote")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 32], help="pictures per call")
    parser.add_argument("--images", type=int, default=32, help="different pictures")
    parser.add_argument("--out", type=Path | None, default=None, help="CSV to write")
    return parser


def _print(rows: list[Row]) -> None:
    print("| what | pictures | device | batch | weights MB | working MB | total MB | seconds an image |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        megabytes = (
            f"{value:.1f}" if value == value else "–" for value in (row.weights_mb, row.working_mb, row.total_mb)
        )
        time = f"{row.seconds_an_image:.4f} ± {row.deviation:.4f}"
        print(f"| {' | '.join((row.what, row.pictures, row.device, str(row.batch_size), *megabytes, time))} |")


def _write(rows: list[Row], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
