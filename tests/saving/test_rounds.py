"""A round whose files cannot be written."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from covr_lightning.saving.files import in_place_of
from tests.short_runs import env_steps_saved, fit

FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_run_goes_on_without_what_only_the_report_reads(
    untrained_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save_file(columns: Any, part: Path, metadata: Any = None) -> None:
        part.write_bytes(b"the beginning")
        raise FULL

    def write_atomically(path: Path, pieces: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("covr_lightning.finetune.samples.save_file", save_file)
    monkeypatch.setattr("covr_lightning.finetune.saved_rows.save_file", save_file)
    monkeypatch.setattr("covr_lightning.saving.files.write_atomically", write_atomically)
    arguments = ("--trainer.callbacks.save_rows", "true", "--data.max_env_steps", "2000")
    assert fit(tmp_path, untrained_vlm, *arguments) == 0
    told = capsys.readouterr().err
    for name in ("round_001_samples.safetensors", "round_001_rows.safetensors", "round_001.json"):
        assert f"{name} could not be written (" in told
    assert [path.name for path in (tmp_path / "run" / "rounds").iterdir()] == ["round_001_adapter"]


def test_an_adapter_that_cannot_be_written_ends_the_run_in_a_sentence(
    untrained_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save_lora(model: Any, folder: Path) -> None:
        with in_place_of(folder) as part:
            model.save_pretrained(part)
            raise FULL

    arguments = ("--data.max_env_steps", "4000", "--data.eval_every_env_steps", "1000")
    with monkeypatch.context() as full:
        full.setattr("covr_lightning.vlm.vlm.save_lora", save_lora)
        assert fit(tmp_path, untrained_vlm, *arguments) == 3
    [told] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("covr:")]
    assert "The adapter of round 1 could not be written (Error while serializing: I/O error: No space left" in told
    assert not list((tmp_path / "run" / "rounds").iterdir())
    assert env_steps_saved(tmp_path / "run" / "checkpoints" / "last.ckpt") == 1000
    assert fit(tmp_path, untrained_vlm, *arguments, "--ckpt_path", "last") == 0
    assert (tmp_path / "run" / "rounds" / "round_001_adapter").is_dir()
