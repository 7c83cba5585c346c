"""Checkpoints on disk: sealed, refused when damaged, and the parts that nothing names any more."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import subprocess
import sys
import zipfile
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch

from covr_lightning.errors import ConfigError
from covr_lightning.saving.checkpoints import CheckpointFiles, load_checkpoint, newest_good_checkpoint
from covr_lightning.saving.files import write_atomically
from covr_lightning.saving.lock import only_run_in


def checkpoint(value: float = 1.0, manifest: dict[str, Any] | None = None) -> dict[str, Any]:
    weights = {"w": torch.full((4, 5), value), "n": torch.arange(3)}
    state = {"counters": {"env_steps": 40}, **({"replays": [manifest]} if manifest else {})}
    return {"state_dict": weights, "ExperienceData": state, "callbacks": {}}


def manifest(folder: Path, *names: str) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"part")
    sha256 = hashlib.sha256(b"part").hexdigest()
    return {"folder": str(folder), "parts": [{"name": name, "bytes": 4, "sha256": sha256} for name in names]}


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.float64(3), "numpy.float64"), (np.arange(3), "numpy.ndarray"), (np.random.default_rng(0), "Generator"),
        (lambda: 3, "function"), (Lock(), "lock"), (Path, "type"),
    ],
)  # fmt: skip
def test_what_could_not_be_read_again_is_not_written(value: Any, kind: str, tmp_path: Path) -> None:
    given = checkpoint() | {"callbacks": {"Count": {"seen": [1, value]}}}
    with pytest.raises(ConfigError, match=rf"would hold a .*{kind} \(callbacks\.Count\.seen\.1\).*\.tolist\(\)"):
        CheckpointFiles().save_checkpoint(given, tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()


def test_plain_torch_reads_it(tmp_path: Path) -> None:
    CheckpointFiles().save_checkpoint(checkpoint(3.0), tmp_path / "a.ckpt")
    for options in ({}, {"mmap": True}):
        read = torch.load(tmp_path / "a.ckpt", weights_only=True, **options)
        assert torch.equal(read["state_dict"]["w"], torch.full((4, 5), 3.0))
        assert read["ExperienceData"] == {"counters": {"env_steps": 40}}
    assert list(tmp_path.iterdir()) == [tmp_path / "a.ckpt"]


def test_any_flipped_bit_and_any_cut_is_found(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.ckpt", tmp_path / "bad.ckpt"
    CheckpointFiles().save_checkpoint(checkpoint(), good)
    data, draw = good.read_bytes(), random.Random(0)
    ends = [*range(60), *range(len(data) - 140, len(data))]
    for at in ends + draw.sample(range(len(data)), 200):
        bad.write_bytes(data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :])
        with pytest.raises(ConfigError, match=f"{bad} is .*; the newest good checkpoint of this run is {good}"):
            load_checkpoint(bad)
        bad.write_bytes(data[:at])
        with pytest.raises(ConfigError, match=f"{bad} is "):
            load_checkpoint(bad)


def test_foreign_files_are_refused_and_nothing_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "run by a pickle"),))

    path = tmp_path / "x.ckpt"
    for write, problem in (
        (lambda: path.write_bytes(b""), "cut off, or no checkpoint"),
        (lambda: path.write_text("hello " * 50), "cut off, or no checkpoint"),
        (lambda: torch.save({"state_dict": Evil()}, path), "is no checkpoint of this program"),
        (lambda: torch.save([1, 2], path), "holds no state_dict"),
        (lambda: path.unlink(), "is missing"),
    ):
        write()
        with pytest.raises(ConfigError, match=f"{path} .*{problem}.*; the run has no other good checkpoint"):
            CheckpointFiles().load_checkpoint(path, weights_only=False)
    assert not (tmp_path / "run by a pickle").exists()
    # What torch.save alone wrote, or a user wrote again with it, is read without a checksum.
    torch.save(checkpoint(), path)
    assert load_checkpoint(path)["state_dict"]["n"].tolist() == [0, 1, 2]


def test_the_newest_good_checkpoint_has_all_its_parts(tmp_path: Path) -> None:
    folder, files = tmp_path / "checkpoints", CheckpointFiles()
    for age, (name, parts) in enumerate({"whole": ["w"], "lacking": ["p"], "broken": [], "last": []}.items()):
        files.save_checkpoint(checkpoint(age, manifest(tmp_path / "replay", *parts)), folder / f"{name}.ckpt")
        os.utime(folder / f"{name}.ckpt", (age, age))
    (folder / "broken.ckpt").write_bytes(b"x")
    (tmp_path / "replay" / "p").unlink()
    assert newest_good_checkpoint(folder / "last.ckpt").endswith(str(folder / "whole.ckpt"))


def test_parts_go_when_no_checkpoint_names_them(tmp_path: Path) -> None:
    replay, files = tmp_path / "replay", CheckpointFiles()

    def save(path: Path, *names: str, **more: Any) -> set[str]:
        names = tuple(f"{name}.safetensors" for name in names)
        files.save_checkpoint(checkpoint(0, manifest(replay, *names)) | more, path)
        return {file.name.removesuffix(".safetensors") for file in replay.iterdir()}

    best, last = tmp_path / "checkpoints" / "best.ckpt", tmp_path / "checkpoints" / "last.ckpt"
    elsewhere = {"callbacks": {"ModelCheckpoint": {"dirpath": str(tmp_path / "elsewhere")}}}
    assert save(best, "a", "b") == {"a", "b"}
    assert save(tmp_path / "elsewhere" / "x.ckpt", "e") == {"a", "b", "e"}
    (replay / "killed.safetensors.part").touch()
    last.with_name("last.ckpt.part").touch()
    assert save(last, "a", "b", "c", **elsewhere) == {"a", "b", "c", "e"}
    assert not last.with_name("last.ckpt.part").exists()
    assert save(last, "b", "c", "d", **elsewhere) == {"a", "b", "c", "d", "e"}
    assert save(best, "b", "c", "d", **elsewhere) == {"b", "c", "d", "e"}
    best.write_bytes(b"damaged: of no use to anyone")
    assert save(last, "d", **elsewhere) == {"d", "e"}
    with zipfile.ZipFile(best, "w") as archive:
        archive.writestr("notes.txt", "of another program")
    assert save(last, "f", **elsewhere) == {"e", "f"}
    torch.save(checkpoint(0, manifest(replay, "g.safetensors")), best)  # without a checksum, but whole
    assert save(last, "h", **elsewhere) == {"e", "g", "h"}
    inside = bytearray(best.read_bytes())
    inside[60:400] = bytes(340)
    best.write_bytes(inside)
    assert save(last, "h", **elsewhere) == {"e", "h"}
    torch.save(checkpoint(0), best)
    whole, directory = best.read_bytes(), best.read_bytes().rindex(b"PK\x01\x02")
    for at in range(directory, len(whole) - 22, 3):  # whatever zipfile makes of a damaged directory, runs are saved
        best.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        assert save(last, "h", **elsewhere) >= {"e", "h"}


def test_parts_stay_while_a_whole_checkpoint_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replay, folder = tmp_path / "replay", tmp_path / "checkpoints"
    CheckpointFiles().save_checkpoint(checkpoint(0, manifest(replay, "a.safetensors")), folder / "best.ckpt")
    manifest(replay, "b.safetensors")
    files, load = CheckpointFiles(), torch.load
    with monkeypatch.context() as short:

        def refuse(path: Any, **arguments: Any) -> Any:
            if path == folder / "best.ckpt":
                raise RuntimeError("unable to mmap 120001855 bytes from file: Cannot allocate memory (12)")
            return load(path, **arguments)

        short.setattr(torch, "load", refuse)
        files.save_checkpoint(checkpoint(1, manifest(replay, "c.safetensors")), folder / "last.ckpt")
    assert {file.name[0] for file in replay.iterdir()} == {"a", "b", "c"}
    assert "best.ckpt cannot be read: unable to mmap" in caplog.text
    files.save_checkpoint(checkpoint(2, manifest(replay, "c.safetensors")), folder / "last.ckpt")
    assert {file.name[0] for file in replay.iterdir()} == {"a", "c"}


def write_with_a_limit(folder: Path, limit: int) -> None:
    CheckpointFiles().save_checkpoint(checkpoint(1.0), folder / "last.ckpt")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for save in (
        lambda: CheckpointFiles().save_checkpoint(checkpoint(2.0), folder / "last.ckpt"),
        lambda: write_atomically(folder / "part.safetensors", [b"x" * (limit - 10), b"y" * 20]),
    ):
        try:
            save()
        except OSError as error:
            print(error)


def test_a_write_that_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import runpy, sys; from pathlib import Path; "
         "runpy.run_path(sys.argv[1])['write_with_a_limit'](Path(sys.argv[2]), 1000)", __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.count("File too large") == 2
    assert f"{tmp_path / 'last.ckpt'}" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert load_checkpoint(tmp_path / "last.ckpt")["state_dict"]["w"].unique().tolist() == [1.0]


HOLDER = """
import sys, time
from pathlib import Path
from covr_lightning.saving.lock import only_run_in
with only_run_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=f"Another run is writing to {tmp_path / 'run'}"),
            only_run_in(tmp_path / "run"),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    for _ in range(2):  # let go of after a run, and after one that failed
        with pytest.raises(KeyError), only_run_in(tmp_path / "run"):
            raise KeyError
