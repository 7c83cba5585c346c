"""Saving the replay in parts, against a slow reference that keeps a full copy of every moment."""

from __future__ import annotations

import io
import time
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import RandomSampler, TensorDictReplayBuffer

from covr_lightning.data.frame_storage import FrameStackStorage
from covr_lightning.data.replay_parts import ReplayParts
from covr_lightning.errors import ConfigError
from covr_lightning.saving.manifest import ReplayPartError
from tests.data.episodes import Episodes, assert_same

LABELS = {"a_v": (2,), "round": (1,)}


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of small saves need not wait for the disk."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@dataclass
class Reference:
    """Every transition so far with both its stacks, and every label: kept as lists, copied whole."""

    episodes: Episodes
    transitions: list[TensorDict] = field(default_factory=list)
    labels: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def check(self, storage: FrameStackStorage, capacity: int) -> None:
        first = max(0, len(self.transitions) - capacity)
        numbers = list(range(first, len(self.transitions)))
        assert len(storage) == len(numbers)
        if not numbers:
            return
        rows = storage.get(torch.tensor(numbers) % capacity)
        assert rows["row_id"].tolist() == numbers
        assert_same(rows, torch.stack([self.transitions[i] for i in numbers]))
        nothing = (torch.zeros(2), torch.full((1,), -1))
        for key, column in zip(LABELS, zip(*(self.labels.get(i, nothing) for i in numbers), strict=True), strict=True):
            assert torch.equal(rows[key], torch.stack(column)), key


class Run:
    """A replay that is pushed to, labelled, saved and restored."""

    def __init__(self, folder: Path, capacity: int, reference: Reference) -> None:
        self.capacity, self.reference = capacity, reference
        self.replay = TensorDictReplayBuffer(
            storage=FrameStackStorage(capacity), sampler=RandomSampler(), batch_size=4, generator=torch.Generator()
        )
        self.parts = ReplayParts(folder)

    @property
    def storage(self) -> FrameStackStorage:
        return self.replay.storage

    def push(self, n: int) -> None:
        rows = [self.reference.episodes.step() for _ in range(n)]
        self.reference.transitions += rows
        batch = torch.stack([row.clone() for row in rows])
        batch["a_v"], batch["round"] = torch.zeros(n, 2), torch.full((n, 1), -1)
        self.replay.extend(batch)

    def label(self, numbers: torch.Tensor, value: int) -> None:
        position, held = self.storage.position_of(numbers)
        a_v = torch.stack([numbers.float(), torch.full((len(numbers),), float(value))], 1)
        labels = {"a_v": a_v, "round": torch.full((len(numbers), 1), value)}
        for key, column in labels.items():
            self.storage.write_column(key, position[held], column[held])
        for i in held.nonzero().flatten().tolist():
            self.reference.labels[int(numbers[i])] = (labels["a_v"][i], labels["round"][i])

    def restore(self, manifest: dict[str, Any]) -> None:
        self.parts.restore(self.storage, manifest)
        written = self.storage.last_row_id + 1
        self.replay._writer.load_state_dict({"_cursor": written % self.capacity, "_write_count": written})


def through_a_checkpoint(manifest: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(manifest, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_bitwise(a: FrameStackStorage, b: FrameStackStorage) -> None:
    assert a.numbers() == b.numbers()
    assert len(a) == len(b)
    if not len(a):
        return
    assert set(a._storage.keys(True, True)) == set(b._storage.keys(True, True))
    for key, value in a._storage[: len(a)].items(True, True):
        other = b._storage[: len(b)][key]
        assert value.dtype == other.dtype
        assert torch.equal(value, other), key
    slots = torch.arange(a.oldest_frame, a.numbers()["frames_written"]) % a.numbers()["frame_capacity"]
    assert torch.equal(a._frames[slots], b._frames[slots])


@pytest.mark.parametrize(
    ("seed", "capacity", "mean_length", "size", "most", "envs"),
    [
        (0, 40, 2.5, 2, 25, 1), (1, 40, 12.0, 2, 25, 1), (2, 37, 1.2, 2, 37, 1), (3, 40, 12.0, 16, 7, 1),
        (4, 40, 2.5, 16, 7, 1), (5, 40, 12.0, 2, 25, 3), (6, 40, 12.0, 16, 7, 2),
    ],
)  # fmt: skip
def test_any_history_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    seed: int, capacity: int, mean_length: float, size: int, most: int, envs: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("covr_lightning.data.replay_parts.SMALL_PARTS", 4)
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    run = Run(tmp_path, capacity, Reference(Episodes(seed, mean_length, size, envs)))
    moments: list[tuple[dict[str, Any], Reference, FrameStackStorage]] = []
    merged = branches = grown = 0
    for _ in range(200):
        action = draw(0, 9)
        if action <= 4:
            run.push(draw(1, most))
        elif action <= 6 and run.storage.last_row_id >= 0:
            numbers = torch.arange(max(0, run.storage.last_row_id - draw(0, 2 * capacity)), run.storage.last_row_id + 1)
            run.label(numbers[torch.rand(len(numbers), generator=generator) < 0.3], draw(0, 5))
        elif action <= 8:
            before = len(run.parts._parts)
            manifest = through_a_checkpoint(run.parts.save(run.storage))
            merged += len(manifest["parts"]) < before
            grown += manifest["frame_capacity"] > FrameStackStorage(capacity).numbers()["frame_capacity"]
            moments = [*moments[-3:], (manifest, deepcopy(run.reference), deepcopy(run.storage))]
            other = FrameStackStorage(capacity)
            ReplayParts(tmp_path).restore(other, manifest)
            assert_bitwise(other, run.storage)
            # What no moment names is not needed.
            named = {entry["name"] for kept, _, _ in moments for entry in kept["parts"]}
            for file in tmp_path.iterdir():
                if file.name not in named:
                    file.unlink()
        elif moments:
            manifest, reference, storage = moments[draw(0, len(moments) - 1)]
            branches += 1
            run = Run(tmp_path, capacity, deepcopy(reference))
            run.restore(manifest)
            assert_bitwise(run.storage, storage)
            assert run.replay._writer._cursor == len(reference.transitions) % capacity
        if action > 6:
            run.reference.check(run.storage, capacity)
    assert branches > 10
    assert len(run.reference.transitions) > 2 * capacity  # the rings have wrapped
    assert merged > 0 or size < 16  # frames so small that a part's header is larger than they are
    assert grown > 0 or mean_length > 10


def written_bytes() -> int:
    """Bytes that this process has handed to write(2) so far."""
    return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])


def steady_save(folder: Path, capacity: int, size: int, new: int, chunk: int) -> tuple[int, int, float, float]:
    """Fill a replay, save it, write `new` rows and some labels, and save again.

    Returns:
        Bytes written by the second save, bytes of the new transitions, and the seconds of that save and of a restore.
    """
    storage, generator = FrameStackStorage(capacity), torch.Generator().manual_seed(0)
    parts = ReplayParts(folder)

    def extend(n: int) -> None:
        for _ in range(n // chunk):
            frames = torch.randint(0, 256, (chunk + 1, 3, size, size), dtype=torch.uint8, generator=generator)
            stacks = torch.cat([frames[[0, 0]], frames]).unfold(0, 3, 1).movedim(-1, 1).flatten(1, 2)
            done = torch.zeros(chunk, 1, dtype=torch.bool)
            done[-1] = True
            following = {"pixels": stacks[1:], "reward": torch.rand(chunk, 1), "done": done}
            following |= {"terminated": done, "truncated": done}
            rows = {"pixels": stacks[:-1], "action": torch.rand(chunk, 6), "next": TensorDict(following, [chunk])}
            rows |= {"a_v": torch.zeros(chunk, 6), "a_v_valid": torch.zeros(chunk, 1, dtype=torch.bool)}
            rows |= {"vlm_round": torch.full((chunk, 1), -1)}
            first = storage.last_row_id + 1
            storage.set(torch.arange(first, first + chunk) % capacity, TensorDict(rows, [chunk]))

    extend(capacity)
    for _ in range(3):  # a run's usual saves
        parts.save(storage)
        extend(new)
    parts.save(storage)
    extend(new)
    late = torch.arange(0, new, 10)  # every tenth of the rows before these got its label since
    position = (storage.last_row_id + 1 - 2 * new + late) % capacity
    storage.write_column("a_v", position, torch.rand(len(late), 6))
    storage.write_column("a_v_valid", position, torch.ones(len(late), 1, dtype=torch.bool))
    row = storage._storage[0]
    row_bytes = sum(value.numel() * value.element_size() for value in row.values(True, True))
    transitions = new * row_bytes + (new + new // chunk) * 3 * size * size  # each episode has one frame more

    before, start = written_bytes(), time.monotonic()
    manifest = parts.save(storage)
    seconds, written = time.monotonic() - start, written_bytes() - before
    other, start = FrameStackStorage(capacity), time.monotonic()
    ReplayParts(folder).restore(other, manifest)
    restoring = time.monotonic() - start
    assert_bitwise(other, storage)
    return written, transitions, seconds, restoring


@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="counts written bytes as Linux does")
def test_a_save_writes_what_is_new_and_no_more(tmp_path: Path) -> None:
    written, transitions, _, _ = steady_save(tmp_path, capacity=2000, size=48, new=100, chunk=50)
    assert transitions < written <= 1.01 * transitions


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="counts written bytes as Linux does")
def test_a_save_at_full_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # with the disk as it is
    written, transitions, saving, restoring = steady_save(tmp_path, capacity=100_000, size=100, new=5000, chunk=500)
    with capsys.disabled():
        print(
            f"\n5,000 new of 100,000 transitions at 100×100: {written / 1e6:.1f} MB written for "
            f"{transitions / 1e6:.1f} MB ({written / transitions - 1:+.3%}), {saving:.2f} s to save, "
            f"{restoring:.2f} s to load all"
        )
    assert transitions < written <= 1.01 * transitions


def test_many_small_saves_leave_few_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("covr_lightning.data.replay_parts.SMALL_PARTS", 16)
    run = Run(tmp_path, 500, Reference(Episodes(0, 20, 16)))
    sizes = most = 0
    for _ in range(800):
        run.push(1)
        before = {file.name for file in tmp_path.iterdir()}
        named = {entry["name"]: entry["bytes"] for entry in run.parts.save(run.storage)["parts"]}
        sizes += sum(size for name, size in named.items() if name not in before)
        most = max(most, len(named))
        for name in before - set(named):
            (tmp_path / name).unlink()
    assert most <= 2 * 16 + 6
    # Parts hold up to a 16th of the replay, 31 rows, so a row is written log₂ 31 < 5 times more; a header every time.
    assert sizes < 800 * (6 * run.storage.bytes_per_transition() + 2048)
    other = Run(tmp_path, 500, run.reference)
    other.restore(run.parts.save(run.storage))
    other.reference.check(other.storage, 500)


def test_nothing_new_writes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, 20, Reference(Episodes(0, 5)))
    assert run.parts.save(run.storage)["parts"] == []
    run.push(7)
    first = run.parts.save(run.storage)
    assert run.parts.save(run.storage) == first
    run.label(torch.tensor([2]), 4)
    second = run.parts.save(run.storage)
    assert [entry["rows"] for entry in second["parts"]] in ([[0, 7], [7, 7]], [[0, 7]])
    assert run.parts.save(run.storage) == second


def test_a_long_silence_is_split_into_parts_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("covr_lightning.data.replay_parts.PART_BYTES", 2000)
    run = Run(tmp_path, 50, Reference(Episodes(0, 5)))
    run.push(50)
    run.push(13)
    manifest = run.parts.save(run.storage)
    assert len(manifest["parts"]) >= 4
    assert manifest["parts"][0]["rows"][0] == 13
    other = FrameStackStorage(50)
    ReplayParts(tmp_path).restore(other, manifest)
    assert_bitwise(other, run.storage)


def test_a_failed_save_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, 50, Reference(Episodes(0, 5)))
    run.push(20)
    first = run.parts.save(run.storage)
    run.push(8)
    run.label(torch.tensor([3, 24]), 1)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr("covr_lightning.data.replay_parts.write_atomically", full)
        with pytest.raises(OSError, match="No space left"):
            run.parts.save(run.storage)
    run.push(1)
    for manifest, length in ((run.parts.save(run.storage), 29), (first, 20)):
        other = FrameStackStorage(50)
        ReplayParts(tmp_path).restore(other, manifest)
        assert other.last_row_id == length - 1
        if length == 29:
            assert_bitwise(other, run.storage)


def test_a_run_in_another_folder_writes_its_own_parts(tmp_path: Path) -> None:
    run = Run(tmp_path / "a", 30, Reference(Episodes(0, 5)))
    run.push(20)
    manifest = run.parts.save(run.storage)
    other = Run(tmp_path / "b", 30, deepcopy(run.reference))
    other.restore(manifest)
    other.push(4)
    again = other.parts.save(other.storage)
    (tmp_path / "a").rename(tmp_path / "gone")
    third = FrameStackStorage(30)
    ReplayParts(tmp_path / "b").restore(third, again)
    assert_bitwise(third, other.storage)
    # A folder that was moved is found where it is now.
    moved = FrameStackStorage(30)
    ReplayParts(tmp_path / "gone").restore(moved, manifest)
    assert_bitwise(moved, run.storage)


def test_missing_and_damaged_parts_are_named(tmp_path: Path) -> None:
    run = Run(tmp_path, 30, Reference(Episodes(0, 5)))
    run.push(10)
    run.parts.save(run.storage)
    run.push(10)
    manifest = run.parts.save(run.storage)
    path = tmp_path / manifest["parts"][1]["name"]
    whole = path.read_bytes()
    for damaged, problem in (
        (None, "is missing"),
        (whole[:-9], f"is damaged .{len(whole) - 9} bytes instead of {len(whole)}"),
        (whole[:700] + bytes([whole[700] ^ 4]) + whole[701:], "its checksum is another one"),
    ):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(ReplayPartError, match=problem) as caught:
            ReplayParts(tmp_path).restore(FrameStackStorage(30), manifest)
        assert str(path) in str(caught.value)
    path.write_bytes(whole)
    with pytest.raises(ConfigError, match=r"holds 30 transitions, but data\.replay_capacity is 31"):
        ReplayParts(tmp_path).restore(FrameStackStorage(31), manifest)
    with pytest.raises(ReplayPartError, match="lacks some of its rows 0 to 19"):
        ReplayParts(tmp_path).restore(FrameStackStorage(30), {**manifest, "parts": manifest["parts"][1:]})
