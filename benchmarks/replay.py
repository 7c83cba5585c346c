"""The replay that keeps each frame once, against one that stores both stacks.

    python -m benchmarks.replay                   # 100,000 transitions of 84×84, 3 frames: 3 GB of memory and of disk
    python -m benchmarks.replay --stacks 100000   # of both kinds so many: 13 GB of memory and of disk for the other

Bytes a transition, milliseconds to sample 512 (both observations stacked, uint8), seconds to save all and to load it
again. Both stacks: a TorchRL LazyTensorStorage, saved and loaded by ``dumps`` and ``loads``. Each frame once: as a run
saves it, with checksums and fsync; a further save after 1,000 more transitions is what a run pays at a checkpoint.
Frames are random, episodes have 125 transitions (cartpole with action repeat 8). The folder is removed afterwards.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, RandomSampler, TensorDictReplayBuffer

from benchmarks.surroundings import at_least
from covr_lightning.data.frame_storage import FrameStackStorage
from covr_lightning.data.replay_parts import ReplayParts

SIZE, STACK, EPISODE, BATCH = 84, 3, 125, 512


def episode(generator: torch.Generator) -> TensorDict:
    """Transitions (EPISODE,) of one episode."""
    frames = torch.randint(0, 256, (EPISODE + 1, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    frames = torch.cat([frames[:1]] * (STACK - 1) + [frames])
    stacks = torch.stack([frames[i : i + STACK].flatten(0, 1) for i in range(EPISODE + 1)])
    flag = torch.zeros(EPISODE, 1, dtype=torch.bool)
    done = flag.clone()
    done[-1] = True
    number = torch.rand(EPISODE, 1)
    after = {"pixels": stacks[1:], "reward": number, "done": done, "terminated": flag, "truncated": done}
    before = {"pixels": stacks[:-1], "action": number, "a_v": number, "a_v_valid": flag}
    return TensorDict({**before, "next": after}, [EPISODE])


def filled(storage: Any, rows: int) -> TensorDictReplayBuffer:
    """A replay with so many transitions."""
    replay = TensorDictReplayBuffer(
        storage=storage, sampler=RandomSampler(), batch_size=BATCH, generator=torch.Generator().manual_seed(0)
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(rows // EPISODE):
        replay.extend(episode(generator))
    return replay


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def sampling(replay: TensorDictReplayBuffer) -> float:
    """Median seconds of a batch."""
    replay.sample()
    return statistics.median(seconds(replay.sample) for _ in range(20))


def written(folder: Path) -> float:
    """Bytes in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def ours(rows: int, folder: Path) -> list[float]:
    """Bytes a transition in memory, seconds of a batch, a save, its bytes a transition, a further save, a load."""
    storage = FrameStackStorage(rows, STACK)
    replay = filled(storage, rows)
    parts, sample = ReplayParts(folder), sampling(replay)
    save = seconds(partial(parts.save, storage))
    size = written(folder) / rows
    generator = torch.Generator().manual_seed(1)
    for _ in range(1000 // EPISODE):
        replay.extend(episode(generator))
    further = seconds(partial(parts.save, storage))
    manifest, memory = parts.save(storage), storage.bytes_per_transition()
    del replay, storage
    gc.collect()
    again = FrameStackStorage(rows, STACK)
    load = seconds(lambda: ReplayParts(folder).restore(again, manifest))
    assert len(again) == rows
    return [memory, sample, save, size, further, load]


def both_stacks(rows: int, folder: Path) -> list[float]:
    """The same of a storage of whole transitions; it has no save of what is new alone."""
    replay = filled(LazyTensorStorage(rows), rows)
    memory = sum(v.numel() * v.element_size() for v in replay._storage._storage.values(True, True)) / rows
    sample, save = sampling(replay), seconds(partial(replay.dumps, folder))
    size = written(folder) / rows
    del replay
    gc.collect()  # the replay and its parts hold one another
    again = TensorDictReplayBuffer(storage=LazyTensorStorage(rows), batch_size=BATCH)
    load = seconds(lambda: again.loads(folder))
    assert len(again) == rows
    return [memory, sample, save, size, float("nan"), load]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=at_least(EPISODE), default=100_000, help="transitions of ours")
    parser.add_argument("--stacks", type=at_least(EPISODE), default=20_000, help="transitions of both stacks")
    parser.add_argument("--folder", type=Path, help="where to write; by default the system's folder for such files")
    arguments = parser.parse_args()
    if arguments.folder is not None and not arguments.folder.is_dir():
        parser.error(f"--folder is {arguments.folder}, which is no folder.")
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    print(f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    names = [
        "replay",
        "transitions",
        "bytes a transition",
        f"sample {BATCH}, ms",
        "save, s",
        "bytes a transition on disk",
    ]
    names += ["save after 1,000 more, s", "load, s"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    measured: dict[str, tuple[Callable[[int, Path], list[float]], int]] = {
        "each frame once": (ours, arguments.rows),
        "both stacks": (both_stacks, arguments.stacks),
    }
    if arguments.rows != arguments.stacks:
        measured["each frame once, as many"] = ours, arguments.stacks
    for name, (measure, asked) in measured.items():
        rows = asked // EPISODE * EPISODE
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            memory, sample, save, size, further, load = measure(rows, Path(folder) / "replay")
        print(
            f"| {name} | {rows:,} | {memory:,.0f} | {1000 * sample:.0f} | {save:.1f} | {size:,.0f} | {further:.2f} | "
            f"{load:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
