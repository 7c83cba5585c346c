"""What turns frames into the VLM's words: this process's own weights, or vLLM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from covr_lightning.errors import WrongResult

if TYPE_CHECKING:
    from covr_lightning.vlm.vlm import VLM


class Engine(ABC):
    """Answers for frames (YAML key `vlm.engine`).

    Attributes:
        elsewhere: Whether the weights that answer are not those of :attr:`VLM.model
            <covr_lightning.vlm.vlm.VLM.model>`. A run then loads its own only to fine-tune them, and the engine reads
            each round's adapter from its folder.
    """

    elsewhere = True

    @abstractmethod
    def open(self, vlm: VLM) -> None:
        """Get ready; called once, when the VLM knows its prompt and the answer's format.

        Raises:
            ConfigError: A setting cannot work.
        """

    @abstractmethod
    def answers(self, frames: Tensor) -> list[str | None]:
        """The VLM's words as far as the first `]`, or None for a frame that got no answer.

        Args:
            frames: (B, 3, H, W) uint8.
        """

    def checked_answers(self, frames: Tensor) -> list[str | None]:
        """:meth:`answers`, which a class of somebody's own may have given.

        Args:
            frames: (B, 3, H, W) uint8.

        Raises:
            WrongResult: It is no list of texts and None, or not one for each frame.
        """
        answers: Any = self.answers(frames)
        texts = isinstance(answers, list) and all(text is None or isinstance(text, str) for text in answers)
        if texts and len(answers) == len(frames):
            return answers
        given = f"{len(answers)} answers" if texts else f"{answers!r:.60}"
        raise WrongResult(
            f"{type(self).__name__}.answers (vlm.engine) gave {given} for {len(frames)} frames; it must give "
            "a list with a text, or None, for each."
        )

    @abstractmethod
    def use(self, adapter: Path | None) -> None:
        """Answer by this adapter from now on, and by no other: a frame it cannot be asked about gets None.

        Args:
            adapter: A folder in PEFT's format, or None for the base model.

        Raises:
            ConfigError: The engine cannot serve such an adapter.
        """

    def check_lora(self, vlm: VLM, model: Any) -> None:
        """Refuse adapter settings whose adapter could not be served, before one is trained.

        Args:
            vlm: The VLM.
            model: Its modules, with weights or without.

        Raises:
            ConfigError: `vlm.lora.targets` names such modules.
        """
        return


class LocalEngine(Engine):
    """The weights in this process answer (:class:`~covr_lightning.vlm.decoding.Decoder`); the default."""

    elsewhere = False

    def open(self, vlm: VLM) -> None:
        """Load the weights."""
        self._vlm = vlm
        vlm.load_weights()

    def answers(self, frames: Tensor) -> list[str | None]:
        """Every frame gets an answer."""
        vlm = self._vlm
        return [*vlm.decoder.answers(vlm.model, frames, vlm.device, weights=vlm.weights_state)]

    def use(self, adapter: Path | None) -> None:
        """Nothing: the adapter is part of the weights."""
