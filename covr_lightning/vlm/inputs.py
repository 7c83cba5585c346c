"""Frames and answers as a VLM's inputs, for any model family that has a processor with a chat template."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from covr_lightning.errors import ConfigError
from covr_lightning.vlm.action_text import ActionText, answer_format
from covr_lightning.vlm.prompts import Prompt

log = logging.getLogger(__name__)

IGNORED_LABEL = -100
LENGTH_MARGIN = 2
_TYPE_ID_KEYS = ("mm_token_type_ids", "token_type_ids")

ImagePosition = Literal["first", "last"]


class VLMInputs:
    """Builds batches of one prompt with many frames.

    All rows share the prompt and the frame size, so all prompts have the same length and answers start at the same
    position in every row.

    Args:
        processor: a Hugging Face processor with `image_processor`, `tokenizer` and a chat template.
        prompt: what every row asks.
        image_position: where the picture stands in the user's turn, before or after the text.
    """

    def __init__(self, processor: Any, prompt: Prompt, image_position: ImagePosition = "first") -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.prompt = prompt
        self.prompt_text = self._rendered(image_position)
        if image_position == "last" and self.prompt_text == self._rendered("first"):
            log.warning(
                "vlm.image_position is 'last', but this VLM's chat template puts the picture first all the same."
            )
        bos = self.tokenizer.bos_token
        #: Whether the chat template writes the token that a text begins with; then the tokenizer does not, too.
        self.writes_bos = bool(bos) and self.prompt_text.startswith(bos)
        answer = answer_format(["-0.00"] * prompt.action_size)
        self._answer_room = len(self.answer_ids(answer)) + 1 + LENGTH_MARGIN

    def _rendered(self, image_position: ImagePosition) -> str:
        messages = chat_messages(self.prompt, image_position)
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True))

    def check_shape(self, height: int, width: int) -> None:
        """Refuse pictures of which the processor would cut something off.

        Raises:
            ConfigError: They are not square, and it takes the middle square.
        """
        if height == width:
            return
        processor = self.processor.image_processor
        cuts = getattr(processor, "do_center_crop", False)
        # Some make the picture, or tiles of it, square before they cut.
        squares = getattr(processor, "do_pad", False) or getattr(processor, "image_grid_pinpoints", None)
        if cuts and not squares:
            raise ConfigError(
                f"the VLM's processor cuts the middle square out of pictures (do_center_crop), and here they are "
                f"{height} high and {width} wide; it can be shown square frames, one at a time (vlm.frames: 1)"
            )

    def prompt_batch(self, frames: Tensor) -> dict[str, Tensor]:
        """Inputs for generation.

        Args:
            frames: (B, 3, H, W) uint8.

        Returns:
            The processor's tensors on the CPU, `input_ids` and `attention_mask` of shape (B, P) among them.

        Raises:
            ValueError: if frames are not (B, 3, H, W) uint8 or the prompts come out at different lengths.
            ConfigError: if the processor cannot take frames of this size, or prompt, picture and answer are longer
                than the VLM's context.
        """
        if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8:
            raise ValueError(f"frames must be (B, 3, H, W) uint8, got {tuple(frames.shape)} {frames.dtype}")
        height, width = frames.shape[2:]
        if not height or not width:
            raise ValueError(f"frames must have pixels, got {height} x {width}")
        self.check_shape(height, width)
        pictures = [Image.fromarray(frame) for frame in frames.permute(0, 2, 3, 1).cpu().numpy()]
        try:
            inputs = dict(
                self.processor(
                    text=[self.prompt_text] * len(pictures),
                    images=[[picture] for picture in pictures],
                    padding=True,
                    return_tensors="pt",
                    **({"add_special_tokens": False} if self.writes_bos else {}),
                )
            )
        except ValueError as error:
            raise ConfigError(
                f"the VLM's processor cannot take frames of {height} x {width} pixels ({error}): choose another frame "
                "size (YAML key size of the environment)"
            ) from error
        if not bool(inputs["attention_mask"].all()):
            raise ValueError("prompts came out at different lengths, although prompt and frame size are the same")
        self._check_length(inputs["input_ids"], self._answer_room, (height, width))
        return inputs

    def training_batch(self, frames: Tensor, answers: list[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs and labels for fine-tuning.

        Args:
            frames: (B, 3, H, W) uint8.
            answers: B texts that the model shall answer, e.g. "action:[0.02]".

        Returns:
            Inputs with `input_ids` of shape (B, T), where shorter answers are padded on the right with attention 0,
            and labels of shape (B, T): -100 everywhere but at the answer's tokens and the end token behind them.
            Label t is the token at position t; a causal model predicts it from position t - 1.

        Raises:
            ValueError: if there are not as many answers as frames.
            ConfigError: as :meth:`prompt_batch`.
        """
        if len(answers) != len(frames):
            raise ValueError(f"{len(answers)} answers for {len(frames)} frames")
        inputs = self.prompt_batch(frames)
        rows = [torch.tensor([*self.answer_ids(answer), self.tokenizer.eos_token_id]) for answer in answers]
        answer_ids = torch.nn.utils.rnn.pad_sequence(rows, True, padding_value=self._pad_id)
        lengths = torch.tensor([len(row) for row in rows])
        is_answer = torch.arange(answer_ids.shape[1]) < lengths[:, None]
        prompt_labels = torch.full_like(inputs["input_ids"], IGNORED_LABEL)
        labels = torch.cat([prompt_labels, answer_ids.masked_fill(~is_answer, IGNORED_LABEL)], dim=1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer_ids], dim=1)
        mask = inputs["attention_mask"]
        inputs["attention_mask"] = torch.cat([mask, is_answer.to(mask.dtype)], dim=1)
        for key in _TYPE_ID_KEYS:
            if key in inputs:
                inputs[key] = F.pad(inputs[key], (0, answer_ids.shape[1]))
        self._check_length(inputs["input_ids"], 0, tuple(frames.shape[2:]))
        return inputs, labels

    def _check_length(self, ids: Tensor, room: int, size: tuple[int, ...]) -> None:
        limit = self.tokenizer.model_max_length
        if ids.shape[1] + room <= limit:
            return
        of_picture = ids[0].tolist().count(getattr(self.processor, "image_token_id", None))
        raise ConfigError(
            f"prompt, picture and answer take {ids.shape[1] + room} tokens, {of_picture} of them the picture's of "
            f"{size[0]} x {size[1]} pixels, but the VLM takes at most {limit}: shorten the prompt (YAML key "
            "vlm.prompt), show smaller frames (size of the environment) or lower max_pixels in the VLM's "
            "preprocessor_config.json"
        )

    def with_tokens(self, inputs: dict[str, Tensor], ids: list[int]) -> dict[str, Tensor]:
        """The inputs of :meth:`prompt_batch` with the same tokens of an answer behind every prompt."""
        rows = len(inputs["input_ids"])
        added = {
            "input_ids": torch.tensor(ids, dtype=torch.long).expand(rows, -1),
            "attention_mask": torch.ones(rows, len(ids), dtype=torch.long),
        }
        extended = dict(inputs)
        for key in sequence_keys(inputs):
            more = added.get(key, torch.zeros(rows, len(ids), dtype=torch.long))
            extended[key] = torch.cat([inputs[key], more.to(inputs[key])], dim=1)
        return extended

    def answer_length(self, action_text: ActionText) -> int:
        """How many new tokens generation needs for the longest answer within bounds, end token included.

        A small margin lets the answer of a model that is slightly off still end, so that it fails for its content
        and not for being cut.
        """
        actions = action_text.along_bounds(101)
        longest = max(len(self.answer_ids(action_text.encode(action))) for action in actions)
        return longest + 1 + LENGTH_MARGIN

    @property
    def gets_bos(self) -> bool:
        """Whether the tokenizer begins the prompt with a token that its chat template does not write (LLaVA's <s>)."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and not self.writes_bos and self.tokenizer(self.prompt_text)["input_ids"][0] == bos

    @property
    def _pad_id(self) -> int:
        pad_id = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad_id is None else pad_id

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of an answer, without the end token."""
        return self.tokenizer(answer, add_special_tokens=False)["input_ids"]


def sequence_keys(inputs: dict[str, Tensor]) -> list[str]:
    """Names of the inputs that have one entry per token, of shape (B, P)."""
    return [key for key in ("input_ids", "attention_mask", *_TYPE_ID_KEYS) if key in inputs]


def prefix_length(ids: Tensor, config: Any) -> int:
    """How many of a prompt's tokens stand before its picture, so that no picture changes what the model makes of them.

    Args:
        ids: (P,) one prompt's token ids.
        config: the model's configuration, which names the token that pictures take the place of.
    """
    image_token = getattr(config, "image_token_id", None)
    places = (ids == image_token).nonzero() if image_token is not None else ids.new_empty(0)
    return int(places[0]) if len(places) else 0


def chat_messages(prompt: Prompt, image_position: ImagePosition = "first") -> list[dict[str, Any]]:
    """The conversation that a chat template turns into text: system turn, then picture and question."""
    user = [{"type": "image"}, {"type": "text", "text": prompt.user}]
    return [
        {"role": "system", "content": [{"type": "text", "text": prompt.system}]},
        {"role": "user", "content": user if image_position == "first" else user[::-1]},
    ]
