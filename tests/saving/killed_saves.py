"""Run by test_kill.py as a process of its own: saves that are killed at every step, and at random moments.

Each save is made by a forked child; after its death this process restores what is on disk, as a resumed run would, and
compares it with what an independent account says of that moment. Prints what it has seen as JSON.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

from covr_lightning.data.frame_storage import FrameStackStorage
from covr_lightning.data.replay_parts import ReplayParts
from covr_lightning.saving.checkpoints import CheckpointFiles, load_checkpoint
from covr_lightning.saving.manifest import manifests_of, names_of
from tests.data.episodes import Episodes, assert_same

CAPACITY, STEP = 50, 3
EPISODES = Episodes(seed=0, mean_length=9, size=8)
ROWS = [EPISODES.step() for _ in range(1500)]


def label(written: int, row: int) -> float:
    """The label of a row once `written` rows are: each save so far labelled the rows 20 to 11 before its end."""
    saves = [end for end in range(STEP, written + 1, STEP) if end - 20 <= row < end - 10]
    return float(saves[-1]) if saves else 0.0


class Run:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "checkpoints" / "last.ckpt"
        self.storage, self.parts, self.files = (
            FrameStackStorage(CAPACITY),
            ReplayParts(folder / "replay"),
            CheckpointFiles(),
        )
        if self.path.is_file():
            self.parts.restore(self.storage, manifests_of(load_checkpoint(self.path))[0])

    @property
    def written(self) -> int:
        return self.storage.last_row_id + 1

    def save(self) -> None:
        """Three transitions more, ten late labels, and a checkpoint."""
        rows: TensorDict = torch.stack([row.clone() for row in ROWS[self.written : self.written + STEP]])
        rows["label"] = torch.zeros(STEP, 1)
        self.storage.set(torch.arange(self.written, self.written + STEP) % CAPACITY, rows)
        due = torch.arange(max(0, self.written - 20), max(0, self.written - 10))
        self.storage.write_column("label", due % CAPACITY, torch.full((len(due), 1), float(self.written)))
        weights = torch.full((300,), float(self.written))
        state = {"replays": [self.parts.save(self.storage)]}
        self.files.save_checkpoint({"state_dict": {"w": weights}, "ExperienceData": state}, self.path)

    def check(self) -> None:
        numbers = list(range(max(0, self.written - CAPACITY), self.written))
        rows = self.storage.get(torch.tensor(numbers) % CAPACITY)
        assert rows["row_id"].tolist() == numbers
        assert_same(rows, torch.stack([ROWS[i] for i in numbers]))
        assert rows["label"].flatten().tolist() == [label(self.written, i) for i in numbers]
        weights = load_checkpoint(self.path)["state_dict"]["w"]
        assert weights.tolist() == [float(self.written)] * 300


class DyingFile(io.FileIO):
    """A file whose process dies in the middle of the write, half of it on the disk."""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if die_now():
            super().write(view[: len(view) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(view)


calls = 0
last_call = 0


def die_now() -> bool:
    global calls
    calls += 1
    return calls == last_call


def dying(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **options: Any) -> Any:
        if die_now():
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return wrapped


def die_at(call: int) -> None:
    """Kill this process in its `call`-th step towards the disk."""
    global last_call
    last_call = call
    for name in ("fsync", "replace", "unlink", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))
    open_file = io.open

    def open_dying(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode == "wb" and die_now():
            os.kill(os.getpid(), signal.SIGKILL)
        return DyingFile(path, "wb") if mode == "wb" else open_file(path, mode, *arguments, **options)

    io.open = builtins.open = open_dying  # type: ignore[assignment]


def in_a_child(work: Callable[[], None], then: Callable[[int], None] = lambda pid: None) -> bool:
    """Fork, work, and say whether the child lived to the end."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    then(pid)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0


def main(folder: Path) -> None:
    run = Run(folder)
    run.save()
    seen = {"killed": 0, "old": 0, "new": 0, "random": 0, "saved_between": 0}
    for step in range(1, 500):

        def one_save(run: Run = run, step: int = step) -> None:
            die_at(step)
            run.save()

        finished = in_a_child(one_save)
        before, run = run.written, Run(folder)
        assert run.written in (before, before + STEP)
        run.check()
        if finished:
            break
        seen["killed"] += 1
        seen["new" if run.written > before else "old"] += 1

    def many_saves() -> None:
        while run.written + STEP <= len(ROWS):
            run.save()

    def kill_after_a_save(pid: int) -> None:
        old = run.path.stat().st_mtime_ns
        while run.path.stat().st_mtime_ns == old:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)

    for _ in range(10):
        in_a_child(many_saves, kill_after_a_save)
        before, run = run.written, Run(folder)
        run.check()
        seen["random"] += 1
        seen["saved_between"] += (run.written - before) // STEP
    run.save()
    named = names_of(manifests_of(load_checkpoint(run.path)))
    seen["left over"] = sorted({file.name for file in folder.rglob("*") if file.is_file()} - named - {"last.ckpt"})
    print(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
