"""The counted bytes of benchmarks/vlm_memory.py against real weights, optimizers and backward passes on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import vlm_memory
from benchmarks.vlm_configs import MODELS
from covr_lightning.envs import DMControl
from covr_lightning.finetune.module import FineTuneSettings, VLMFineTuner
from covr_lightning.vlm.adapters import LoRA, add_lora
from covr_lightning.vlm.loading import load_vlm
from covr_lightning.vlm.quantization import modules_kept
from covr_lightning.vlm.vlm import VLM

Folders = Callable[..., Path]
FAMILIES = [("qwen2_vl", True), ("qwen2_5_vl", True), ("qwen3_vl", False), ("llava", False)]
LORA = LoRA(rank=4, alpha=8, dropout=0.05)


def on_meta(config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    from transformers import AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText
    with torch.device("meta"):
        return auto.from_config(config, dtype=dtype)


@pytest.mark.parametrize("name", MODELS)
def test_configs_have_the_parameters_that_the_hub_states(name: str) -> None:
    assert on_meta(MODELS[name].config()).num_parameters() == MODELS[name].parameters


def test_quantised_bytes_by_hand() -> None:
    # 96 × 160 = 15,360 entries: 7,680 bytes, 240 scales of a byte, one scale of scales, mean and code books of
    # 4·(1 + 16 + 256) = 1,092 bytes.
    assert vlm_memory.nf4_bytes(96 * 160) == 7680 + 240 + 4 + 1092
    assert vlm_memory.nf4_bytes(3) == 2 + 1 + 4 + 1092
    assert vlm_memory.int8_bytes(96, 160) == 15_360 + 4 * 96


def real_bytes(model: Any) -> int:
    """Every storage that the weights and their scales lie in."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if getattr(weight, "SCB", None) is not None:
            tensors.append(weight.SCB)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.offset, state.code, state.state2.absmax, state.state2.code]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("mode", vlm_memory.MODES)
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_counted_base_weights_are_the_real_ones(family: str, tied: bool, mode: str, hub_folder: Folders) -> None:
    quantization = mode if mode in ("int8", "nf4") else None
    if quantization is not None:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install covr_lightning[quantised])")
    dtype = torch.float32 if mode == "fp32" else torch.bfloat16
    model, _ = load_vlm(hub_folder(family, tied), dtype, quantization=quantization)
    twin = on_meta(model.config, dtype)
    assert vlm_memory.base_bytes(twin, mode, modules_kept(model.config)) == real_bytes(model)


def test_counted_adam_is_the_real_one(hub_folder: Folders) -> None:
    optim = pytest.importorskip("bitsandbytes.optim", reason="needs bitsandbytes")
    model = add_lora(load_vlm(hub_folder("llava"))[0].requires_grad_(False), LoRA(rank=40))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = {parameter.numel() < 4096 for parameter in trained}
    assert sizes == {True, False}  # both kinds of state
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    full = torch.optim.AdamW(trained)
    full.step()
    moments = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in full.state.values())
    assert moments == 2 * sum(parameter.nbytes for parameter in trained)
    small = optim.AdamW8bit(trained)
    for index, parameter in enumerate(trained):
        small.init_state(small.param_groups[0], parameter, 0, index)
    tensors = [value for state in small.state.values() for value in state.values() if torch.is_tensor(value)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in tensors}
    assert vlm_memory.adam_8bit_bytes(trained) == sum(storages.values())


def test_checkpoints_are_the_layers_inputs(hub_folder: Folders) -> None:
    model, _ = load_vlm(hub_folder("qwen2_5_vl", True))
    twin = add_lora(on_meta(model.config).requires_grad_(False), LORA).train()
    checkpoints, layer = vlm_memory.language_bytes(twin, 3, 50, torch.bfloat16)
    # Two layers' inputs of 3·50·64 bf16; behind them the last norm keeps its input and 1/√(mean square) in fp32.
    assert checkpoints == 2 * 3 * 50 * 64 * 2 + 3 * 50 * 64 * 4 + 3 * 50 * 4
    assert layer > checkpoints


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_estimated_activations_are_near_what_autograd_saves(
    family: str, tied: bool, checkpointing: bool, hub_folder: Folders
) -> None:
    vlm = VLM(str(hub_folder(family, tied)), LORA, dtype="bfloat16")
    vlm.load(DMControl("reacher-easy").spec)
    tuner = VLMFineTuner(vlm, FineTuneSettings())
    frames = torch.randint(0, 256, (4, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    actions = torch.zeros(4, 2)
    inputs, labels = vlm.inputs.training_batch(frames, [vlm.codec.encode(action) for action in actions])
    base = vlm.base_model
    tuner.model.train()
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    real = vlm_memory.saved_bytes(tuner.model, lambda: tuner.loss(frames, actions, torch.ones(4)))

    config, dtype = base.config, torch.bfloat16
    twin = add_lora(on_meta(config).requires_grad_(False), LORA).train()
    patches = int(inputs["image_grid_thw"][0].prod()) if "image_grid_thw" in inputs else (56 // 14) ** 2 + 1
    language, layer = vlm_memory.language_bytes(twin, 4, labels.shape[1], dtype)
    vision, block = vlm_memory.vision_bytes(twin, 4, patches, dtype)
    positions = int((labels != -100).sum())
    if not checkpointing:
        language, vision = 2 * layer, config.vision_config.depth * block if "qwen" in family else 3 * block
    gradients = positions * config.get_text_config().vocab_size * 6
    estimated = language + vision + vlm_memory.logit_bytes(twin, positions, dtype) - gradients

    assert estimated == pytest.approx(real, rel=0.1)


def test_the_smallest_gpu_with_its_margin() -> None:
    # 5 · 1.1 + 2 = 7.5; 5.5 · 1.1 + 2 = 8.05; 70 · 1.1 + 2 = 79; 71 · 1.1 + 2 = 80.1
    sizes = [vlm_memory.smallest_gpu(int(size * 1e9)) for size in (5, 5.5, 70, 71)]
    assert sizes == ["8 GB", "12 GB", "80 GB", "above 80 GB"]


def test_sums_by_hand() -> None:
    parts = {"base": 100, "adapter": 10, "gradients": 10, "adam": 20, "adam_8bit": 5, "autocast": 5, "checkpoints": 3}
    counted = vlm_memory.Bytes(**parts, layer=7, logits=4, all_logits=90, cache=6, prefill=2)
    assert counted.labelling == 100 + 10 + 6 + 2
    assert counted.fine_tuning(in_8bit=False) == 100 + 10 + 10 + 20 + 5 + 3 + 7
    assert counted.fine_tuning(in_8bit=True) == 100 + 10 + 10 + 5 + 5 + 3 + 7


@pytest.mark.slow
def test_the_published_tables_are_what_is_counted() -> None:
    work = vlm_memory.Work()
    counts = {
        name: {mode: vlm_memory.count(vlm, mode, work, LoRA(rank=128)) for mode in vlm_memory.MODES}
        for name, vlm in MODELS.items()
    }
    root = Path(__file__).parents[2]
    assert "\n".join(vlm_memory.short_table(counts)) in (root / "README.md").read_text()
    long = (root / "docs" / "memory.md").read_text()
    assert "\n".join(vlm_memory.long_table(counts)) in long
    assert "\n".join(vlm_memory.logit_table(counts)) in long
