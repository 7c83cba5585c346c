"""Loading: every broken folder gives one sentence that names the value and the YAML key."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from covr_lightning.errors import ConfigError
from covr_lightning.vlm import load_vlm
from covr_lightning.vlm.loading import embedded_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded_folder(), tmp_path / "vlm"))


def message(path: str | Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_vlm(path)
    text = str(caught.value)
    assert "vlm.path" in text
    assert "'embedded'" in text
    assert str(path) in text
    assert "\n" not in text
    return text


def test_embedded_loads_in_the_asked_dtype() -> None:
    model, processor = load_vlm("embedded")
    assert model.dtype == torch.float32
    assert not model.training
    assert processor.tokenizer.padding_side == "left"
    assert load_vlm("embedded", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_missing_folder(tmp_path: Path) -> None:
    assert "no VLM folder" in message(tmp_path / "nowhere")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in message(folder)


def test_no_processor(folder: Path) -> None:
    (folder / "processor_config.json").unlink()
    assert "no processor" in message(folder)


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in message(folder)


def test_no_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert "no chat template" in message(folder)


def test_pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle weights only (pytorch_model.bin)" in message(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no weights" in message(folder)


def test_wrong_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config["text_config"], "model_type": "qwen3"}))
    assert "'qwen3'" in message(folder)


def test_unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    assert "cannot read config.json" in message(folder)


def test_broken_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no safetensors")
    assert "cannot load the VLM" in message(folder)
