"""Auxiliary objectives: what else shapes the shared encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from tensordict import TensorDictBase
from torch import Tensor, nn

if TYPE_CHECKING:
    from covr_lightning.agent.sac import SACModule
    from covr_lightning.agent.views import BatchViews


class Objective(nn.Module, ABC):
    """A loss beside the critics' that moves the encoder.

    The SAC module steps one Adam per objective, over the objective's own parameters and the shared encoder.

    Args:
        lr: Learning rate of the objective's own parameters.
        encoder_lr_multiplier: The encoder's learning rate under this objective, as a multiple of `lr`. Explicit,
            because published codes step the encoder by several optimizers at once without saying so.
        sequence_length: Consecutive transitions that a batch must hold; 1 for single transitions.
        weight_decay: Adam's L2 penalty on the objective's own parameters; the encoder has none.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        encoder_lr_multiplier: float = 1.0,
        sequence_length: int = 1,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.encoder_lr_multiplier = encoder_lr_multiplier
        self.sequence_length = sequence_length
        self.weight_decay = weight_decay

    def build(self, agent: SACModule) -> None:
        """Create networks whose shapes depend on the agent's. Called once, before optimizers are made."""

    @abstractmethod
    def loss(self, batch: TensorDictBase, views: BatchViews, agent: SACModule) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch.

        Args:
            batch: The sampled transitions.
            views: The augmented images that this update works on.
            agent: For its trunk, projections and target networks.

        Returns:
            A scalar, and metrics to log.
        """
