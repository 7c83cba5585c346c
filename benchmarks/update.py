"""One pixel-SAC update against RAD's published code and against what the processor can do.

    python -m benchmarks.update --rad FOLDER        # FOLDER: a checkout of github.com/MishaLaskin/rad
    python -m benchmarks.update                     # without RAD
    python -m benchmarks.update --device cuda       # on a GPU: updates a second, and the share of time it computes
    python -m benchmarks.update --device cuda --kernels 20 --batch 512      # and where that goes, kernel by kernel

RAD's setting with a crop: frames of 100×100 from a replay, cropped to 84×84×9, 32 filters, hidden 1024, actor and
targets at every second update. A time is half of that of a pair of updates (one with and one without the actor),
sampling and cropping included: the least of all pairs, as other work on the machine can only add to it, and the median.
Processor time is that of all threads together, and the better measure where other work takes the cores; a thread that
waits actively, as OpenMP's do by default, is counted as well.

Each row is a process of its own: ``ours`` with the settings that ``covr`` gives it, ``RAD`` with those that ``python
train.py`` gives it, and for comparison both the other way, and ours with ``--trainer.precision bf16-mixed``. The
processes take turns, so that other work on the machine meets them all.

The floor is the arithmetic alone: operations counted by PyTorch's FlopCounterMode in an update, divided by what the
same processor does in the update's second convolution (at the best of three batch sizes) and in a matrix product as the
hidden layers' (of 512 rows at least), at their best over the turns. Nothing that computes the same numbers in float32
by these kernels can be faster.

On a GPU each row is a process of its own, too, once unless --turns says otherwise; a row is the median over them. A row
that fails says so, and the others go on. The share of the time in which a kernel runs is of ten updates under PyTorch's
profiler, which slows them; copies of memory are no kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.rad_update import CROP, FILTERS, HIDDEN, ours, rad
from benchmarks.surroundings import at_least
from covr_lightning.cli import WAIT_POLICY  # which imports no PyTorch


def flops_of(update: Callable[[], None]) -> dict[str, float]:
    """FLOP of an update in convolutions and in matrix products, the mean of a pair of updates."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

    def in_one(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        return conv_flop_count(x, weight, out_shape)

    flops = {"convolution": 0.0, "product": 0.0}
    # A convolution with its ReLU is one of those that PyTorch does not count.
    mapping = {torch.ops.mkldnn._convolution_pointwise: in_one}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        update()
        update()
    for operation, count in counter.get_flop_counts()["Global"].items():
        flops["convolution" if "convolution" in str(operation) else "product"] += count / 2
    return flops


def floor(batch: int) -> dict[str, float]:
    """FLOP of an update by their kind, and FLOP a processor second of its large operations (``…_speed``)."""
    import torch
    from torch.nn.functional import conv2d
    from torch.utils.flop_counter import FlopCounterMode

    def speed(call: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter:
            call()
        # Many calls at a time: the clock of a thread that runs on is only read at the system's ticks.
        seconds: list[float] = []
        begun = time.perf_counter()
        while len(seconds) < 5 or time.perf_counter() - begun < 2:
            start = time.process_time()
            for _ in range(50):
                call()
            seconds.append((time.process_time() - start) / 50)
        return counter.get_total_flops() / min(seconds)

    with torch.no_grad():
        weight = torch.randn(FILTERS, FILTERS, 3, 3).contiguous(memory_format=torch.channels_last)
        side = (CROP - 3) // 2 + 1
        images = [
            torch.randn(n, FILTERS, side, side).contiguous(memory_format=torch.channels_last) for n in (8, 32, 128)
        ]
        convolution = max(speed(partial(conv2d, x, weight)) for x in images)
        a, b = torch.randn(max(batch, 512), HIDDEN), torch.randn(HIDDEN, HIDDEN)
        product = speed(lambda: a @ b)
    return flops_of(ours(batch)[1]) | {"convolution_speed": convolution, "product_speed": product}


def pairs(update: Callable[[], None], seconds: float) -> list[tuple[float, float]]:
    """Wall and processor seconds an update, from pairs of updates after one pair to warm up."""
    update()
    update()
    measured: list[tuple[float, float]] = []
    begun = time.perf_counter()
    while not measured or time.perf_counter() - begun < seconds:
        start = time.perf_counter(), time.process_time()
        update()
        update()
        measured.append(((time.perf_counter() - start[0]) / 2, (time.process_time() - start[1]) / 2))
    return measured


def child(job: dict[str, Any]) -> Any:
    """One row, in a process of its own."""
    if job["kept"]:
        from covr_lightning.allocator import keep_freed_memory

        keep_freed_memory()
    if job["what"] == "floor":
        return floor(job["batch"])
    if job["what"] == "gpu":
        return on_gpu_alone(job, Way(**job["way"]))
    if job["what"] == "RAD":
        return pairs(rad(Path(job["rad"]), job["batch"]), job["seconds"])
    update = ours(job["batch"])[1]
    import torch

    # As Lightning sets it: nothing that was cast may be kept, as an update changes the weights.
    with torch.autocast("cpu", torch.bfloat16, enabled=job["what"] == "bf16", cache_enabled=False):
        return pairs(update, job["seconds"])


class RowFailed(Exception):
    """What a row's process has said on its way out."""


def in_a_process(job: dict[str, Any]) -> Any:
    """Run :func:`child` in a new process with the settings that the job names."""
    own = ("OMP_WAIT_POLICY", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "MKL_", "KMP_", "GOMP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    environment |= WAIT_POLICY if job["passive"] else {}
    command = [sys.executable, "-m", "benchmarks.update", "--child", json.dumps(job)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RowFailed(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def on_cpu(arguments: argparse.Namespace) -> None:
    """Print the table of a CPU."""
    rows = {
        "ours, as covr runs it": ("ours", True, True), "ours, plain process": ("ours", False, False),
        "ours, bf16-mixed, as covr runs it": ("bf16", True, True),
    }  # fmt: skip
    if arguments.rad:
        rows |= {"RAD, as it runs": ("RAD", False, False), "RAD, settings of covr": ("RAD", True, True)}
    names = ["batch", "what", "wall ms: least (median)", "processor ms: least", "wall / RAD's", "processor / RAD's"]
    names += ["floor / processor"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for batch in arguments.batch:
        job = {"batch": batch, "rad": str(arguments.rad), "seconds": arguments.seconds}
        bound: dict[str, float] = {}
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
        for _ in range(arguments.turns or 2):
            once = in_a_process(job | {"what": "floor", "kept": True, "passive": True})
            bound = {name: max(value, bound.get(name, 0.0)) for name, value in once.items()}
            for name, (what, kept, passive) in rows.items():
                measured[name] += in_a_process(job | {"what": what, "kept": kept, "passive": passive})
        kinds = ("convolution", "product")
        floor_seconds = sum(bound[kind] / bound[f"{kind}_speed"] for kind in kinds)
        least = {name: [min(column) for column in zip(*values, strict=True)] for name, values in measured.items()}
        rad_wall, rad_processor = least.get("RAD, as it runs", [float("nan")] * 2)
        for name, values in measured.items():
            middle, (wall, processor) = statistics.median(value[0] for value in values), least[name]
            print(
                f"| {batch} | {name} | {1000 * wall:.0f} ({1000 * middle:.0f}) | {1000 * processor:.0f} | "
                f"{wall / rad_wall:.2f} | {processor / rad_processor:.2f} | {floor_seconds / processor:.0%} |",
                flush=True,
            )
        print(
            f"| {batch} | the floor: {sum(bound[kind] for kind in kinds) / 1e9:.0f} GFLOP at "
            f"{bound['convolution_speed'] / 1e9:.0f} (convolution) and {bound['product_speed'] / 1e9:.0f} (product) "
            f"GFLOP a processor second | | {1000 * floor_seconds:.0f} | | {floor_seconds / rad_processor:.2f} | |",
            flush=True,
        )


@dataclass(frozen=True)
class Way:
    """How the updates of one row of a GPU's table are made.

    Attributes:
        precision: ``"float32"``, in which PyTorch's convolutions use TF32, or ``"bf16"``.
        replay: Where the replay lives.
        cuda_graphs: By CUDA graphs.
        torch_compile: Backend of torch.compile.
        of_rad: By RAD's code, in float32.
    """

    precision: str = "float32"
    replay: str = "cpu"
    cuda_graphs: bool = False
    torch_compile: str | None = None
    of_rad: bool = False

    def cells(self) -> str:
        """What it is, as cells of the table."""
        if self.of_rad:
            return "RAD, as it is | float32 | cpu | no | no"
        graphs = "yes" if self.cuda_graphs else "no"
        return f"ours | {self.precision} | {self.replay} | {graphs} | {self.torch_compile or 'no'}"


def ways(device: str, with_rad: bool, compiled: bool) -> list[Way]:
    """The rows, from RAD to everything at once."""
    rows = [Way(of_rad=True)] if with_rad else []
    rows += [Way(), Way(replay=device), Way(replay=device, cuda_graphs=True)]
    rows += [Way("bf16", device), Way("bf16", device, cuda_graphs=True)]
    if compiled:
        rows += [Way(p, device, cuda_graphs=True, torch_compile="inductor") for p in ("float32", "bf16")]
    return rows


def on_gpu_alone(job: dict[str, Any], way: Way) -> dict[str, Any]:
    """Of one row: updates a second, the share of the time in which a kernel runs, and memory at most."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    device, batch = torch.device(job["device"]), job["batch"]
    if device.index is not None:
        torch.cuda.set_device(device)  # which graphs are captured on
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # beyond it, it would go on uncompiled
    if way.of_rad:
        update = rad(Path(job["rad"]), batch, job["device"])
    else:
        update = ours(batch, job["device"], way.torch_compile, way.replay, way.cuda_graphs)[1]
    # As Lightning sets it: nothing that was cast may be kept, as an update changes the weights.
    with torch.autocast(device.type, torch.bfloat16, enabled=way.precision == "bf16", cache_enabled=False):
        for _ in range(16):
            update()
        torch.cuda.synchronize(device)
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < job["seconds"]:
            update()
            done += 1
        torch.cuda.synchronize(device)
        passed = time.perf_counter() - start
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            begun = time.perf_counter()
            for _ in range(10):
                update()
            torch.cuda.synchronize(device)
            profiled = time.perf_counter() - begun
    events = profiler.key_averages()
    kernels = [event for event in events if not event.key.startswith(("Memcpy", "Memset"))]
    table = events.table(sort_by="self_device_time_total", row_limit=job["kernels"]) if job["kernels"] else ""
    return {
        "updates": done / passed, "computing": sum(event.self_device_time_total for event in kernels) / 1e6 / profiled,
        "megabytes": torch.cuda.max_memory_allocated(device) / 1e6, "table": table,
    }  # fmt: skip


def on_gpu(arguments: argparse.Namespace) -> None:
    """Print the table of a GPU: updates a second, and the share of the time in which a kernel runs."""
    import torch

    print(f"{torch.cuda.get_device_name(arguments.device)}, PyTorch {torch.__version__}\n")
    print("| batch | what | precision | replay | CUDA graphs | torch.compile | updates a second | a kernel runs | MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    shared = {"what": "gpu", "rad": str(arguments.rad), "device": arguments.device}
    shared |= {"seconds": arguments.seconds, "kernels": arguments.kernels}
    for batch in arguments.batch:
        for way in ways(arguments.device, arguments.rad is not None, not arguments.uncompiled):
            own = not way.of_rad  # a row is as it is run: ours by covr
            job = shared | {"batch": batch, "way": asdict(way), "kept": own, "passive": own}
            try:
                turns = [in_a_process(job) for _ in range(arguments.turns or 1)]
            except RowFailed as failure:
                print(f"| {batch} | {way.cells()} | failed: {str(failure).splitlines()[-1]} | | |", flush=True)
                continue
            speed, computing, megabytes = (
                statistics.median(turn[name] for turn in turns) for name in ("updates", "computing", "megabytes")
            )
            print(f"| {batch} | {way.cells()} | {speed:.0f} | {computing:.0%} | {megabytes:.0f} |", flush=True)
            if arguments.kernels:
                print(turns[-1]["table"], flush=True)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before anything is."""
    if arguments.rad is not None and not (arguments.rad / "curl_sac.py").is_file():
        parser.error(
            f"--rad is {arguments.rad}, where no curl_sac.py is; give RAD's checkout (github.com/MishaLaskin/rad)."
        )
    if arguments.device == "cpu":
        return
    import torch

    known = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    known += ["cuda"] if known else []
    if arguments.device not in known:
        parser.error(f"--device is {arguments.device!r}; it can be {' or '.join(map(repr, ['cpu', *known]))}.")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rad", type=Path, help="a checkout of github.com/MishaLaskin/rad")
    parser.add_argument("--batch", type=at_least(1), nargs="+", default=[128, 512])
    parser.add_argument("--seconds", type=float, default=4.0, help="measured seconds of a process")
    parser.add_argument("--turns", type=at_least(1), help="processes of each row (2; on a GPU 1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kernels", type=at_least(0), default=0, help="on a GPU, print so many kernels of ten updates")
    parser.add_argument("--uncompiled", action="store_true", help="on a GPU, leave torch.compile out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return
    check(parser, arguments)
    print(f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    try:
        (on_cpu if arguments.device == "cpu" else on_gpu)(arguments)
    except RowFailed as failure:
        sys.exit(str(failure))


if __name__ == "__main__":
    main()
