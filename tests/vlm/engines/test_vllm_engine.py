"""vLLM in this process, with a module in its place whose signatures are those of vLLM's public source (0.12 and later).

It has not run against the real one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from covr_lightning import processes
from covr_lightning.errors import ConfigError
from covr_lightning.vlm import VLLMEngine
from covr_lightning.vlm.adapters import LoRA
from covr_lightning.vlm.decoding import Decoding
from covr_lightning.vlm.loading import embedded_folder
from covr_lightning.vlm.vlm import VLM
from tests.vlm.engines.vllm_stub import CARTPOLE, Request, answers, frames, says_first_pixel

TARGETS = r".*text_model.*(q|v)_proj"


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    tensorizer_config_dict: dict | None = None
    load_inplace: bool = False


@dataclass
class StructuredOutputsParams:
    json: str | dict | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


@dataclass
class SamplingParams:
    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = 16
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None


class LLM:
    """Remembers how it was started and asked."""

    started: dict[str, Any]

    def __init__(
        self,
        model: str,
        *,
        trust_remote_code: bool = False,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.9,
        **engine_args: Any,
    ) -> None:
        known = {"enable_lora", "max_lora_rank", "limit_mm_per_prompt", "max_model_len"}
        assert set(engine_args) <= known
        assert not trust_remote_code
        share = {"dtype": dtype, "gpu_memory_utilization": gpu_memory_utilization}
        type(self).started = {"model": model, **share, **engine_args}
        self.asked: list[tuple[list, list[SamplingParams], LoRARequest | None]] = []

    def chat(
        self,
        messages: Sequence[list[dict]],
        sampling_params: list[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        assert not use_tqdm
        self.tokenized = tokenization_kwargs
        assert sampling_params is not None
        assert len(messages) == len(sampling_params)
        self.asked.append((list(messages), sampling_params, lora_request))
        texts = [says_first_pixel(Request("", "", {}, {"messages": m})) + "." for m in messages]
        return [SimpleNamespace(outputs=[SimpleNamespace(text=text)]) for text in texts]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.sampling_params": {"StructuredOutputsParams": StructuredOutputsParams},
    }
    for name, members in parts.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


def opened(**settings: Any) -> tuple[VLM, LLM]:
    engine = settings.setdefault("engine", VLLMEngine())
    vlm = VLM(**settings)
    vlm.load(CARTPOLE)
    return vlm, engine._llm


@pytest.mark.usefixtures("vllm")
def test_frames_prompt_and_decoding_reach_vllm() -> None:
    vlm, llm = opened(path="org/name", dtype="bfloat16", decoding=Decoding(True, temperature=0.5, top_p=0.8))
    assert vlm.model is None
    pictures = frames(3)
    assert vlm.answer(pictures) == answers(3)
    ((messages, sampling, adapter),) = llm.asked
    assert adapter is None
    for conversation, params, picture in zip(messages, sampling, pictures, strict=True):
        assert torch.equal(Request("", "", {}, {"messages": conversation}).frame, picture)
        assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.5, 0.8, -1, 1.0)
        assert (params.max_tokens, params.stop, params.include_stop_str_in_output) == (15, ["]"], True)
        assert params.structured_outputs is not None
        assert params.structured_outputs.regex == r" ?action:\[-?[0-9]{1,1}(\.[0-9]{1,2})?\]"
    assert len({params.seed for params in sampling}) == 3
    assert LLM.started == {
        "model": "org/name",
        "dtype": "bfloat16",
        "gpu_memory_utilization": 0.4,
        "enable_lora": True,
        "max_lora_rank": 128,
        "limit_mm_per_prompt": {"image": 1},
    }


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(("family", "adds"), [("llava", True), ("qwen2_5_vl", False)])
def test_what_a_prompt_begins_with_here_it_begins_with_there(
    family: str, adds: bool, hub_folder: Callable[..., Path]
) -> None:
    vlm, llm = opened(path=str(hub_folder(family)))
    vlm.answer(frames(1))
    assert llm.tokenized == {"add_special_tokens": adds}


@pytest.mark.usefixtures("vllm")
def test_options_go_to_vllm_and_ranks_are_rounded_up() -> None:
    opened(engine=VLLMEngine(0.2, {"max_model_len": 512, "enable_lora": False}), lora=LoRA(rank=33))
    assert LLM.started["model"] == str(embedded_folder())
    assert (LLM.started["max_lora_rank"], LLM.started["dtype"]) == (64, "auto")
    assert (LLM.started["max_model_len"], LLM.started["enable_lora"]) == (512, False)
    with pytest.raises(ConfigError, match=r"vlm\.lora\.rank is 513, but vLLM takes at most 512"):
        opened(lora=LoRA(rank=513))


@pytest.mark.usefixtures("vllm")
def test_another_gpu_than_the_first_or_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = VLM(engine=VLLMEngine())
    vlm.to(torch.device("cuda", 3))
    with pytest.raises(ConfigError, match=r"the run is on GPU 3: give the run that GPU as its first"):
        vlm.load(CARTPOLE)
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(ConfigError, match=r"the run has several processes: ask a server \(VLLMServer\)"):
        opened()


@pytest.mark.usefixtures("vllm")
def test_each_adapter_has_a_number_of_its_own(untrained_vlm: Path, tmp_path: Path) -> None:
    vlm, llm = opened(path=str(untrained_vlm), lora=LoRA(rank=2, targets=TARGETS))
    vlm.load_weights()
    vlm.add_adapter()
    used: list[LoRARequest | None] = []
    for round_ in (1, 2):
        with torch.no_grad():
            for name, parameter in vlm.model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(round_ / 100)
        vlm.adapter_trained(round_, tmp_path / "run" / "rounds" / f"round_{round_:03d}_adapter")
        vlm.answer(frames(1))
        used.append(llm.asked[-1][2])
    with vlm.without_adapter():
        vlm.answer(frames(1))
    used.append(llm.asked[-1][2])
    vlm.answer(frames(1))
    used.append(llm.asked[-1][2])
    first, second, none, again = used
    assert none is None
    assert first is not None
    assert second is not None
    assert (first.lora_int_id, second.lora_int_id) == (1, 2)
    assert first.lora_name.startswith("run-round_001-")
    assert second.lora_name.startswith("run-round_002-")
    assert Path(second.lora_path) == tmp_path / "run" / "rounds" / "round_002_adapter"
    assert again == second


def test_without_vllm_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        ConfigError, match=r"vLLM 0\.12 or later is not installed: pip install 'covr_lightning\[vllm\]'"
    ):
        opened()
    with pytest.raises(ConfigError, match="trust_remote_code"):
        VLLMEngine(options={"trust_remote_code": True})
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization is 1\.5"):
        VLLMEngine(1.5)
