"""The second LightningModule: return-weighted LoRA fine-tuning of the VLM (Eq. 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from covr_lightning.errors import ConfigError
from covr_lightning.finetune.loss import IGNORED, next_token_targets, weighted_nll
from covr_lightning.vlm.vlm import VLM

#: Frames (B, 3, H, W) uint8, actions (B, A), weights (B,).
FineTuneBatch = tuple[Tensor, Tensor, Tensor]


@dataclass
class FineTuneSettings:
    """One round's training (Table 9 by default).

    Attributes:
        epochs: Passes over the kept rows.
        max_steps: Optimizer steps at most; −1 for no limit.
        batch_size: Rows per forward pass.
        accumulate: Forward passes per optimizer step.
        lr: Highest learning rate; it falls to 0 along a half cosine.
        warmup_fraction: Share of the steps in which the rate rises.
        label_smoothing: See :func:`~covr_lightning.finetune.loss.weighted_nll`.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        held_out: Share of the kept rows that are not trained on and measure the VLM before and after.
        seed: Seed of split, order, dropout and adapter.
    """

    epochs: int = 2
    max_steps: int = -1
    batch_size: int = 4
    accumulate: int = 4
    lr: float = 1e-4
    warmup_fraction: float = 0.0
    label_smoothing: float = 0.1
    gradient_checkpointing: bool = True
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"settings.{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("held_out", "warmup_fraction", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"settings.{name} is {getattr(self, name)}; it must lie in 0 to 1, 1 excluded.")
        if self.lr <= 0:
            raise ConfigError(f"settings.lr is {self.lr}; it must be above 0.")


class VLMFineTuner(L.LightningModule):
    """Trains the VLM's adapter on (frame, action, weight) rows with Eq. 6.

    Logits are computed at label positions only. Rows of weight 0 need no forward pass: they add to N_v alone.

    Args:
        vlm: The VLM; it gets an adapter if it has none.
        settings: How to train.
    """

    def __init__(self, vlm: VLM, settings: FineTuneSettings) -> None:
        super().__init__()
        vlm.add_adapter()
        self.vlm = vlm
        self.settings = settings
        self.model = vlm.model
        self.losses: list[float] = []

    def on_fit_start(self) -> None:
        """Train mode, with gradient checkpointing if asked for."""
        base = self.vlm.base_model
        if self.settings.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        self.model.train()

    def on_fit_end(self) -> None:
        """Back to what inference needs."""
        if self.settings.gradient_checkpointing:
            self.vlm.base_model.gradient_checkpointing_disable()
            self.vlm.base_model.disable_input_require_grads()
        self.model.eval()

    def training_step(self, batch: FineTuneBatch, batch_idx: int = 0) -> Tensor:
        """Eq. 6 of one batch."""
        loss = self.loss(*batch)
        self.losses.append(loss.item())
        return loss

    def loss(self, frames: Tensor, actions: Tensor, weights: Tensor) -> Tensor:
        """(1/N_v) Σ_b w_b Σ_t −log p(y_{b,t} | x_{b,<t}), the label being the action's text.

        Args:
            frames: (B, 3, H, W) uint8.
            actions: (B, A).
            weights: (B,) ≥ 0.
        """
        answers = [self.vlm.codec.encode(action) for action in actions]
        # Every answer's tokens count in N_v, with its end token.
        n_v = sum(len(self.vlm.inputs.answer_ids(answer)) + 1 for answer in answers)
        trained = weights > 0
        if not trained.any():
            return torch.zeros((), device=self.device, requires_grad=True)
        inputs, labels = self.vlm.inputs.training_batch(frames[trained], _pick(answers, trained))
        targets = next_token_targets(labels).to(self.device)
        mask = targets != IGNORED
        base = self.vlm.base_model
        hidden = base.model(**{k: v.to(self.device) for k, v in inputs.items()}, use_cache=False).last_hidden_state
        logits = base.get_output_embeddings()(hidden[mask])
        rows = weights[trained].to(self.device)[:, None].expand_as(targets)
        return weighted_nll(logits, targets[mask], rows[mask], self.settings.label_smoothing) / n_v

    def train_loader(self, frames: Tensor, actions: Tensor, weights: Tensor) -> DataLoader:
        """Shuffled batches of rows; shapes as in :meth:`loss`."""
        order = torch.Generator().manual_seed(self.settings.seed + self.vlm.round)
        return DataLoader(
            TensorDataset(frames, actions, weights),
            batch_size=min(self.settings.batch_size, len(frames)),
            shuffle=True,
            generator=order,
        )

    def configure_optimizers(self) -> Any:
        """AdamW over the adapter, half-cosine rate."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = AdamW(parameters, lr=self.settings.lr, weight_decay=0.0)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        warmup = int(self.settings.warmup_fraction * total)

        def rate(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, rate), "interval": "step"}}


def _pick(items: list[str], mask: Tensor) -> list[str]:
    return [item for item, chosen in zip(items, mask.tolist(), strict=True) if chosen]
