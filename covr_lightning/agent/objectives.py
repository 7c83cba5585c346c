"""Auxiliary objectives: what else shapes the shared encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from tensordict import TensorDictBase
from torch import Tensor, nn

from covr_lightning.errors import ConfigError, check_not_negative, check_positive

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
        weight_decay: Adam's L2 penalty on the objective's own parameters; the encoder has none.
        sequence_length: Consecutive transitions L in each of the sequences that it needs.
        sequences: Sequences that it needs at every update, over all processes; 0 for none.

    Raises:
        ConfigError: One is out of range; a learning rate must be above 0.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        encoder_lr_multiplier: float = 1.0,
        weight_decay: float = 0.0,
        sequence_length: int = 1,
        sequences: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (("sequence_length", sequence_length, 1), ("sequences", sequences, 0)):
            if value < least:
                raise ConfigError(f"{name} is {value} (model.objectives); it must be at least {least}.")
        of = f"of {type(self).__name__} (model.objectives)"
        self.lr = check_positive(f"lr {of}", lr)
        self.encoder_lr_multiplier = check_not_negative(f"encoder_lr_multiplier {of}", encoder_lr_multiplier)
        self.weight_decay = check_not_negative(f"weight_decay {of}", weight_decay)
        self.sequence_length = sequence_length
        self.sequences = sequences

    def build(self, agent: SACModule) -> None:
        """Create networks whose shapes depend on the agent's. Called once, before optimizers are made."""

    @abstractmethod
    def loss(self, batch: TensorDictBase, views: BatchViews, agent: SACModule) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch.

        Args:
            batch: The sampled transitions; for an objective with `sequences` also the entry ``sequences``, in which
                each of at least as many sequences has at least `sequence_length` transitions
                (:meth:`covr_lightning.data.sequences.SequenceSampler.sample`), but none while the replay holds none.
            views: The augmented images that this update works on.
            agent: For its trunk, projections and target networks.

        Returns:
            A scalar, and metrics to log.
        """

    def update_targets(self, agent: SACModule) -> None:
        """Move target networks of its own; called when the agent's targets have moved."""
