"""VBE: the VLM acts alone (``covr test --actor vlm``)."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from covr_lightning.data.labels import Labeller
from covr_lightning.errors import ConfigError


class VLMActs(L.Callback):
    """Evaluates the VLM in place of the policy: the paper's VBE, and the VLM's rows of its Tables 4, 14 and 15.

    The VLM sees one frame at every `data.label_every_agent_steps`-th step; its action is held in between. An answer
    that cannot be parsed is the action 0 (the paper says nothing of this) and is counted; so is one that never came,
    the VLM's engine being away.
    """

    def __init__(self) -> None:
        self.asked = self.unparsable = self.unanswered = 0

    def _take_over(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data.vlm is None:
            raise ConfigError("--actor is 'vlm', but no VLM is given (YAML key vlm).")
        data.vlm.load(data.spec)
        data.vlm.to(pl_module.device)
        pl_module.episode_policy = lambda: HeldAnswers(  # type: ignore[assignment]
            data.vlm, data.spec.action_dim, data.label_every_agent_steps, self
        )

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the VLM in the policy's place."""
        self._take_over(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the VLM in the policy's place."""
        self._take_over(trainer, pl_module)

    def _say(self) -> None:
        missing = f", {self.unanswered} without an answer" if self.unanswered else ""
        print(f"The VLM acted alone: {self.asked} frames asked, {self.unparsable} unparsable{missing} (action 0).")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how often it could not be understood."""
        self._say()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how often it could not be understood."""
        self._say()


class HeldAnswers:
    """One episode's policy: asks every n-th time, and holds the answer.

    Args:
        vlm: Proposes actions.
        action_dim: A.
        hold_agent_steps: n.
        counts: Its ``asked``, ``unparsable`` and ``unanswered`` are counted up.
    """

    def __init__(self, vlm: Labeller, action_dim: int, hold_agent_steps: int, counts: Any) -> None:
        self.vlm = vlm
        self.hold_agent_steps = hold_agent_steps
        self.counts = counts
        self._steps = 0
        self._held = torch.zeros(1, action_dim)

    def __call__(self, pixels: Tensor, deterministic: bool = True, previous_action: Tensor | None = None) -> Tensor:
        """The action (1, A) for the newest of the stacked frames (1, C, H, W) uint8; nothing else is read."""
        if self._steps % self.hold_agent_steps == 0:
            action, valid, answered = self.vlm.ask(pixels[:, -3:])
            self.counts.asked += 1
            self.counts.unanswered += int(not bool(answered[0]))
            self.counts.unparsable += int(bool(answered[0]) and not bool(valid[0]))
            self._held = action if bool(valid[0]) else torch.zeros_like(self._held)
        self._steps += 1
        return self._held
