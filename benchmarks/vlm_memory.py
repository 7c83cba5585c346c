"""GPU memory of labelling and fine-tuning with the paper's VLMs, from counted bytes: nothing here is measured on a GPU.

    python -m benchmarks.vlm_memory                   # the tables of docs/memory.md

Each model is built from its true configuration on the meta device, where nothing is allocated, and gets the paper's
adapter. Weights, gradients and optimizer states are exact; what the backward pass needs is what autograd saves there.
docs/memory.md says how, and what is left out. tests/vlm/test_memory_count.py compares with real models on a CPU.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.vlm_configs import MODELS, PaperVLM
from covr_lightning.finetune.loss import weighted_nll
from covr_lightning.vlm.adapters import CARLA_LORA_TARGETS, LoRA, add_lora
from covr_lightning.vlm.quantization import modules_kept

Mode = Literal["fp32", "bf16", "int8", "nf4"]
MODES: tuple[Mode, ...] = ("fp32", "bf16", "int8", "nf4")
GPUS_GB = (8, 12, 16, 24, 40, 48, 80)
#: CUDA context and libraries, the agent and its update, the allocator's holes: so much beyond what is counted.
MARGIN_SHARE, MARGIN_GB = 0.1, 2.0
FP32 = 4


@dataclass(frozen=True)
class Work:
    """What one step works on.

    Attributes:
        picture: Side of a frame in pixels.
        prompt_tokens: The prompt's tokens without the picture's. Qwen's tokenizer makes some 220 of the paper's prompt
            (Fig. 10), and fewer of this package's.
        answer_tokens: An answer's tokens with its end; it makes 13 of two values, and one for the end.
        batch: Rows per forward pass of fine-tuning.
        label_batch: Frames labelled at once.
    """

    picture: int = 128
    prompt_tokens: int = 250
    answer_tokens: int = 16
    batch: int = 4
    label_batch: int = 16


@dataclass(frozen=True)
class Bytes:
    """One model in one mode, in bytes.

    Attributes:
        base: Base weights with their scales, and buffers.
        adapter: Its weights (fp32), gradients and Adam's two moments in fp32, or in 8 bits; bf16 copies of its weights
            that autocast keeps during a step.
        checkpoints: Inputs of all layers, kept by gradient checkpointing.
        layer: What the backward pass of the largest layer needs, a dequantised matrix with it.
        logits: Logits at label positions, their gradients, and what the loss keeps.
        all_logits: The same at every position.
        cache: Keys and values while labelling.
        prefill: The widest activations of a layer while labelling.
    """

    base: int
    adapter: int
    gradients: int
    adam: int
    adam_8bit: int
    autocast: int
    checkpoints: int
    layer: int
    logits: int
    all_logits: int
    cache: int
    prefill: int

    @property
    def labelling(self) -> int:
        """Labelling alone, with an adapter."""
        return self.base + self.adapter + self.cache + self.prefill

    def fine_tuning(self, in_8bit: bool) -> int:
        """A round: the most of a training step and of labelling its held-out rows, before and after."""
        standing = self.base + self.adapter + self.gradients + (self.adam_8bit if in_8bit else self.adam)
        step = standing + self.autocast + self.checkpoints + max(self.layer, self.logits)
        return max(step, self.labelling)


# -- weights ---------------------------------------------------------------------------------------------------------


def nf4_bytes(count: int) -> int:
    """A matrix in NF4 with double quantisation: two entries a byte, and the scales.

    One 8-bit scale per block of 64, one fp32 scale of scales per 256 of those, their fp32 mean, and the two code books
    of 16 and 256 fp32 entries that each matrix has of its own.
    """
    blocks = math.ceil(count / 64)
    return math.ceil(count / 2) + blocks + FP32 * math.ceil(blocks / 256) + FP32 * (1 + 16 + 256)


def int8_bytes(rows: int, columns: int) -> int:
    """A matrix in LLM.int8(): one byte an entry, one fp32 scale a row."""
    return rows * columns + FP32 * rows


def base_bytes(model: nn.Module, mode: Mode, kept: list[str]) -> int:
    """All parameters, tied ones once, and buffers.

    Args:
        model: The VLM without an adapter.
        mode: Type of its weights.
        kept: Linear layers that are not quantised.
    """
    element = FP32 if mode == "fp32" else 2
    total = sum(buffer.nbytes for buffer in model.buffers())
    quantised = {
        id(module.weight)
        for name, module in model.named_modules()
        if mode in ("nf4", "int8") and isinstance(module, nn.Linear) and name not in kept
    }
    for parameter in model.parameters():  # a tied one comes once
        if id(parameter) not in quantised:
            total += parameter.numel() * element
        elif mode == "nf4":
            total += nf4_bytes(parameter.numel())
        else:
            total += int8_bytes(*parameter.shape)
    return total


def adam_8bit_bytes(parameters: list[nn.Parameter]) -> int:
    """8-bit Adam of bitsandbytes: two moments a byte each, one fp32 scale per 256, in fp32 below 4096 entries.

    The two code books of 256 fp32 entries are shared.
    """
    total = 2 * 256 * FP32
    for parameter in parameters:
        count = parameter.numel()
        total += 2 * FP32 * count if count < 4096 else 2 * (count + FP32 * math.ceil(count / 256))
    return total


# -- activations -----------------------------------------------------------------------------------------------------


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """What autograd saves for the backward pass, each storage once, without the model's own parameters and buffers.

    Works on the meta device as on any other. With gradient checkpointing only the layers' inputs are seen.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor  # held, so that no other storage takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), fused_attention():
        forward()
    return sum(tensor.untyped_storage().nbytes() for address, tensor in found.items() if address not in own)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention on the meta device by a fused kernel, as on any other: by itself it would take the unfused one there.

    A fused kernel keeps queries, keys, values, output and one number a row, and no matrix of tokens by tokens.
    """
    stock = functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if query.device.type != "meta":
            return stock(query, key, value, **options)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]

    with mock.patch.object(functional, "scaled_dot_product_attention", attention):
        yield


def language_bytes(model: Any, batch: int, tokens: int, dtype: torch.dtype) -> tuple[int, int]:
    """What the language model saves with gradient checkpointing, and one of its layers without.

    Args:
        model: PEFT's model on the meta device, in train mode.
        batch: B.
        tokens: T.
        dtype: Type of the base weights.
    """
    base = model.get_base_model()
    config = base.config.get_text_config()
    hidden = torch.empty(batch, tokens, config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
    mask = torch.empty(batch, 1, tokens, tokens, dtype=torch.bool, device="meta")  # ready, so that none is looked into

    def forward() -> None:
        base.get_decoder()(inputs_embeds=hidden, attention_mask=mask, use_cache=False)

    without = saved_bytes(model, forward)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    checkpoints = saved_bytes(model, forward)
    base.gradient_checkpointing_disable()
    return checkpoints, without // config.num_hidden_layers


def vision_bytes(model: Any, pictures: int, patches: int, dtype: torch.dtype) -> tuple[int, int]:
    """The same of the vision tower: its blocks' inputs, and what one block saves.

    Args:
        model: PEFT's model on the meta device, in train mode.
        pictures: B.
        patches: Patches of a picture.
        dtype: Type of the base weights.
    """
    base = model.get_base_model().model
    visual = getattr(base, "visual", None)
    if visual is None:
        block, depth = base.vision_tower.encoder.layers[0], len(base.vision_tower.encoder.layers)
        width = base.vision_tower.config.hidden_size
        hidden = torch.empty(pictures, patches, width, dtype=dtype, device="meta", requires_grad=True)
        saved = saved_bytes(model, lambda: block(hidden, attention_mask=None))
    else:
        block, depth = visual.blocks[0], len(visual.blocks)
        width = block.norm1.weight.shape[0]
        hidden = torch.empty(pictures * patches, width, dtype=dtype, device="meta", requires_grad=True)
        ends = torch.arange(pictures + 1, dtype=torch.int32) * patches  # not on meta: the block reads them
        angles = torch.empty(pictures * patches, width // visual.config.num_heads, device="meta")
        saved = saved_bytes(model, lambda: block(hidden, cu_seqlens=ends, position_embeddings=(angles, angles)))
    return depth * hidden.nbytes, saved


def logit_bytes(model: Any, positions: int, dtype: torch.dtype) -> int:
    """Logits, what the loss saves, and the gradients of both (fp32, then `dtype`), at so many positions."""
    head = model.get_base_model().get_output_embeddings()
    columns = model.get_base_model().config.get_text_config()
    hidden = torch.empty(positions, columns.hidden_size, dtype=dtype, device="meta", requires_grad=True)
    targets = torch.empty(positions, dtype=torch.long, device="meta")
    weights = torch.empty(positions, device="meta")
    saved = saved_bytes(model, lambda: weighted_nll(head(hidden), targets, weights))
    return saved + positions * columns.vocab_size * (FP32 + dtype.itemsize)


# -- a model ---------------------------------------------------------------------------------------------------------


def picture_patches(vlm: PaperVLM, config: Any, picture: int) -> tuple[int, int]:
    """Patches of a square picture, and the tokens they become in the language model."""
    vision = config.vision_config
    if not vlm.shortest_edge:
        patches = (vision.image_size // vision.patch_size) ** 2
        return patches + 1, patches
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    merge = vision.spatial_merge_size
    height, width = smart_resize(picture, picture, vision.patch_size * merge, vlm.shortest_edge)
    patches = (height // vision.patch_size) * (width // vision.patch_size)
    return patches, patches // merge**2


def count(vlm: PaperVLM, mode: Mode, work: Work, lora: LoRA) -> Bytes:
    """The bytes of one model in one mode.

    Args:
        vlm: The model.
        mode: Type of its base weights.
        work: What a step works on.
        lora: The adapter.
    """
    from transformers import AutoModelForImageTextToText

    config, dtype = vlm.config(), torch.float32 if mode == "fp32" else torch.bfloat16
    auto: Any = AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype)
        base = base_bytes(model, mode, modules_kept(config))
        largest = max(module.weight.numel() for module in model.get_decoder().layers.modules() if _is_linear(module))
        adapted = add_lora(model.requires_grad_(False), lora).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    adapter = sum(parameter.nbytes for parameter in trained)

    patches, picture_tokens = picture_patches(vlm, config, work.picture)
    tokens = work.prompt_tokens + picture_tokens + work.answer_tokens
    checkpoints, layer = language_bytes(adapted, work.batch, tokens, dtype)
    vision_checkpoints, block = vision_bytes(adapted, work.batch, patches, dtype)
    text = config.get_text_config()
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    entries = 2 * text.num_hidden_layers * text.num_key_value_heads * head_width
    return Bytes(
        base=base,
        adapter=adapter,
        gradients=adapter,
        adam=2 * adapter,
        adam_8bit=adam_8bit_bytes(trained),
        autocast=0 if mode == "fp32" else adapter // 2,
        checkpoints=checkpoints + vision_checkpoints,
        layer=max(layer, block) + (2 * largest if mode in ("nf4", "int8") else 0),
        logits=logit_bytes(adapted, work.batch * work.answer_tokens, dtype),
        all_logits=logit_bytes(adapted, work.batch * tokens, dtype),
        cache=work.label_batch * tokens * entries * dtype.itemsize,
        # Gate, up, their product, and its fp32 copy for the adapter.
        prefill=work.label_batch * tokens * text.intermediate_size * (3 * dtype.itemsize + FP32),
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def smallest_gpu(count: int) -> str:
    """The smallest usual GPU that holds so many bytes with the margin; sizes taken as 10⁹ bytes."""
    need = count / 1e9 * (1 + MARGIN_SHARE) + MARGIN_GB
    return next((f"{size} GB" for size in GPUS_GB if need <= size), f"above {GPUS_GB[-1]} GB")


# -- tables ----------------------------------------------------------------------------------------------------------


def short_table(counts: dict[str, dict[Mode, Bytes]]) -> list[str]:
    """The README's table: GPU sizes by model and mode."""
    lines = [
        "| VLM | label, bf16 | label, nf4 | fine-tune, bf16 | fine-tune, int8 | fine-tune, nf4 |",
        "|---|---|---|---|---|---|",
    ]
    for name, modes in counts.items():
        cells = [(modes[mode].labelling) for mode in ("bf16", "nf4")]
        cells += [modes["bf16"].fine_tuning(False)] + [modes[mode].fine_tuning(True) for mode in ("int8", "nf4")]
        lines.append(f"| {name} | " + " | ".join(f"{smallest_gpu(c)} ({c / 1e9:.1f})" for c in cells) + " |")
    return lines


def long_table(counts: dict[str, dict[Mode, Bytes]]) -> list[str]:
    """The parts of every sum, in GB."""
    lines = [
        "| VLM | base | base weights | adapter | gradients | Adam | Adam, 8 bits | autocast | checkpoints | "
        "one layer | logits | labels' cache | labelling | GPU | fine-tuning, Adam | GPU | fine-tuning, 8 bits | GPU |",
        "|" + "---|" * 18,
    ]
    for name, modes in counts.items():
        for mode, c in modes.items():
            parts = [c.base, c.adapter, c.gradients, c.adam, c.adam_8bit, c.autocast, c.checkpoints, c.layer, c.logits]
            cells = [f"{part / 1e9:.2f}" for part in (*parts, c.cache + c.prefill)]
            for total in (c.labelling, c.fine_tuning(False), c.fine_tuning(True)):
                cells += [f"**{total / 1e9:.1f}**", smallest_gpu(total)]
            lines.append(f"| {name} | {mode} | " + " | ".join(cells) + " |")
    return lines


def logit_table(counts: dict[str, dict[Mode, Bytes]]) -> list[str]:
    """What computing logits at label positions only saves, in GB."""
    lines = ["| VLM | at label positions | at all positions |", "|---|---|---|"]
    return lines + [
        f"| {name} | {modes['bf16'].logits / 1e9:.2f} | {modes['bf16'].all_logits / 1e9:.2f} |"
        for name, modes in counts.items()
    ]


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--picture", type=int, default=Work.picture, help="side of a frame in pixels")
    parser.add_argument("--prompt-tokens", type=int, default=Work.prompt_tokens)
    parser.add_argument("--rank", type=int, default=128, help="of the adapter")
    parser.add_argument("--modules", choices=["dmc", "carla"], default="dmc", help="Table 9's for DMControl or CARLA")
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)  # what the libraries say to one another
    work = Work(arguments.picture, arguments.prompt_tokens)
    print(f"{work}; margin {MARGIN_SHARE:.0%} and {MARGIN_GB} GB; computed, GB are 10⁹ bytes\n")
    targets = {"dmc": LoRA.targets, "carla": CARLA_LORA_TARGETS}
    lora = LoRA(rank=arguments.rank, targets=targets[arguments.modules])
    counts = {name: {mode: count(MODELS[name], mode, work, lora) for mode in MODES} for name in arguments.models}
    for table in (short_table, long_table, logit_table):
        print("\n".join(table(counts)), end="\n\n")


if __name__ == "__main__":
    main()
