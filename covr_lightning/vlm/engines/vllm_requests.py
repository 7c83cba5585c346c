"""What vLLM is asked, in this process or over HTTP: the conversation, how to sample, and by which adapter.

The names are those of vLLM 0.12 and later, whose `SamplingParams` and HTTP fields agree.
"""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from covr_lightning.errors import ConfigError
from covr_lightning.vlm.adapters import WEIGHTS_FILE, LoRA, adapter_digest, check_adapter, damaged, lora_modules
from covr_lightning.vlm.grammar import CLOSING, answer_regex, longest_answer, most_integer_digits
from covr_lightning.vlm.inputs import VLMInputs
from covr_lightning.vlm.loading import load_processor_of
from covr_lightning.vlm.picking import frame_seed

if TYPE_CHECKING:
    from covr_lightning.vlm.vlm import VLM

#: What the language model is called in the module names of transformers' VLMs.
LANGUAGE_PARTS = ("language_model", "text_model")


class Questions:
    """The VLM's prompt, answer format and way of decoding, as vLLM takes them.

    Differences from :class:`~covr_lightning.vlm.decoding.Decoder`: answers are cut at the format's longest answer in
    characters and one more, since no tokenizer is at hand; and sampled tokens come from vLLM's generator, so that they
    depend on frame and seed alone here too, but are other ones.

    Args:
        vlm: Knows its prompt and codec.

    Attributes:
        regex: The answer format behind a space or none, if decoding is constrained.
        special_tokens: Whether the tokenizer has to add the token that a prompt begins with, as it does in this
            process, where adapters are trained: vLLM leaves it out of chats. None if it is not known here.
    """

    def __init__(self, vlm: VLM) -> None:
        assert vlm.prompt is not None, "load sets it"
        self.prompt = vlm.prompt
        self.image_position = vlm.image_position
        self.decoding = vlm.decoding
        digits = most_integer_digits(vlm.codec)
        # Some tokenizers (LLaVA's) begin a text with a space's token, and so does an adapter trained on such texts;
        # kept from it, it goes on with other numbers.
        self.max_tokens = 1 + longest_answer(vlm.codec.size, digits)
        self.special_tokens = _gets_bos(vlm)
        self.regex = f" ?{answer_regex(vlm.codec.size, digits)}" if vlm.decoding.constrained else None

    def messages(self, frame: Tensor) -> list[dict[str, Any]]:
        """The conversation about one frame (3, H, W) uint8, in OpenAI's form, the frame as PNG."""
        user = [
            {"type": "image_url", "image_url": {"url": data_url(frame)}},
            {"type": "text", "text": self.prompt.user},
        ]
        return [
            {"role": "system", "content": self.prompt.system},
            {"role": "user", "content": user if self.image_position == "first" else user[::-1]},
        ]

    def sampling(self, frame: Tensor) -> dict[str, Any]:
        """How to decode the answer to one frame; everything that a model's generation_config.json could change."""
        return {
            "temperature": self.decoding.temperature,
            "top_p": self.decoding.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": frame_seed(frame.cpu(), self.decoding.seed),
            "max_tokens": self.max_tokens,
            "stop": [CLOSING],
            "include_stop_str_in_output": True,
        }


def _gets_bos(vlm: VLM) -> bool | None:
    try:
        processor = load_processor_of(vlm.path)
    except ConfigError:
        return None  # only the server has the model
    assert vlm.prompt is not None, "load sets it"
    return VLMInputs(processor, vlm.prompt, vlm.image_position).gets_bos


def data_url(frame: Tensor) -> str:
    """A frame (3, H, W) uint8 as a `data:` URL of a PNG, which loses nothing."""
    file = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def up_to_closing(text: str) -> str:
    """The answer as far as its first `]`, without the space that some tokenizers begin with."""
    return "".join(text.partition(CLOSING)[:2]).lstrip(" ")


def adapter_name(folder: Path) -> str:
    """What an adapter is called: run, round, and a digest of its files.

    vLLM keys its caches by the name, so weights that differ never share one: not those of a round that was done again
    after a resume, and not those of another run of the same name on the same server.

    Args:
        folder: What `save_adapter` wrote, e.g. ``runs/NAME/rounds/round_003_adapter``.

    Returns:
        E.g. ``NAME-round_003-1f0c9a3be24d``.

    Raises:
        ConfigError: There is no adapter.
    """
    folder, digest = folder.resolve(), adapter_digest(folder)
    run = folder.parent.parent.name if folder.parent.name == "rounds" else folder.parent.name
    name = f"{run}-{folder.name.removesuffix('_adapter')}-{digest[:12]}"
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


def check_modules(lora: LoRA, model: Any) -> None:
    """Refuse adapter settings of which vLLM would serve a part only.

    Args:
        lora: The settings.
        model: The VLM's modules.

    Raises:
        ConfigError: `vlm.lora.targets` names modules outside the language model.
    """
    _check(lora_modules(model, lora), f"vlm.lora.targets is {lora.targets!r}")


def check_weights(folder: Path) -> None:
    """Refuse an adapter of which vLLM would serve a part only.

    Raises:
        ConfigError: It has weights outside the language model, its file is damaged, or there is none.
    """
    from safetensors import SafetensorError, safe_open

    check_adapter(folder)
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise damaged(folder, error) from error
    _check(names, f"The adapter is {str(folder)!r}")


def _check(names: list[str], found: str) -> None:
    outside = [name for name in names if not set(LANGUAGE_PARTS) & set(name.split("."))]
    if outside:
        raise ConfigError(
            f"{found}, which adapts {outside[0]!r} too ({len(outside)} of {len(names)} names outside the language "
            "model); vLLM leaves the vision tower's part out without an error and takes lm_head's of some models only, "
            "so with this vlm.engine all targets must lie in the language model, e.g. vlm.lora.targets: "
            f"'.*({'|'.join(LANGUAGE_PARTS)}).*(q|k|v|o|gate|up|down)_proj'."
        )
