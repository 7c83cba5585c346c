"""Base weights in four and eight bits on a CPU: what is quantised, QLoRA rounds, and what is refused."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from covr_lightning.envs import DMControl
from covr_lightning.errors import ConfigError
from covr_lightning.finetune import KeepAll, UniformWeight
from covr_lightning.finetune.module import FineTuneSettings, VLMFineTuner
from covr_lightning.finetune.round import RoundReport, fine_tune_round
from covr_lightning.vlm.adapters import LoRA
from covr_lightning.vlm.loading import load_vlm
from covr_lightning.vlm.vlm import VLM

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install covr_lightning[quantised])")

Folders = Callable[..., Path]
REACHER = DMControl("reacher-easy").spec
FAMILIES = [("qwen2_vl", True), ("qwen2_5_vl", True), ("qwen3_vl", False), ("llava", False)]
QUANTISED = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}
CPU = {"accelerator": "cpu", "devices": 1}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("bitsandbytes"), "level", logging.ERROR)  # it warns of every int8 product


def frames(count: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 40, 40), dtype=torch.uint8, generator=generator)


def quantised(folder: Path | str, quantization: str | None, dtype: str = "bfloat16", **lora: object) -> VLM:
    settings = LoRA(**{"rank": 4, "alpha": 8, "dropout": 0.0, **lora})
    vlm = VLM(str(folder), settings, dtype=dtype, quantization=quantization)
    vlm.load(REACHER)
    return vlm


def one_round(vlm: VLM, precision: str = "32-true", count: int = 8) -> RoundReport:
    rows = TensorDict({"frame": frames(count), "action": torch.tensor([0.5, -0.5]).expand(count, 2)}, [count])
    settings = FineTuneSettings(epochs=3, batch_size=4, accumulate=1, lr=5e-3, held_out=0.0)
    report = RoundReport(1, 1000, count)
    trainer = {**CPU, "precision": precision}
    fine_tune_round(
        report, vlm, rows, torch.arange(float(count)), 0.0, KeepAll(), UniformWeight(), settings, trainer
    )  # fmt: skip
    return report


def base_bits(vlm: VLM) -> dict[str, torch.Tensor]:
    """Every tensor of the base model, scales of quantised weights among them, by the name it has without an adapter."""
    state = {}
    for name, tensor in vlm.base_model.state_dict().items():
        if "lora_" not in name:
            state[name.replace(".base_layer", "")] = tensor.detach().clone()
    return state


@torch.no_grad()
def logits(vlm: VLM) -> torch.Tensor:
    return vlm.model(**vlm.inputs.prompt_batch(frames(2))).logits


@pytest.mark.parametrize("quantization", QUANTISED)
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_label_fine_tune_label(family: str, tied: bool, quantization: str, hub_folder: Folders, tmp_path: Path) -> None:
    folder = hub_folder(family, tied)
    vlm = quantised(folder, quantization)
    linear = {name: type(m).__name__ for name, m in vlm.model.named_modules() if isinstance(m, torch.nn.Linear)}
    language = {name for name in linear if name.startswith("model.language_model.")}
    assert len(language) == 2 * 7  # two layers of q, k, v, o, gate, up, down
    assert {linear[name] for name in language} == {QUANTISED[quantization]}
    assert {linear[name] for name in linear.keys() - language} == {"Linear"}
    assert vlm.model.get_output_embeddings().weight.dtype == torch.bfloat16

    before = base_bits(vlm)
    answers, plain = vlm.answer(frames(2)), logits(vlm)
    report = one_round(vlm)
    assert report.losses[-1] < report.losses[0] - 0.3
    assert {p.dtype for p in vlm.model.parameters() if p.requires_grad} == {torch.float32}
    after = base_bits(vlm)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(vlm.answer(frames(2))) == 2
    assert not torch.equal(logits(vlm), plain)
    with vlm.without_adapter():
        assert torch.equal(logits(vlm), plain)
        assert vlm.answer(frames(2)) == answers

    vlm.save_adapter(tmp_path / "adapter")
    fresh = quantised(folder, quantization)
    fresh.load_adapter(tmp_path / "adapter", 1)
    assert torch.equal(logits(fresh), logits(vlm))
    with pytest.raises(ConfigError, match="cannot be merged into quantised weights"):
        vlm.merge_adapter()


@pytest.mark.parametrize("quantization", QUANTISED)
def test_the_embedded_vlm_is_quantised_and_learns(quantization: str) -> None:
    vlm = quantised("embedded", quantization, targets=".*text_model.*(q|v)_proj|lm_head")
    _, valid = vlm.propose(frames(4))
    assert valid.any()
    report = one_round(vlm)
    assert report.losses[-1] < report.losses[0]
    _, valid = vlm.propose(frames(4))
    assert valid.any()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_bf16_base_is_fine_tuned_in_either_precision(
    quantization: str | None, precision: str, hub_folder: Folders
) -> None:
    vlm = quantised(hub_folder("qwen2_5_vl", tied=True), quantization)
    before = base_bits(vlm)
    report = one_round(vlm, precision)
    assert report.losses[-1] < report.losses[0] - 0.3
    assert {p.dtype for p in vlm.model.parameters() if p.requires_grad} == {torch.float32}
    after = base_bits(vlm)
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_labelling_first_does_not_cut_the_gradient(hub_folder: Folders) -> None:
    # With bf16 instructions bitsandbytes repacks four-bit weights at the first inference for a kernel without backward.
    folder = hub_folder("qwen2_5_vl", tied=True)
    gradients = []
    for labels_first in (False, True):
        vlm = quantised(folder, "nf4")
        if labels_first:
            vlm.answer(frames(2))
        torch.manual_seed(0)
        tuner = VLMFineTuner(vlm, FineTuneSettings(gradient_checkpointing=False))
        tuner.model.train()
        tuner.loss(frames(2), torch.zeros(2, 2), torch.ones(2)).backward()
        first = {n: p.grad for n, p in tuner.model.named_parameters() if "layers.0.self_attn.q_proj.lora_B" in n}
        assert len(first) == 1
        gradients += first.values()
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


@pytest.mark.parametrize("quantization", QUANTISED)
def test_weights_are_as_near_as_their_bits_allow(quantization: str, hub_folder: Folders) -> None:
    from bitsandbytes import functional

    folder = hub_folder("llava")
    name = "model.language_model.layers.0.mlp.up_proj"
    full = load_vlm(folder)[0].get_submodule(name).weight
    weight = load_vlm(folder, quantization=quantization)[0].get_submodule(name).weight
    if quantization == "nf4":
        found = functional.dequantize_4bit(weight.data, weight.quant_state)
        # The widest gap of NF4's 16 levels lies between −1.0 and −0.696; a value is off by half of it at most, in units
        # of its block's largest. The scales' own 8 bits add a little.
        scale = full.reshape(-1, 64).abs().amax(1, keepdim=True).expand(-1, 64).reshape(full.shape)
        bound = (0.304 / 2 + 0.02) * scale
    else:
        found = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        bound = full.abs().amax(1, keepdim=True) * (0.5 / 127 + 1e-3)  # half a step, and fp16's rounding on the way
    error = (found - full).abs()
    assert (error <= bound).all()
    assert error.max() > 0


def test_full_and_quantised_answers_are_akin(hub_folder: Folders) -> None:
    folder = hub_folder("qwen3_vl")
    full, four, eight = (logits(quantised(folder, q, "float32")) for q in (None, "nf4", "int8"))
    distance = {name: ((part - full).norm() / full.norm()).item() for name, part in (("4", four), ("8", eight))}
    assert 0 < distance["8"] < distance["4"] < 0.5


@pytest.mark.parametrize("has_answered", [False, True])
@pytest.mark.parametrize("quantization", QUANTISED)
def test_moving_leaves_quantised_weights_as_they_are(
    quantization: str, has_answered: bool, hub_folder: Folders
) -> None:
    expected = logits(quantised(hub_folder("llava"), quantization))
    vlm = quantised(hub_folder("llava"), quantization)
    if has_answered:
        logits(vlm)  # the first answer moves eight-bit weights and scales from the parameter to the layer
    vlm.to(torch.device("cpu"))
    for module in vlm.model.modules():
        if type(module).__name__ == "Linear8bitLt":
            holder = module.state if has_answered else module.weight
            assert holder.CB.data_ptr() == module.weight.data_ptr()  # one copy
            assert holder.SCB.shape == (module.out_features,)
    assert torch.equal(logits(vlm), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", QUANTISED)
def test_quantised_on_the_cpu_and_moved_or_on_the_gpu_at_once(quantization: str, hub_folder: Folders) -> None:
    folder, gpu = hub_folder("qwen2_5_vl", tied=True), torch.device("cuda", 0)
    moved = quantised(folder, quantization)
    moved.to(gpu)
    there = VLM(str(folder), LoRA(rank=4), dtype="bfloat16", quantization=quantization)
    there.to(gpu)
    there.load(REACHER)
    assert {p.device for vlm in (moved, there) for p in vlm.model.parameters()} == {gpu}
    assert len(moved.answer(frames(2))) == len(there.answer(frames(2))) == 2


def test_what_cannot_be_quantised(hub_folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"vlm\.quantization is 'int4'; it can be 'nf4', 'int8' or null"):
        VLM(quantization="int4")
    with pytest.raises(ConfigError, match=r"vlm\.dtype is 'bf16'; it can be 'float32', 'bfloat16' or null"):
        VLM(dtype="bf16")
    vlm = quantised(hub_folder("llava"), "nf4")
    vlm.save(tmp_path / "quantised")
    again = quantised(tmp_path / "quantised", None)
    assert torch.equal(logits(again), logits(vlm))
    with pytest.raises(ConfigError, match="are quantised already"):
        load_vlm(tmp_path / "quantised", quantization="nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"which needs bitsandbytes .*covr_lightning\[quantised\]"):
        VLM(quantization="nf4")
