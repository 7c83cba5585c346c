"""Processors of every family of VLMs by one path, and what a folder's parts must agree on.

No family is named here. Qwen2-VL, Qwen2.5-VL, Qwen3-VL, LLaVA-1.5 and Idefics3 differ in what their own classes and
configurations say, and that is what is asked.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from covr_lightning.errors import ConfigError

#: Settings that stand in both configurations and must agree: the picture's side, then the vision tower's.
_SHARED_SETTINGS = (
    ("patch_size", "patch_size"),
    ("merge_size", "spatial_merge_size"),
    ("temporal_patch_size", "temporal_patch_size"),
)


def load_processor(name: str, config: Any, local_files_only: bool) -> Any:
    """A model's processor for pictures and text.

    Pictures are always prepared with Pillow, so that a proposal does not depend on whether torchvision is installed.
    The library cannot build a processor that also takes videos without torchvision; no videos are ever shown here, so
    of such a class an image-only one is made (see :func:`image_only`). Nothing is registered with the library.

    Args:
        name: a folder or a hub name.
        config: the model's configuration.
        local_files_only: never ask the network.

    Raises:
        OSError, ValueError, ImportError, KeyError, TypeError: what the library raises for files it cannot use.
    """
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    options = {"local_files_only": local_files_only, "trust_remote_code": False, "backend": "pil"}
    stock: Any = PROCESSOR_MAPPING.get(type(config), None)
    if stock is None or "video_processor" not in stock.get_attributes():
        return AutoProcessor.from_pretrained(name, **options)
    from transformers.models.auto.video_processing_auto import get_video_processor_config

    processor = image_only(stock).from_pretrained(name, **options)
    video_settings = get_video_processor_config(name, local_files_only=local_files_only)
    processor.video_settings = {key: value for key, value in video_settings.items() if key != "auto_map"}
    return processor


@cache
def image_only(stock: type) -> Any:
    """The class of a processor that takes no videos, made from one that does.

    It goes by the name of the stock class, and saves that name and the video settings it was loaded with. So a folder
    that it writes opens with plain `AutoProcessor` wherever the stock class can be built; without torchvision the
    library says that it needs it.

    Args:
        stock: a processor class whose arguments are an image processor, a tokenizer and a video processor.
    """
    video_settings: dict[str, Any] = {}

    def __init__(self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        # The library takes the processors it needs from its class's signature, which here has no video processor.
        stock.__init__(self, image_processor, tokenizer, None, chat_template=chat_template)  # type: ignore[misc]

    def to_dict(self: Any) -> dict[str, Any]:
        settings: dict[str, Any] = stock.to_dict(self)  # type: ignore[attr-defined]
        video = self.video_settings or _video_settings(settings["image_processor"])
        return settings | {"video_processor": video}

    members = {"__init__": __init__, "to_dict": to_dict, "video_settings": video_settings, "__doc__": stock.__doc__}
    return type(stock.__name__, (stock,), members)


def _video_settings(image_settings: dict[str, Any]) -> dict[str, Any]:
    """The part of an image processor's settings that its video processor shares."""
    shared = ("image_mean", "image_std", "patch_size", "merge_size", "temporal_patch_size")
    return {key: image_settings[key] for key in shared if key in image_settings}


def set_token_ids(model: Any, tokenizer: Any) -> None:
    """Make generation greedy and end where training taught an answer to end.

    A hub folder's own generation settings may sample or penalise repetition (Qwen2.5-VL's do, by 1.05), which changes
    the digits of an answer; they are replaced. The end tokens they name are kept, the tokenizer's is added.

    Args:
        model: the VLM; its `generation_config` is replaced.
        tokenizer: its tokenizer; gets a padding token, the end token, if it has none.

    Raises:
        ConfigError: if the tokenizer has no end token.
    """
    from transformers import GenerationConfig

    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the VLM's tokenizer has no end token (eos_token in tokenizer_config.json, YAML key vlm.path)"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    before = model.generation_config
    named = before.eos_token_id if isinstance(before.eos_token_id, list) else [before.eos_token_id]
    ends = list(dict.fromkeys([tokenizer.eos_token_id, *(token for token in named if token is not None)]))
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=before.bos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
    )


def disagreement(config: Any, processor: Any) -> str | None:
    """What a processor and a model's configuration disagree on, so that no question can be asked; None if nothing.

    Args:
        config: the model's configuration, with text and vision parts.
        processor: the processor that was found beside it.
    """
    image_processor, vision = processor.image_processor, getattr(config, "vision_config", None)
    for ours, theirs in _SHARED_SETTINGS:
        expected = getattr(vision, theirs, None)
        for owner in (image_processor, processor):
            value = getattr(owner, ours, expected)
            # Some families write sizes as a pair; None is a processor saved before the setting existed.
            if isinstance(expected, int) and isinstance(value, int | None) and value != expected:
                return f"its processor's {ours} is {value}, its vision_config.{theirs} is {expected}"
    crop = getattr(image_processor, "crop_size", None) if getattr(image_processor, "do_center_crop", False) else None
    edge = getattr(vision, "image_size", None)
    if crop and isinstance(edge, int) and (crop["height"], crop["width"]) != (edge, edge):
        return (
            f"its processor cuts pictures of {crop['height']} x {crop['width']} (crop_size), its vision tower takes "
            f"{edge} x {edge} (vision_config.image_size)"
        )
    size = getattr(image_processor, "size", None) or {}
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    if shortest and longest and shortest > longest:
        return f"its pictures are to have at least {shortest} pixels (min_pixels) and at most {longest} (max_pixels)"
    tokens, rows = len(processor.tokenizer), config.get_text_config().vocab_size
    if tokens > rows:
        return f"its tokenizer has {tokens} tokens, its text_config.vocab_size is {rows}"
    found, expected = getattr(processor, "image_token_id", None), getattr(config, "image_token_id", None)
    if found is not None and expected is not None and found != expected:
        return f"its tokenizer's image token is {found}, its image_token_id is {expected}"
    return None
