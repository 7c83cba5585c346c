"""The second LightningModule: return-weighted LoRA fine-tuning of the VLM (Eq. 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from covr_lightning.errors import ConfigError, check_not_negative, check_positive
from covr_lightning.finetune.loss import IGNORED, next_token_targets, weighted_nll
from covr_lightning.finetune.number_loss import NumberTokens
from covr_lightning.finetune.optimizers import OptimizerName, check_optimizer, make_optimizer
from covr_lightning.finetune.sharding import average_whole_gradients, make_adapter_whole, shard
from covr_lightning.random_state import check_seed, derived_seed
from covr_lightning.vlm.adapters import freeze_unread
from covr_lightning.vlm.vlm import VLM

#: Of Lightning's precisions those that leave the base weights as they are.
Precision = Literal["32-true", "bf16-mixed"]

#: Frames (B, 3, H, W) uint8, actions (B, A), weights (B,).
FineTuneBatch = tuple[Tensor, Tensor, Tensor]


@dataclass
class FineTuneSettings:
    """One round's training (Table 9 by default).

    Attributes:
        epochs: Passes over the kept rows.
        max_steps: Optimizer steps at most; −1 for no limit.
        batch_size: Rows per forward pass, on all devices together.
        accumulate: Forward passes per optimizer step. N_v is that of each forward pass, and the step takes the mean
            of their losses (a last step of fewer passes divides by `accumulate` as well).
        optimizer: ``"adamw"``, or with a GPU ``"paged_adamw"`` and ``"paged_adamw_8bit"``; see
            :func:`~covr_lightning.finetune.optimizers.make_optimizer`.
        lr: Highest learning rate; it falls to 0 along a half cosine.
        warmup_fraction: Share of the steps in which the rate rises.
        label_smoothing: See :func:`~covr_lightning.finetune.loss.weighted_nll`.
        number_loss: λ_n, how much the expected distance of a number's token to the label counts beside its negative
            log-likelihood (:class:`~covr_lightning.finetune.number_loss.NumberTokens`); 0 is Eq. 6, whose likeliest
            answer to noisy labels is their mode. The larger it is, the nearer it is to their median.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        adapter: What a round begins with: ``"continue"``, the adapter of the round before, or ``"new"``, one that
            changes nothing yet.
        held_out: Share of the kept rows that are not trained on and measure the VLM before and after; see
            :func:`~covr_lightning.finetune.split.hold_out`.
        seed: Seed of split, order, dropout, adapter, and what filter and weight draw; by default that of the agent's
            data (YAML key data.seed), or 0 for a fine-tuning that stands alone.
    """

    epochs: int = 2
    max_steps: int = -1
    batch_size: int = 4
    accumulate: int = 4
    optimizer: OptimizerName = "adamw"
    lr: float = 1e-4
    warmup_fraction: float = 0.0
    label_smoothing: float = 0.1
    number_loss: float = 0.0
    gradient_checkpointing: bool = True
    adapter: Literal["continue", "new"] = "continue"
    held_out: float = 0.1
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"settings.{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("held_out", "warmup_fraction", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"settings.{name} is {getattr(self, name)}; it must lie in 0 to 1, 1 excluded.")
        if self.adapter not in ("continue", "new"):
            raise ConfigError(f"settings.adapter is {self.adapter!r}; it can be 'continue' or 'new'.")
        check_optimizer(self.optimizer)
        if self.seed is not None:
            check_seed("settings.seed", self.seed)
        check_positive("settings.lr", self.lr)
        check_not_negative("settings.number_loss", self.number_loss)
        if self.max_steps < 1 and self.max_steps != -1:
            raise ConfigError(f"settings.max_steps is {self.max_steps}; it must be at least 1, or -1 for no limit.")


class DivergedError(RuntimeError):
    """The fine-tuning loss is not finite; the message names the forward pass."""


class VLMFineTuner(L.LightningModule):
    """Trains the VLM's adapter on (frame, action, weight) rows with Eq. 6.

    Logits are computed at label positions only. Rows of weight 0 need no forward pass: they add to N_v alone.

    On W devices every process draws the same batches and takes its share of each one's rows; W times its share of
    Eq. 6, averaged over the processes as DDP and FSDP do, is the gradient of the whole batch. So the same rows form the
    same optimizer steps on any number of devices, and none is trained on twice.

    Args:
        vlm: The VLM; it gets an adapter if it has none. One that is not loaded yet has its settings read alone.
        settings: How to train.

    Attributes:
        losses: Eq. 6 of each forward pass, of the whole batch.
        is_sharded: Whether the weights lie in parts on several devices (FSDP2); they stay so.
        is_finished: Whether :meth:`finish` came after the training.
    """

    def __init__(self, vlm: VLM, settings: FineTuneSettings) -> None:
        super().__init__()
        self.vlm = vlm
        self.settings = settings
        if vlm.model is not None:
            vlm.add_adapter()
        self.model = vlm.model
        self.losses: list[float] = []
        self.is_sharded = False
        self.is_finished = False
        self._has_gradient = False
        self._numbers: NumberTokens | None = None

    def configure_model(self) -> None:
        """Leave out what no gradient reaches; share the weights out, if the strategy says so.

        Raises:
            RuntimeError: The VLM was not loaded.
        """
        if self.model is None:
            raise RuntimeError("VLM.load(spec) comes before VLMFineTuner(vlm, …): there are no weights to train.")
        freeze_unread(self.model)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert self.device_mesh is not None, "the strategy made it"
            shard(self.vlm.base_model, self.device_mesh["data_parallel"])
            self.is_sharded = True

    def on_train_end(self) -> None:
        """Put a sharded adapter together."""
        if self.is_sharded:
            make_adapter_whole(self.model)

    def on_fit_end(self) -> None:
        """Back to what inference needs."""
        self.finish()

    def on_fit_start(self) -> None:
        """Prepare, with dropout of its own in each process."""
        if self.trainer.world_size > 1:
            # The Trainer has just seeded every process with what seeds the whole run. The last number, not 0, sets
            # these seeds apart from those of rounds and of processes.
            torch.manual_seed(derived_seed(self.settings.seed or 0, self.vlm.round, self.trainer.global_rank, 1))
        self.prepare()

    def prepare(self) -> None:
        """Train mode, with gradient checkpointing if asked for."""
        base = self.vlm.base_model
        if self.settings.gradient_checkpointing:
            # No input needs a gradient for this kind of checkpoint: a part without adapters is not gone back through.
            base.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()

    def finish(self) -> None:
        """Back to what inference needs: when training has ended, by :meth:`on_fit_end`; or by whoever sees it fail.

        The last gradients go, which would take memory until the next round, and what is not sharded comes back to the
        VLM's device: Lightning leaves what it trained on the CPU.
        """
        if self.settings.gradient_checkpointing:
            self.vlm.base_model.gradient_checkpointing_disable()
        self.model.eval()
        self.zero_grad()
        if not self.is_sharded:
            self.vlm.to(self.vlm.device)
        self.is_finished = True

    def training_step(self, batch: FineTuneBatch, batch_idx: int = 0) -> Tensor:
        """W times this process's share of Eq. 6 of one batch."""
        loss = self.loss(*batch, self.trainer.global_rank, self.trainer.world_size)
        self._has_gradient |= bool((batch[2] > 0).any())
        # Of the whole batch, so that all processes fail at the same forward pass.
        self.losses.append(float(self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")))
        if not math.isfinite(self.losses[-1]):
            raise DivergedError(f"the loss is {self.losses[-1]} at forward pass {len(self.losses)}")
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A step of rows of weight 0 alone changes nothing, as one process leaves it without gradients.

        On several, DDP has made gradients of 0, with which Adam would go on by its first moment.
        """
        if self.is_sharded:
            average_whole_gradients(self.model)
        if not self._has_gradient:
            optimizer.zero_grad()
        self._has_gradient = False

    def loss(self, frames: Tensor, actions: Tensor, weights: Tensor, rank: int = 0, world_size: int = 1) -> Tensor:
        """(1/N_v) Σ_b w_b Σ_t −log p(y_{b,t} | x_{b,<t}), the label being the action's text.

        With `settings.number_loss` λ_n, each term is −log p + λ_n·(expected distance of the number).

        Args:
            frames: (B, 3, H, W) uint8.
            actions: (B, A).
            weights: (B,) ≥ 0.
            rank: The process's number.
            world_size: Processes W. With several, the sum is over every W-th of the rows of weight above 0 and counts
                W times, and N_v is still that of all B rows; the mean over the processes is Eq. 6.
        """
        answers = [self.vlm.codec.encode(action) for action in actions]
        # Every answer's tokens count in N_v, with its end token.
        n_v = sum(len(self.vlm.inputs.answer_ids(answer)) + 1 for answer in answers)
        share = (weights > 0).nonzero().squeeze(-1)[rank::world_size]
        if not len(share):
            if world_size == 1:  # gradients of 0, which a loss scaler (16-mixed) must see
                return 0.0 * next(p for p in self.model.parameters() if p.requires_grad).sum()
            # The other processes wait for this one's part in every collective: any row, counted 0 times.
            share, weights = share.new_zeros(1), torch.zeros_like(weights)
        inputs, labels = self.vlm.inputs.training_batch(frames[share], [answers[i] for i in share.tolist()])
        targets = next_token_targets(labels).to(self.device)
        mask = targets != IGNORED
        base = self.vlm.base_model
        hidden = base.model(**{k: v.to(self.device) for k, v in inputs.items()}, use_cache=False).last_hidden_state
        logits = base.get_output_embeddings()(hidden[mask])
        targets, rows = targets[mask], weights[share].to(self.device)[:, None].expand_as(targets)[mask]
        loss = weighted_nll(logits, targets, rows, self.settings.label_smoothing)
        if self.settings.number_loss:
            self._numbers = self._numbers or NumberTokens(self.vlm.inputs, self.vlm.codec)
            loss = loss + self.settings.number_loss * (rows * self._numbers.expected_distance(logits, targets)).sum()
        return world_size * loss / n_v

    def train_loader(self, frames: Tensor, actions: Tensor, weights: Tensor) -> DataLoader:
        """Shuffled batches of rows; shapes as in :meth:`loss`."""
        order = torch.Generator().manual_seed(derived_seed(self.settings.seed or 0, self.vlm.round))
        return DataLoader(
            TensorDataset(frames, actions, weights),
            batch_size=min(self.settings.batch_size, len(frames)),
            shuffle=True,
            generator=order,
        )

    def configure_optimizers(self) -> Any:
        """AdamW over the adapter, in the chosen kind, with a half-cosine rate."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.settings.optimizer, parameters, self.settings.lr)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        warmup = int(self.settings.warmup_fraction * total)

        def rate(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, rate), "interval": "step"}}
