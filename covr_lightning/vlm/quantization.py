"""Base weights in four or eight bits (Dettmers et al., QLoRA, 2023; LLM.int8(), 2022), by bitsandbytes."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from covr_lightning.errors import ConfigError

Quantization = Literal["nf4", "int8"]


def check_quantization(quantization: str | None) -> None:
    """Refuse what bitsandbytes cannot do here, before anything is loaded.

    Args:
        quantization: "nf4", "int8" or None.

    Raises:
        ConfigError: it is none of these, or bitsandbytes is not installed.
    """
    if quantization is None:
        return
    if quantization not in get_args(Quantization):
        choices = ", ".join(map(repr, get_args(Quantization)))
        raise ConfigError(f"vlm.quantization is {quantization!r}; it can be {choices} or null (none).")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"vlm.quantization is {quantization!r}, which needs bitsandbytes ({error}): install it with pip install "
            "'covr_lightning[quantised]', or leave vlm.quantization out."
        ) from error


def quantization_config(quantization: Quantization, config: Any, dtype: torch.dtype | str) -> Any:
    """What the library needs to quantise the linear layers of a VLM's language model while it loads them.

    Four bits are NormalFloat in blocks of 64 with quantised scales (double quantisation); eight bits are LLM.int8()
    with a scale per output row. The vision tower, its projector and lm_head keep `dtype`: Qwen's own four-bit releases
    of its VLMs leave the same parts alone, and lm_head may share its weights with the embedding.

    Args:
        quantization: "nf4" or "int8".
        config: the VLM's configuration.
        dtype: type that quantised weights are multiplied in.

    Returns:
        A `BitsAndBytesConfig`.
    """
    from transformers import BitsAndBytesConfig

    kept = modules_kept(config)
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,  # its name notwithstanding it holds for four bits as well
    )


def modules_kept(config: Any) -> list[str]:
    """Names of the linear layers outside the language model, which are not quantised.

    Args:
        config: the VLM's configuration.
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    language = {id(module) for module in model.get_decoder().modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) not in language
    ]


def keep_weights_as_stored(model: Any) -> None:
    """Stop bitsandbytes from repacking four-bit weights on a CPU with bf16 instructions.

    There it rewrites them in place at the first inference, with scales rounded to bf16, for a kernel that has no
    backward pass: an adapter trained after that gets no gradient through the base layers, without a word (0.50).

    Args:
        model: the VLM, quantised or not.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def move(model: Any, device: torch.device) -> None:
    """Move a VLM, quantised or not, to a device.

    `Module.to` replaces a parameter's values and leaves its attributes, where bitsandbytes keeps eight-bit weights a
    second time and their scales.

    Args:
        model: the VLM, with or without an adapter.
        device: where to.
    """
    model.to(device)
    for module in model.modules():
        state: Any = getattr(module, "state", None)
        if not hasattr(state, "SCB"):
            continue
        for holder in (module.weight, state):
            holder.CB = None if holder.CB is None else module.weight.data
            holder.SCB = None if holder.SCB is None else holder.SCB.to(device)
