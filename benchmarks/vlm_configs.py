"""config.json of the paper's VLMs and of two newer ones, as far as it decides about parameters and tokens.

Built on the meta device each gives the number of parameters that its page on the hub states, as
tests/vlm/test_memory_count.py checks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PaperVLM:
    """A VLM by its true shape.

    Attributes:
        hub_name: Where its weights are.
        parameters: What its page states.
        config: Makes its configuration.
        shortest_edge: Pixels (width × height) that its processor enlarges smaller pictures to; 0 for a fixed size.
    """

    hub_name: str
    parameters: int
    config: Callable[[], Any]
    shortest_edge: int


def _text(width: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }


def _rope(section: list[int], theta: float, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": section, **more}
    return {"rope_parameters": rope, "max_position_embeddings": 128000}


def _qwen2_vl(*text: int, tied: bool) -> Any:
    from transformers import Qwen2VLConfig

    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": text[0], "mlp_ratio": 4, "patch_size": 14}
    language = _text(*text) | _rope([16, 24, 24], 1e6)
    return Qwen2VLConfig(text_config=language, vision_config=vision, tie_word_embeddings=tied)


def _qwen2_5_vl(*text: int, tied: bool) -> Any:
    from transformers import Qwen2_5_VLConfig

    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": text[0],
        "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    language = _text(*text) | _rope([16, 24, 24], 1e6)
    return Qwen2_5_VLConfig(text_config=language, vision_config=vision, tie_word_embeddings=tied)


def _qwen3_vl(*text: int, tied: bool, vision: tuple[int, int, int], deepstack: list[int]) -> Any:
    from transformers import Qwen3VLConfig

    depth, width, mlp = vision
    tower = {
        "depth": depth, "hidden_size": width, "intermediate_size": mlp, "num_heads": 16, "out_hidden_size": text[0],
        "patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": deepstack,
    }  # fmt: skip
    language = _text(*text) | _rope([24, 20, 20], 5e6, mrope_interleaved=True) | {"head_dim": 128}
    return Qwen3VLConfig(text_config=language, vision_config=tower, tie_word_embeddings=tied)


def _llava() -> Any:
    from transformers import LlavaConfig

    text = {"model_type": "llama", "max_position_embeddings": 4096, **_text(4096, 11008, 32, 32, 32, 32064)}
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
    }  # fmt: skip
    return LlavaConfig(text_config=text, vision_config=vision)


MODELS = {
    "Qwen2-VL-2B": PaperVLM(
        "Qwen/Qwen2-VL-2B-Instruct",
        2_208_985_600,
        lambda: _qwen2_vl(1536, 8960, 28, 12, 2, 151936, tied=True),
        56 * 56,
    ),
    "Qwen2.5-VL-3B": PaperVLM(
        "Qwen/Qwen2.5-VL-3B-Instruct",
        3_754_622_976,
        lambda: _qwen2_5_vl(2048, 11008, 36, 16, 2, 151936, tied=True),
        56 * 56,
    ),
    "Qwen3-VL-4B": PaperVLM(
        "Qwen/Qwen3-VL-4B-Instruct",
        4_437_815_808,
        lambda: _qwen3_vl(
            2560, 9728, 36, 32, 8, 151936, tied=True, vision=(24, 1024, 4096), deepstack=[5, 11, 17]
        ),
        256 * 256,
    ),
    "LLaVA-1.5-7B": PaperVLM("llava-hf/llava-1.5-7b-hf", 7_063_427_072, _llava, 0),
    "Qwen2-VL-7B": PaperVLM(
        "Qwen/Qwen2-VL-7B-Instruct",
        8_291_375_616,
        lambda: _qwen2_vl(3584, 18944, 28, 28, 4, 152064, tied=False),
        56 * 56,
    ),
    "Qwen2.5-VL-7B": PaperVLM(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        8_292_166_656,
        lambda: _qwen2_5_vl(3584, 18944, 28, 28, 4, 152064, tied=False),
        56 * 56,
    ),
    "Qwen3-VL-8B": PaperVLM(
        "Qwen/Qwen3-VL-8B-Instruct",
        8_767_123_696,
        lambda: _qwen3_vl(
            4096, 12288, 36, 32, 8, 151936, tied=False, vision=(27, 1152, 4304), deepstack=[8, 16, 24]
        ),
        256 * 256,
    ),
}  # fmt: skip
