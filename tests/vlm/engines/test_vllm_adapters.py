"""Adapters on a server: loaded by their folder, asked by their name, and nobody else's answer in their stead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from covr_lightning.errors import ConfigError
from covr_lightning.vlm.adapters import LoRA
from covr_lightning.vlm.engines.vllm_requests import adapter_name
from covr_lightning.vlm.vlm import VLM
from tests.vlm.engines.vllm_stub import BASE, CARTPOLE, Clock, Request, VLLMStub, frames, vlm_at

TEXT_TARGETS = r".*text_model.*(q|v)_proj"


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory, untrained_vlm: Path) -> list[Path]:
    """A run's first two adapters."""
    folder = tmp_path_factory.mktemp("runs") / "my run" / "rounds"
    vlm = VLM(str(untrained_vlm), LoRA(rank=2, targets=TEXT_TARGETS))
    vlm.load(CARTPOLE)
    vlm.add_adapter()
    folders = []
    for i in (1, 2):
        with torch.no_grad():
            for name, parameter in vlm.model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(i / 100)
        folders.append(folder / f"round_{i:03d}_adapter")
        vlm.save_adapter(folders[-1])
    return folders


def says_by_whom(request: Request) -> str:
    """Another answer by the base model, by round 1 and by round 2."""
    model = request.body["model"]
    return f"action:[0.{0 if model == BASE else int(model.split('round_')[1][:3])}]"


def test_a_round_s_adapter_is_loaded_by_its_folder_and_answers_by_its_name(stub: VLLMStub, rounds: list[Path]) -> None:
    stub.answer = says_by_whom
    vlm = vlm_at(stub)
    assert vlm.answer(frames(2)) == ["action:[0.0]"] * 2
    vlm.load_adapter(rounds[0], 1)
    assert vlm.answer(frames(2)) == ["action:[0.1]"] * 2
    (load,) = (request for request in stub.requests if request.path == "/v1/load_lora_adapter")
    name = load.body["lora_name"]
    assert load.body == {"lora_name": name, "lora_path": str(rounds[0].resolve())}
    assert name.startswith("my_run-round_001-")
    assert [chat.body["model"] for chat in stub.chats()] == [BASE, BASE, name, name]
    vlm.answer(frames(1))
    assert stub.paths().count("load_lora_adapter") == 1

    vlm.load_adapter(rounds[1], 2)
    assert vlm.answer(frames(1)) == ["action:[0.2]"]
    assert [Path(path) for path in stub.adapters.values()] == [rounds[1].resolve()]  # the older one is unloaded
    with vlm.without_adapter():
        assert vlm.answer(frames(1)) == ["action:[0.0]"]
    assert vlm.answer(frames(1)) == ["action:[0.2]"]


def test_names_tell_weights_apart(rounds: list[Path], tmp_path: Path) -> None:
    again = tmp_path / "my run" / "rounds" / rounds[0].name
    shutil.copytree(rounds[0], again)
    assert adapter_name(again) == adapter_name(rounds[0])
    shutil.copy(rounds[1] / "adapter_model.safetensors", again)  # the round was done again, with another outcome
    assert adapter_name(again) != adapter_name(rounds[0])
    assert adapter_name(again).rpartition("-")[0] == adapter_name(rounds[0]).rpartition("-")[0] == "my_run-round_001"
    with pytest.raises(ConfigError, match="where no adapter is"):
        adapter_name(tmp_path)


def test_until_an_adapter_is_loaded_frames_are_masked_and_nobody_else_answers(
    stub: VLLMStub, rounds: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    stub.answer = says_by_whom
    clock = Clock()
    vlm = vlm_at(stub, clock)
    vlm.load_adapter(rounds[0], 1)
    assert vlm.answer(frames(2)) == ["action:[0.1]"] * 2
    stub.trouble = lambda request: (400, {}) if request.path.endswith("load_lora_adapter") else None
    vlm.load_adapter(rounds[1], 2)
    stub.requests.clear()
    assert vlm.answer(frames(2)) == [None, None]
    assert not stub.chats()
    (warning,) = caplog.records
    assert f"did not load the adapter {rounds[1].resolve()}: status 400" in warning.message
    assert "--enable-lora" in warning.message
    assert vlm.answer(frames(2)) == [None, None]
    stub.trouble = lambda request: None
    clock.now += 30
    assert vlm.answer(frames(2)) == ["action:[0.2]"] * 2


def test_a_server_that_was_restarted_gets_the_adapter_again(stub: VLLMStub, rounds: list[Path]) -> None:
    stub.answer = says_by_whom
    clock = Clock()
    vlm = vlm_at(stub, clock)
    vlm.load_adapter(rounds[0], 1)
    vlm.answer(frames(1))
    stub.adapters.clear()
    assert vlm.answer(frames(3)) == ["action:[0.1]"] * 3
    assert stub.paths().count("load_lora_adapter") == 2
    stub.stop()
    stub.start()
    assert vlm.answer(frames(3)) == ["action:[0.1]"] * 3
    # Restarted while it was left alone: the first try after the rest succeeds, since it begins with the adapter.
    stub.stop()
    assert vlm.answer(frames(3)) == [None] * 3
    stub.start()
    clock.now += 30
    assert vlm.answer(frames(3)) == ["action:[0.1]"] * 3


def test_an_adapter_whose_loading_was_not_confirmed_is_found_in_the_list(stub: VLLMStub, rounds: list[Path]) -> None:
    stub.answer = says_by_whom
    vlm = vlm_at(stub)
    vlm.load_adapter(rounds[0], 1)
    stub.trouble = lambda request: "drop late" if request.path.endswith("load_lora_adapter") else None
    assert vlm.answer(frames(1)) == ["action:[0.1]"]
    assert stub.paths() == ["load_lora_adapter", "models", "chat/completions"]


def test_an_answer_by_another_model_is_none(stub: VLLMStub, rounds: list[Path]) -> None:
    vlm = vlm_at(stub)
    vlm.load_adapter(rounds[0], 1)
    reply = {"model": BASE, "choices": [{"message": {"content": "action:[0.5]"}}]}
    stub.trouble = lambda request: json.dumps(reply).encode() if request.path.endswith("completions") else None
    assert vlm.answer(frames(2)) == [None, None]


def test_several_trainers_on_one_server(stub: VLLMStub, rounds: list[Path]) -> None:
    stub.answer = says_by_whom
    vlms = [vlm_at(stub) for _ in range(3)]
    for vlm, adapter in zip(vlms[1:], rounds, strict=True):
        vlm.load_adapter(adapter, 1)
    for _ in range(2):
        assert [vlm.answer(frames(1)) for vlm in vlms] == [["action:[0.0]"], ["action:[0.1]"], ["action:[0.2]"]]
    assert len(stub.adapters) == 2


@pytest.mark.parametrize("targets", [["mlp"], ["self_attn"], ["norm"]])
def test_targets_that_cannot_be_adapted_are_refused_at_once(untrained_vlm: Path, targets: list[str]) -> None:
    vlm = VLM(str(untrained_vlm), LoRA(rank=2, targets=targets))
    vlm.load(CARTPOLE)
    with pytest.raises(ConfigError, match=rf"vlm\.lora\.targets is \['{targets[0]}'\], which names .*{targets[0]}, a "):
        vlm.check_targets()
    with pytest.raises(ConfigError, match=rf"vlm\.lora\.targets is \['{targets[0]}'\], which PEFT refuses: Target"):
        vlm.add_adapter()


def test_what_vllm_would_serve_in_part_is_refused(stub: VLLMStub, rounds: list[Path], untrained_vlm: Path) -> None:
    for targets in (["q_proj"], ".*text_model.*q_proj|lm_head"):
        vlm = vlm_at(stub, vlm={"path": str(untrained_vlm), "lora": LoRA(rank=2, targets=targets)})
        with pytest.raises(ConfigError, match=r"vlm\.lora\.targets is .* names outside the language model"):
            vlm.check_targets()  # by the VLM's configuration alone
        assert vlm.model is None
        with pytest.raises(ConfigError, match=r"vlm\.lora\.targets is .* names outside the language model"):
            vlm.load_weights()
    whole = VLM(str(untrained_vlm), LoRA(rank=2, targets=["q_proj"]))
    whole.load(CARTPOLE)
    whole.add_adapter()
    folder = rounds[0].parent / "whole_adapter"
    whole.save_adapter(folder)
    with pytest.raises(ConfigError, match=r"The adapter is .*whole_adapter"):
        vlm_at(stub, vlm={"adapter": str(folder)})
    served = vlm_at(stub, vlm={"adapter": str(rounds[0])})
    with pytest.raises(ConfigError, match=r"The adapter is .*whole_adapter"):
        served.load_adapter(folder, 3)
    assert (served.round, served.adapter_folder(folder)) == (0, rounds[0])  # the one before stays in force
    with pytest.raises(ConfigError, match="where no adapter is"):
        vlm_at(stub, vlm={"adapter": str(folder.parent)})


def test_weights_loaded_later_get_the_adapter_in_force(stub: VLLMStub, rounds: list[Path], untrained_vlm: Path) -> None:
    settings = {"path": str(untrained_vlm), "lora": LoRA(rank=2, targets=TEXT_TARGETS), "adapter": str(rounds[0])}
    vlm = vlm_at(stub, vlm=settings)
    assert vlm.model is None
    assert not vlm.has_adapter
    vlm.load_weights()
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            assert torch.equal(parameter, torch.full_like(parameter, 0.01))
    with pytest.raises(ValueError, match="reads a round's adapter from a folder"):
        vlm.adapter_trained(1)


def test_a_damaged_adapter_is_said_in_a_sentence(stub: VLLMStub, rounds: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "round_003_adapter"
    shutil.copytree(rounds[0], folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors of the adapter .* is damaged or cut off"):
        vlm_at(stub).load_adapter(folder, 3)
