"""Qwen2.5-VL's shape with random weights, and a tokenizer and processor of its size: nothing is downloaded.

Speed and memory depend on shapes, not on what the weights know. What does depend on it: a random model never ends an
answer, so an unconstrained one is as long as it may be.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, cast

import torch

from covr_lightning.envs import EnvSpec, Road
from covr_lightning.vlm.action_text import ActionText
from covr_lightning.vlm.families import image_only, set_token_ids
from covr_lightning.vlm.inputs import VLMInputs
from covr_lightning.vlm.prompts import prompt_for
from covr_lightning.vlm.vlm import VLM, LoRA

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

#: config.json of Qwen/Qwen2.5-VL-3B-Instruct, as far as it decides about shapes.
QWEN_3B: dict[str, Any] = {
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "tie_word_embeddings": True,
}
#: Tokens of its tokenizer; the embedding has some rows more.
QWEN_TOKENS = 151665


def shrunk(
    hidden: int, layers: int, vision_hidden: int, vision_layers: int, vocabulary: int = 151936
) -> dict[str, Any]:
    """The 3B model's configuration with fewer and narrower layers, of the same proportions, and its vocabulary.

    Args:
        hidden: Width of the language model, a multiple of 64; attention heads are 64 wide.
        layers: Its depth.
        vision_hidden: Width of the vision tower, a multiple of 64.
        vision_layers: Its depth.
        vocabulary: Rows of the embedding.
    """
    text, vision = QWEN_3B["text_config"], QWEN_3B["vision_config"]
    return {
        "text_config": text
        | {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": hidden * text["intermediate_size"] // text["hidden_size"],
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64,
            "num_key_value_heads": 1,
            "rope_parameters": text["rope_parameters"] | {"mrope_section": [8, 12, 12]},
        },
        "vision_config": vision
        | {
            "depth": vision_layers,
            "hidden_size": vision_hidden,
            "intermediate_size": vision_hidden * vision["intermediate_size"] // vision["hidden_size"],
            "num_heads": vision_hidden // 64,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [vision_layers - 1],
        },
        "tie_word_embeddings": True,
    }


def train_bpe(corpus: Iterable[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE that cuts words as Qwen's does.

    Args:
        corpus: What it is trained on.
        size: Tokens at most.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    stock: Any = Qwen2Tokenizer(vocab={}, merges=[])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = stock._tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(corpus, trainer)
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def make_processor(task: str, tokens: int = QWEN_TOKENS) -> Any:
    """A processor of Qwen2.5-VL's class, whose tokenizer knows the words of one task's prompt.

    As in Qwen's own, a common word is one token and each digit another, so a prompt has about as many tokens.

    Args:
        task: Whose prompt.
        tokens: Size of the tokenizer; what the prompt does not need is filled up with tokens that nothing is cut into.
    """
    from transformers import AddedToken, Qwen2Tokenizer
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    prompt = prompt_for(task)
    answer = ActionText([-1.0] * 2, [1.0] * 2).encode([0.25, -0.25])
    vocabulary, merges = train_bpe([prompt.system, prompt.user, answer, "system user assistant"] * 4, 2000)
    room = tokens - len(SPECIAL_TOKENS) - len(vocabulary)
    filled = vocabulary | {f"<unused_{i}>": len(vocabulary) + i for i in range(room)}
    tokenizer = Qwen2Tokenizer(vocab=filled, merges=cast(Any, merges))
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS], special_tokens=True)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = QWEN_3B["text_config"]["max_position_embeddings"]
    pictures = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)
    return image_only(Qwen2_5_VLProcessor)(pictures, tokenizer, chat_template=CHAT_TEMPLATE)


def make_model(shape: dict[str, Any], processor: Any, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
    """A model of random weights.

    Args:
        shape: :data:`QWEN_3B` or :func:`shrunk`.
        processor: Of :func:`make_processor`; names the special tokens.
        dtype: Of the weights.
        device: Where they are drawn.
        seed: Of the weights.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _NAMED.items()}
    ends = {name: ids[name] for name in ("bos_token_id", "eos_token_id")}
    config = Qwen2_5_VLConfig(**shape | {"text_config": shape["text_config"] | ends}, **ids)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    set_token_ids(model, tokenizer)
    return model.requires_grad_(False).eval()


_NAMED = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "bos_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
}


def make_vlm(model: Any, processor: Any, spec: EnvSpec, lora: LoRA) -> VLM:
    """A VLM around a model that is in memory already."""
    vlm = VLM(lora=lora)
    vlm.model, vlm.inputs = model, VLMInputs(processor, prompt_for(spec.task))
    vlm.codec = ActionText(spec.action_low, spec.action_high)
    vlm.to(model.device)
    return vlm


def driving_spec() -> EnvSpec:
    """The highway scenario's: frames of 128×128, two action values, the longest of the prompts for CARLA."""
    return Road("highway").spec


def training_rows(spec: EnvSpec, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random frames (N, 3, H, W) uint8, actions (N, A), and weights (N,) in (0, 1]: every row is trained on."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, spec.frame_height, spec.frame_width)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    actions = 2 * torch.rand(count, spec.action_dim, generator=generator) - 1
    return frames, actions, 1 - torch.rand(count, generator=generator)
