"""Tiny random checkpoints of every family, written as the project saves them and as the hub lays them out."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.qwen import CHAT_TEMPLATE, SPECIAL_TOKENS, train_bpe
from covr_lightning.vlm.inputs import chat_messages
from covr_lightning.vlm.prompts import dmc_prompt

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava")
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
WIDTH, LAYERS, VISION_WIDTH = 64, 2, 32
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@cache
def _bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE trained on one prompt."""
    prompt = dmc_prompt("reacher-easy")
    return train_bpe([prompt.system, prompt.user, "system user assistant"] * 4, 420)


def qwen_tokenizer() -> Any:
    """Qwen's tokenizer class with a vocabulary of some 400 tokens."""
    from transformers import AddedToken, Qwen2Tokenizer

    vocab, merges = _bpe()
    tokenizer = Qwen2Tokenizer(vocab=dict(vocab), merges=list(merges))
    tokens = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.model_max_length = 131072
    return tokenizer


def llava_tokenizer() -> Any:
    """LLaVA's tokenizer class with a character vocabulary; like the real one it begins with <s>."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AddedToken, LlamaTokenizer

    characters = sorted({chr(code) for code in range(32, 127)} - {" "} | {"▁", "\n"})
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *characters])}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=[], legacy=False, add_bos_token=True)
    start = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer.backend_tokenizer.post_processor = start
    tokens = [AddedToken(token, special=True, normalized=False) for token in ("<image>", "<pad>")]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.pad_token = "<pad>"
    tokenizer.model_max_length = 4096
    return tokenizer


def _qwen_parts(tied: bool) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    tokenizer = qwen_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    ends = {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    text = {
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.1,
        "tie_word_embeddings": tied,
        **ends,
    }
    outer = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": tied,
        **ends,
    }
    return tokenizer, text, outer


def _qwen_config(family: str, tied: bool) -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

    tokenizer, text, outer = _qwen_parts(tied)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    common = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if family == "qwen2_vl":
        vision = {**common, "patch_size": 14, "embed_dim": VISION_WIDTH, "mlp_ratio": 2, "hidden_size": WIDTH}
        config = Qwen2VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision, **outer)
    elif family == "qwen2_5_vl":
        vision = {
            **common, "patch_size": 14, "hidden_size": VISION_WIDTH, "intermediate_size": 64, "out_hidden_size": WIDTH,
            "window_size": 56, "fullatt_block_indexes": [1],
        }  # fmt: skip
        config = Qwen2_5_VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision, **outer)
    else:
        vision = {
            **common, "patch_size": 16, "hidden_size": VISION_WIDTH, "intermediate_size": 64, "out_hidden_size": WIDTH,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
        }  # fmt: skip
        text |= {"head_dim": 16, "rope_parameters": {**rope, "rope_theta": 5e6, "mrope_interleaved": True}}
        config = Qwen3VLConfig(text_config=text, vision_config=vision, **outer)
    return config, tokenizer


def _llava_config() -> tuple[Any, Any]:
    from transformers import LlavaConfig

    tokenizer = llava_tokenizer()
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "initializer_range": 0.1,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "projection_dim": 32,
    }
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_token_id, vision_feature_layer=-2)
    return config, tokenizer


def tiny_model(family: str, tied: bool = False, seed: int = 0) -> tuple[Any, Any]:
    """A random model and its tokenizer."""
    from transformers import AutoModelForImageTextToText

    config, tokenizer = _llava_config() if family == "llava" else _qwen_config(family, tied)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(config).eval(), tokenizer


def _preprocessor(family: str) -> dict[str, Any]:
    """preprocessor_config.json with the hub's keys, the sizes apart."""
    if family == "llava":
        return {
            "crop_size": {"height": 56, "width": 56},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": CLIP_MEAN,
            "image_processor_type": "CLIPImageProcessor",
            "image_std": CLIP_STD,
            "processor_class": "LlavaProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": 56},
        }
    common = {"temporal_patch_size": 2, "merge_size": 2}
    if family == "qwen3_vl":
        return {
            "size": {"longest_edge": 16777216, "shortest_edge": 4096},
            "patch_size": 16,
            **common,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "Qwen3VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessorFast",
        }
    return {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        **common,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor" if family == "qwen2_5_vl" else "Qwen2VLProcessor",
    }


def write_hub_folder(folder: Path, family: str, tied: bool = False, seed: int = 0) -> Path:
    """Write a folder file by file as the family's repositories on the hub are laid out.

    Those of Qwen2-VL, Qwen2.5-VL and LLaVA-1.5 were made with older versions of the library: the text configuration of
    the first two lies flat in config.json, weights carry older names and are split in two files, the chat template is
    in chat_template.json (and in tokenizer_config.json), and generation_config.json samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = tiny_model(family, tied, seed)
    is_llava, is_old = family == "llava", family != "qwen3_vl"
    template = LLAVA_TEMPLATE if is_llava else CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    _edit(folder / "tokenizer_config.json", processor_class=_preprocessor(family)["processor_class"])
    if not is_llava:
        _edit(folder / "tokenizer_config.json", chat_template=template)
        vocab, merges = _bpe()
        _write(folder / "vocab.json", vocab)
        (folder / "merges.txt").write_text("\n".join(" ".join(merge) for merge in merges))
    _write(folder / "preprocessor_config.json", _preprocessor(family))
    if family == "qwen3_vl":
        video = {**_preprocessor(family), "video_processor_type": "Qwen3VLVideoProcessor"}
        _write(folder / "video_preprocessor_config.json", video)
    if is_llava:
        processor = {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 14,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        }
        _write(folder / "processor_config.json", processor)
    _write(folder / "chat_template.json", {"chat_template": template})
    _write(folder / "config.json", _old_config(model.config) if is_old and not is_llava else model.config.to_dict())
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if not is_llava:
        end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        ids = {"bos_token_id": end, "eos_token_id": [tokenizer.eos_token_id, end], "pad_token_id": end}
        ids |= {"do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-6}
    _write(folder / "generation_config.json", ids)

    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if tied:
        del weights["lm_head.weight"]
    if is_old:
        weights = {_old_name(name, is_llava): tensor for name, tensor in weights.items()}
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    size = sum(tensor.nbytes for tensor in weights.values())
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    return folder


def _old_config(config: Any) -> dict[str, Any]:
    settings = config.to_dict()
    text = settings.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"]}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    for key in ("model_type", "architectures", "dtype", "layer_types"):
        text.pop(key, None)
    settings["vision_config"].pop("dtype", None)
    return text | settings


def _old_name(name: str, is_llava: bool) -> str:
    if is_llava:
        name = name.removeprefix("model.")
        if name.startswith("lm_head"):
            return f"language_model.{name}"
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        return name.replace("language_model.", "language_model.model.", 1)
    return name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2))


def _edit(path: Path, **changes: Any) -> None:
    _write(path, json.loads(path.read_text()) | changes)


def written_prompt(processor: Any) -> str:
    """The prompt of reacher-easy as a processor's chat template writes it."""
    return str(processor.apply_chat_template(chat_messages(dmc_prompt("reacher-easy")), add_generation_prompt=True))
