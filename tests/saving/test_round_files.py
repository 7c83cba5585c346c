"""The files of a run's rounds: what is set aside, found again and taken back."""

from __future__ import annotations

from pathlib import Path

import pytest

from covr_lightning.errors import ConfigError
from covr_lightning.finetune.round_adapters import fetch, remove_double, set_aside
from covr_lightning.saving.round_files import RoundFiles, round_of, take_back
from covr_lightning.vlm.adapters import adapter_digest


def adapter(folder: Path, weights: bytes) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return adapter_digest(folder)


def test_what_later_rounds_recorded_is_taken_back_and_no_more(tmp_path: Path) -> None:
    names = ["{}.json", "{}_rows.safetensors", "{}_samples.safetensors", "{}_vlm.safetensors", "{}_notes.txt"]
    for number in range(12):
        for name in names:
            (tmp_path / name.format(f"round_{number:03d}")).write_text("")
        adapter(RoundFiles(tmp_path, number).adapter, b"x")
    take_back(tmp_path, 9)
    left = {path.name for path in tmp_path.iterdir()}
    expected = {name.format(f"round_{number:03d}") for number in range(10) for name in names}
    expected |= {f"round_{number:03d}_adapter" for number in range(12)}
    assert left == expected | {"round_010_notes.txt", "round_011_notes.txt"}
    take_back(tmp_path / "none", 0)


def test_names_of_a_round(tmp_path: Path) -> None:
    assert RoundFiles(tmp_path, 7).adapter.name == "round_007_adapter"
    assert round_of(RoundFiles(tmp_path, 12).episodes) == 12
    assert round_of(tmp_path / "something_else") is None


def test_an_adapter_whose_removal_was_cut_short_hinders_nothing(tmp_path: Path) -> None:
    own = RoundFiles(tmp_path, 1).adapter
    digest = adapter(own, b"good")
    set_aside(own)
    aside = own.with_name(f"{own.name}.{digest[:12]}")
    assert aside.is_dir()
    (aside / "adapter_model.safetensors").unlink()
    adapter(own, b"good")
    fetch(own, [], digest)  # it is in its place
    assert remove_double(own) == digest
    assert not aside.exists()

    (own / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="its adapter is missing, where another one is"):
        fetch(own, [], digest)
    elsewhere = RoundFiles(tmp_path / "before", 1).adapter
    assert adapter(elsewhere, b"good") == digest
    fetch(own, [tmp_path / "nowhere", elsewhere.parent], digest)
    assert adapter_digest(own) == digest

    (own / "adapter_config.json").unlink()
    set_aside(own)
    assert not own.exists()
