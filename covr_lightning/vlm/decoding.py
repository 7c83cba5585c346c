"""From frames to the VLM's words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from covr_lightning.vlm.action_text import ActionText
from covr_lightning.vlm.inputs import VLMInputs


@torch.inference_mode()
def greedy_answers(
    model: Any, inputs: VLMInputs, codec: ActionText, frames: Tensor, device: torch.device | None = None
) -> list[str]:
    """The VLM's answers, greedily decoded.

    Args:
        model: the VLM.
        inputs: its processor with the prompt.
        codec: the answer's format, which bounds its length.
        frames: (B, 3, H, W) uint8.
        device: where the model is; the CPU by default.
    """
    batch = {name: value.to(device or "cpu") for name, value in inputs.prompt_batch(frames).items()}
    tokens = model.generate(**batch, max_new_tokens=inputs.answer_length(codec), do_sample=False, num_beams=1)
    return inputs.tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
