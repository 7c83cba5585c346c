"""The VLM as an actor: frames in, actions out, and a LoRA adapter that fine-tuning trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from covr_lightning.envs.base import EnvSpec
from covr_lightning.errors import ConfigError
from covr_lightning.random_state import own_randomness
from covr_lightning.vlm.action_text import ActionText
from covr_lightning.vlm.adapters import (
    LORA_TARGETS,
    LoRA,
    add_lora,
    check_targets,
    load_lora,
    merge_lora,
    remove_lora,
    renew_lora,
    save_lora,
)
from covr_lightning.vlm.decode_loop import base_model
from covr_lightning.vlm.decoding import Decoder, Decoding
from covr_lightning.vlm.engines.engine import Engine, LocalEngine
from covr_lightning.vlm.inputs import ImagePosition, VLMInputs
from covr_lightning.vlm.loading import load_vlm, save_vlm, skeleton
from covr_lightning.vlm.prompts import Prompt, check_prompt, prompt_for
from covr_lightning.vlm.quantization import Quantization, check_quantization, move

__all__ = ["LORA_TARGETS", "VLM", "LoRA", "Proposals"]


class Proposals(NamedTuple):
    """The VLM's actions for B frames.

    Attributes:
        actions: a_v (B, A), clipped to the bounds; to be masked where not valid.
        valid: Which answers could be parsed (B,) bool.
        answered: Which frames got an answer at all (B,) bool; every valid one did.
    """

    actions: Tensor
    valid: Tensor
    answered: Tensor


DType = Literal["float32", "bfloat16"]


class VLM:
    """A vision-language model that proposes actions, and its adapter.

    Nothing is loaded before :meth:`load`, so a run that asks no VLM pays nothing for having one described.

    Args:
        path: ``"embedded"`` (the tiny VLM that comes with the package), a Hugging Face folder, or a hub name.
        lora: Adapter settings; the adapter is made by the first fine-tune round.
        prompt: What the VLM is told; by default the prompt that comes with the task.
        dtype: Type of the base weights; float32 by default. The adapter is float32 whatever they are.
        adapter: Folder of an adapter to begin with (a round's ``rounds/round_NNN_adapter``), e.g. one that was trained
            on another scenario; `lora` must be what it was trained with.
        decoding: How answers are decoded.
        image_position: Where the picture stands in the user's turn: ``"first"``, as the embedded VLM was trained, or
            ``"last"``, so that the text is the same in front of every picture and its keys and values are computed
            once; for a VLM that takes either (LLaVA's template has it first in any case).
        engine: What answers: by default the weights in this process, or vLLM
            (:class:`~covr_lightning.vlm.engines.vllm_engine.VLLMEngine`,
            :class:`~covr_lightning.vlm.engines.vllm_server.VLLMServer`).
        quantization: Bits of the base weights of the language model's linear layers, ``"nf4"`` or ``"int8"``
            (QLoRA); the rest keeps `dtype`, which is also what quantised weights are multiplied in. None by default.
        frames: How many of an observation's newest frames it is shown, side by side in one picture, the newest on the
            right. The paper shows one, which has no velocities. Each more is as many more tokens of picture (Qwen3-VL,
            which enlarges any picture to 65,536 pixels, shows each frame smaller instead). The prompt that comes with a
            task then says so; one of your own has to say it itself.

    Raises:
        ConfigError: `dtype` or `quantization` is none of these, bitsandbytes is missing, or `frames` is below 1.
    """

    def __init__(
        self,
        path: str = "embedded",
        lora: LoRA | None = None,
        prompt: Prompt | None = None,
        dtype: DType | None = None,
        adapter: str | None = None,
        decoding: Decoding | None = None,
        image_position: ImagePosition = "first",
        engine: Engine | None = None,
        quantization: Quantization | None = None,
        frames: int = 1,
    ) -> None:
        if frames < 1:
            raise ConfigError(f"vlm.frames is {frames}; it must be at least 1.")
        if dtype is not None and dtype not in get_args(DType):
            raise ConfigError(f"vlm.dtype is {dtype!r}; it can be {', '.join(map(repr, get_args(DType)))} or null.")
        check_quantization(quantization)
        self.path = path
        self.lora = lora or LoRA()
        self.prompt = prompt
        self.dtype = dtype
        self.adapter = adapter
        self.decoding = decoding or Decoding()
        self.image_position: ImagePosition = image_position
        self.engine = engine or LocalEngine()
        self.quantization = quantization
        self.frames = frames
        #: Fine-tune round of the weights that answer; 0 is the base model.
        self.round = 0
        self.model: Any = None
        self.spec: EnvSpec
        self.inputs: VLMInputs
        self.codec: ActionText
        self.decoder: Decoder
        self._opened = False
        self._adapter_in_force: Path | None = None
        self._device = torch.device("cpu")
        self._weight_changes = 0

    def load(self, spec: EnvSpec) -> None:
        """Get ready to answer in an environment; does nothing the second time.

        The weights are loaded if they are what answers (see :meth:`load_weights`).

        Args:
            spec: The environment; its action size must be the prompt's.

        Raises:
            ConfigError: The folder cannot be used, prompt and environment disagree, or an observation has fewer frames
                than are to be shown.
        """
        if self._opened:
            return
        if self.frames > spec.frame_stack:
            raise ConfigError(
                f"vlm.frames is {self.frames}, but an observation of {spec.task} has {spec.frame_stack} frames "
                f"(data.env.frame_stack); it can be 1 to {spec.frame_stack}."
            )
        prompt = self.prompt or prompt_for(spec.task).of_moments(self.frames)
        check_prompt(prompt, spec)
        self.prompt = prompt
        self.spec = spec
        self.codec = ActionText(spec.action_low, spec.action_high)
        self.engine.open(self)
        self._opened = True
        if self.adapter is not None:
            self.load_adapter(Path(self.adapter), round_=0)

    def load_weights(self) -> None:
        """Load weights and processor into this process, to answer or to be fine-tuned; nothing the second time.

        Comes after :meth:`load`, which tells the prompt.

        Raises:
            ConfigError: The folder cannot be used, or the engine could not serve an adapter of `lora`.
        """
        if self.model is not None:
            return
        assert self.prompt is not None, "load comes first"
        self.model, processor = load_vlm(self.path, self.dtype, self._device, self.quantization)
        self.model.requires_grad_(False)
        self.inputs = VLMInputs(processor, self.prompt, self.image_position)
        self.inputs.check_shape(self.spec.frame_height, self.spec.frame_width * self.frames)
        self.decoder = Decoder(self.inputs, self.codec, self.decoding)
        self.engine.check_lora(self, self.model)
        if self._adapter_in_force is not None:
            self._put_on(self._adapter_in_force)

    @property
    def device(self) -> torch.device:
        """Where the model is, or will be loaded."""
        return self._device

    @property
    def weights_state(self) -> tuple[int, int]:
        """Another value for other weights."""
        return self.round, self._weight_changes

    def to(self, device: torch.device) -> None:
        """Move the model, or say where it is to be loaded."""
        self._device = device
        if self.model is not None:
            move(self.model, device)

    def answer(self, frames: Tensor) -> list[str | None]:
        """The VLM's words, as far as the first `]`; None for a frame that the engine got no answer for.

        Args:
            frames: (B, 3, H, n·W) uint8, n frames side by side.

        Raises:
            RuntimeError: It is not loaded.
        """
        if not self._opened:
            raise RuntimeError("VLM.load(spec) comes first: it tells the prompt and the form of an answer.")
        # In a test of the VLM alone Lightning is in the agent's precision; answers are always of the VLM's own.
        with torch.autocast(self._device.type, enabled=False):
            return self.engine.checked_answers(frames)

    def ask(self, frames: Tensor) -> Proposals:
        """The VLM's actions a_v, and which frames it did not answer.

        Args:
            frames: (B, 3, H, n·W) uint8, n frames side by side.
        """
        answers = self.answer(frames)
        decoded = [self.codec.decode(text or "") for text in answers]
        return Proposals(
            torch.stack([action for action, _ in decoded]),
            torch.tensor([valid for _, valid in decoded]),
            torch.tensor([text is not None for text in answers]),
        )

    def propose(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """The VLM's actions a_v.

        Args:
            frames: (B, 3, H, n·W) uint8, n frames side by side.

        Returns:
            Actions (B, A) clipped to the bounds, and for which frames there is an answer that could be parsed (B,)
            bool; the others are masked, never replaced by a random action.
        """
        proposals = self.ask(frames)
        return proposals.actions, proposals.valid

    def weights_changed(self) -> None:
        """Say that the weights are no longer those of the last answer, so that nothing computed from them is kept."""
        self._weight_changes += 1

    # -- adapter -------------------------------------------------------------------------------------------------

    def add_adapter(self) -> None:
        """Give the model a LoRA adapter that changes nothing yet; does nothing if it has one.

        Raises:
            ConfigError: No module's name ends in any of the targets.
        """
        if not self.has_adapter:
            self.model = add_lora(self.model, self.lora)

    def remove_adapter(self) -> None:
        """Take the adapter off; the base model answers as before it had one."""
        self.model = remove_lora(self.model)
        self.weights_changed()

    def renew_adapter(self) -> None:
        """Draw the adapter anew from torch's generator, so that it changes nothing yet."""
        renew_lora(self.model)
        self.weights_changed()

    def check_targets(self) -> None:
        """Check that the adapter settings fit the VLM and what answers, before the first round needs them.

        Where the weights are not loaded here, the VLM's configuration tells its modules.

        Raises:
            ConfigError: No module's name ends in any of ``lora.targets``, or the engine could not serve them.
        """
        if not self.has_adapter:
            model = self.model if self.model is not None else skeleton(self.path)
            check_targets(model, self.lora)
            self.engine.check_lora(self, model)

    @property
    def has_adapter(self) -> bool:
        """Whether a round has given the model an adapter."""
        return hasattr(self.model, "peft_config")

    @property
    def base_model(self) -> Any:
        """The Hugging Face model, with the adapter's layers inside if there is one."""
        return base_model(self.model)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in PEFT's format, complete or not at all; an older one at this place gives way."""
        save_lora(self.model, folder)

    def adapter_folder(self, folder: Path) -> Path | None:
        """Where the adapter in force can be read: written to `folder` if its weights are here; None without any."""
        if self.model is not None and self.has_adapter:
            self.save_adapter(folder)
            return folder
        return self._adapter_in_force

    def load_adapter(self, folder: Path, round_: int) -> None:
        """Put the adapter of a round in force.

        Args:
            folder: What :meth:`save_adapter` wrote.
            round_: Its round.

        Raises:
            ConfigError: There is no adapter, or it is one of other settings or of another VLM.
        """
        if self.model is not None:
            self._put_on(folder)
        self.weights_changed()
        self._use(folder)
        self.round = round_

    def adapter_trained(self, round_: int, folder: Path | None = None) -> None:
        """Put the adapter as training left it in force as that of a round.

        Args:
            round_: The round.
            folder: Where to write it; an engine elsewhere reads it there.

        Raises:
            ValueError: No folder is given, and the engine is elsewhere.
        """
        if folder is not None:
            self.save_adapter(folder)
        elif self.engine.elsewhere:
            raise ValueError(f"{type(self.engine).__name__} reads a round's adapter from a folder; none is given")
        self.adapter_written(round_, folder)

    def adapter_written(self, round_: int, folder: Path | None) -> None:
        """The same after another process of the run has written it.

        Args:
            round_: The round.
            folder: Where it was written to, if anywhere.
        """
        self.weights_changed()
        self._use(folder)
        self.round = round_

    def _put_on(self, folder: Path) -> None:
        with own_randomness(0):  # a new adapter is drawn at random, although it is overwritten
            self.add_adapter()
        load_lora(self.model, folder, self.lora)
        move(self.model, self._device)

    def _use(self, folder: Path | None) -> None:
        self.engine.use(folder)  # which may refuse it; then the one before stays in force
        self._adapter_in_force = folder

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside, the base model answers, exactly as before the first round."""
        self.engine.use(None)
        try:
            with self.model.disable_adapter() if self.has_adapter else nullcontext():
                yield
        finally:
            self.engine.use(self._adapter_in_force)

    def merge_adapter(self) -> None:
        """Add the adapter to the base weights for good; the VLM then answers as before and has no adapter.

        Raises:
            ConfigError: There is no adapter, or the base weights are quantised.
        """
        if not self.has_adapter:
            raise ConfigError("The VLM has no adapter to merge: give one (YAML key vlm.adapter) or fine-tune first.")
        self.model = merge_lora(self.model)
        self.weights_changed()

    def save(self, folder: Path) -> None:
        """Write the whole VLM as a Hugging Face folder, for `vlm.path` or another program.

        Raises:
            ConfigError: An adapter is not merged yet.
        """
        if self.has_adapter:
            raise ConfigError(
                "The VLM's adapter is not part of its weights: call merge_adapter first, or save_adapter."
            )
        save_vlm(self.model, self.inputs.processor, folder)
