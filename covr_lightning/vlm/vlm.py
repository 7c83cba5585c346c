"""The VLM as an actor: frames in, actions out, and a LoRA adapter that fine-tuning trains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from covr_lightning.envs.base import EnvSpec
from covr_lightning.errors import ConfigError
from covr_lightning.vlm.action_text import ActionText
from covr_lightning.vlm.decoding import greedy_answers
from covr_lightning.vlm.inputs import VLMInputs
from covr_lightning.vlm.loading import load_vlm
from covr_lightning.vlm.prompts import Prompt, prompt_for

#: Table 9's target modules outside CARLA, by the ends of their names.
LORA_TARGETS = (
    "down_proj", "o_proj", "q_proj", "up_proj", "v_proj", "k_proj", "gate_proj", "qkv", "lm_head",
)  # fmt: skip


@dataclass
class LoRA:
    """Adapter settings (Table 9).

    Attributes:
        rank: Rank r of the update BA.
        alpha: Scale: the update counts α/r. The paper takes 256 on CARLA and 16 elsewhere.
        dropout: Dropout before A, while training.
        targets: Modules that get an adapter, by the ends of their names, or one regular expression for whole names.
    """

    rank: int = 128
    alpha: int = 16
    dropout: float = 0.05
    targets: str | Sequence[str] = LORA_TARGETS


class VLM:
    """A vision-language model that proposes actions, and its adapter.

    Nothing is loaded before :meth:`load`, so a run that asks no VLM pays nothing for having one described.

    Args:
        path: ``"embedded"`` (the tiny VLM that comes with the package), a Hugging Face folder, or a hub name.
        lora: Adapter settings; the adapter is made by the first fine-tune round.
        prompt: What the VLM is told; by default the prompt that comes with the task.
        dtype: Type of the base weights, e.g. ``"bfloat16"``; float32 by default.
        adapter: Folder of an adapter to begin with (a round's ``rounds/round_NNN_adapter``), e.g. one that was trained
            on another scenario; `lora` must be what it was trained with.
    """

    def __init__(
        self,
        path: str = "embedded",
        lora: LoRA | None = None,
        prompt: Prompt | None = None,
        dtype: str | None = None,
        adapter: str | None = None,
    ) -> None:
        self.path = path
        self.lora = lora or LoRA()
        self.prompt = prompt
        self.dtype = dtype
        self.adapter = adapter
        #: Fine-tune round of the weights that answer; 0 is the base model.
        self.round = 0
        self.model: Any = None
        self.inputs: VLMInputs
        self.codec: ActionText
        self._device = torch.device("cpu")

    def load(self, spec: EnvSpec) -> None:
        """Load weights, processor and prompt for an environment; does nothing the second time.

        Args:
            spec: The environment; its action size must be the prompt's.

        Raises:
            ConfigError: The folder cannot be used, or prompt and environment disagree.
        """
        if self.model is not None:
            return
        prompt = self.prompt or prompt_for(spec.task)
        if prompt.action_size != spec.action_dim:
            raise ConfigError(
                f"The prompt asks for {prompt.action_size} action values ({', '.join(prompt.action_names)}), but "
                f"{spec.task} takes {spec.action_dim} (YAML key vlm.prompt.action_names)."
            )
        self.model, processor = load_vlm(self.path, dtype=self.dtype)
        self.model.requires_grad_(False)
        self.inputs = VLMInputs(processor, prompt)
        self.codec = ActionText(spec.action_low, spec.action_high)
        if self.adapter is not None:
            self._begin_with(Path(self.adapter))

    def _begin_with(self, folder: Path) -> None:
        settings = folder / "adapter_config.json"
        if not settings.is_file() or not (folder / "adapter_model.safetensors").is_file():
            raise ConfigError(
                f"vlm.adapter is {str(folder)!r}, where no adapter is (adapter_config.json, adapter_model.safetensors)."
            )
        trained = json.loads(settings.read_text())
        if (trained["r"], trained["lora_alpha"]) != (self.lora.rank, self.lora.alpha):
            raise ConfigError(
                f"The adapter {str(folder)!r} (YAML key vlm.adapter) has rank {trained['r']} and α "
                f"{trained['lora_alpha']}, but vlm.lora has {self.lora.rank} and {self.lora.alpha}."
            )
        try:
            self.load_adapter(folder, round_=0)
        except RuntimeError as error:
            raise ConfigError(
                f"The adapter {str(folder)!r} (YAML key vlm.adapter) does not fit the VLM at {self.path!r} with "
                "vlm.lora.targets."
            ) from error

    def to(self, device: torch.device) -> None:
        """Move the model."""
        self._device = device
        if self.model is not None:
            self.model.to(device)

    def answer(self, frames: Tensor) -> list[str]:
        """The VLM's words, greedily decoded.

        Args:
            frames: (B, 3, H, W) uint8.
        """
        return greedy_answers(self.model, self.inputs, self.codec, frames, self._device)

    def propose(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """The VLM's actions a_v.

        Args:
            frames: (B, 3, H, W) uint8.

        Returns:
            Actions (B, A) clipped to the bounds, and which answers could be parsed (B,) bool; the others are masked,
            never replaced by a random action.
        """
        decoded = [self.codec.decode(text) for text in self.answer(frames)]
        actions = torch.stack([action for action, _ in decoded])
        return actions, torch.tensor([valid for _, valid in decoded])

    # -- adapter -------------------------------------------------------------------------------------------------

    def add_adapter(self) -> None:
        """Give the model a LoRA adapter that changes nothing yet; does nothing if it has one.

        Raises:
            ConfigError: No module's name ends in any of the targets.
        """
        if self.has_adapter:
            return
        from peft import LoraConfig, get_peft_model

        targets = self.lora.targets if isinstance(self.lora.targets, str) else list(self.lora.targets)
        config = LoraConfig(
            r=self.lora.rank,
            lora_alpha=self.lora.alpha,
            lora_dropout=self.lora.dropout,
            target_modules=targets,
        )
        try:
            self.model = get_peft_model(self.model, config)
        except ValueError as error:
            raise ConfigError(
                f"vlm.lora.targets is {targets!r}, which names no module of the VLM at {self.path!r} ({error})."
            ) from error
        self.model.eval()

    @property
    def has_adapter(self) -> bool:
        """Whether a round has given the model an adapter."""
        return hasattr(self.model, "peft_config")

    @property
    def base_model(self) -> Any:
        """The Hugging Face model, with the adapter's layers inside if there is one."""
        return self.model.get_base_model() if self.has_adapter else self.model

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in PEFT's format, complete or not at all; an older one at this place gives way."""
        part = folder.with_name(folder.name + ".part")
        self.model.save_pretrained(part, save_embedding_layers=False)
        if folder.exists():  # a run resumed from before this round does the round again
            shutil.rmtree(folder)
        part.rename(folder)

    def load_adapter(self, folder: Path, round_: int) -> None:
        """Put the adapter of a round in force.

        Args:
            folder: What :meth:`save_adapter` wrote.
            round_: Its round.
        """
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        self.add_adapter()
        set_peft_model_state_dict(self.model, load_file(folder / "adapter_model.safetensors"))
        self.model.to(self._device)
        self.round = round_


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed PyTorch for what runs inside, and leave its random state outside as it was.

    So a VLM's fine-tuning (dropout, adapter initialisation) does not change what the agent draws.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
