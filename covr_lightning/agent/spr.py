"""SPR: what the next observations look like to the encoder must follow from this one and the actions in between."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from torch import Tensor, nn

from covr_lightning import processes
from covr_lightning.agent.augmentations import Augmentation, RandomIntensity
from covr_lightning.agent.deepmdp import TransitionModel
from covr_lightning.agent.networks import soft_update
from covr_lightning.agent.objectives import Objective
from covr_lightning.agent.own_parts import check_keeps_size
from covr_lightning.errors import ConfigError

if TYPE_CHECKING:
    from covr_lightning.agent.sac import SACModule
    from covr_lightning.agent.views import BatchViews

#: Vectors shorter than this are not stretched to length 1.
_SHORTEST = 1e-3


class SPR(Objective):
    """Self-predictive representations over K steps (Schwarzer et al., 2021), in their form for SAC on dm_control.

    z_0 = enc(s_0), ẑ_0 = z_0, ẑ_k = T(ẑ_{k−1}, a_{k−1});
    L = w · 1/K Σ_{k=1}^{K} mean ‖n(q(p(ẑ_k))) − n(p̄(enc̄(s_k)))‖², n(x) = x / max(‖x‖, 1e-3).

    enc is the critics' encoder, enc̄ the agent's target encoder, T DeepMDP's deterministic transition model, p a
    projector and q a predictor (Linear → ReLU → Linear), p̄ a moving average of p; the second vector has no gradient.
    s_0 … s_K come from K consecutive transitions of one episode, each with a draw of its own of the agent's
    augmentation and of `augmentation`.

    The settings are those of PlayVirtual's code for SPR (Yu et al., 2021; ``DMControl/src/spr_sac.py`` and its configs;
    its terms for k = 0 and for rewards have weight 0 there): K 6, w 1, crop and intensity, averages of 0.05 at every
    second update. Two of its Adam optimizers step the encoder at every update, at 2e-3 and at 1e-3, so its multiplier
    here is 3. Its enc̄ is a second average of the encoder with the target encoder's step and start, hence the target
    encoder; its p̄ begins with weights of its own, here with p's. There, this loss comes between the critics' update
    and the actor's; here after both. There, a window is K + 1 transitions none of which ends the episode; here it is K,
    and the last may.

    Args:
        jumps: K, steps foretold.
        sequences: Sequences per update.
        weight: w. As the objective has an Adam of its own, any above 0 trains nearly alike.
        lr: Learning rate of T, p and q.
        encoder_lr_multiplier: The encoder's learning rate under this loss, as a multiple of `lr`.
        hidden: Width of T.
        projection: Width of p and q.
        tau: Step of p̄'s moving average, whenever the agent's targets move.
        augmentation: What images get after the agent's augmentation; by default :class:`RandomIntensity`.

    Raises:
        ConfigError: A value is out of range.
    """

    def __init__(
        self,
        jumps: int = 6,
        sequences: int = 128,
        weight: float = 1.0,
        lr: float = 1e-3,
        encoder_lr_multiplier: float = 3.0,
        hidden: int = 512,
        projection: int = 100,
        tau: float = 0.05,
        augmentation: Augmentation | None = None,
    ) -> None:
        for name, value in (("jumps", jumps), ("sequences", sequences), ("hidden", hidden), ("projection", projection)):
            if value < 1:
                raise ConfigError(f"SPR's {name} is {value} (model.objectives); it must be at least 1.")
        if not 0 <= weight < math.inf:
            raise ConfigError(f"SPR's weight is {weight} (model.objectives); it must be 0 or more, and a number.")
        if not 0 <= tau <= 1:
            raise ConfigError(f"SPR's tau is {tau} (model.objectives); it must lie in 0 to 1.")
        super().__init__(lr, encoder_lr_multiplier, sequence_length=jumps, sequences=sequences)
        self.weight = weight
        self.hidden = hidden
        self.projection = projection
        self.tau = tau
        self.augmentation = augmentation or RandomIntensity()
        self.transition: TransitionModel
        self.projector: nn.Sequential
        self.predictor: nn.Sequential
        self.target_projector: nn.Sequential

    def build(self, agent: SACModule) -> None:
        """Create T, p, q and p̄ for the agent's latent and actions."""
        size = agent.augmentation.output_size((agent.spec.frame_height, agent.spec.frame_width))
        check_keeps_size(self.augmentation, agent.spec.channels, size, "SPR's augmentation, model.objectives")
        self.transition = TransitionModel(agent.latent + agent.spec.action_dim, self.hidden, agent.latent, False)
        self.projector = _mlp(agent.latent, self.projection)
        self.predictor = _mlp(agent.latent, self.projection)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def loss(self, batch: TensorDictBase, views: BatchViews, agent: SACModule) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch.

        Args:
            batch: With ``sequences`` (S,), of which ``pixels`` (S, ≥ K + 1, C, H, W) uint8 and ``action`` (S, ≥ K, A)
                are read; with none the loss is 0.
            views: Not used.
            agent: For its encoder, target encoder, augmentation and noise.

        Returns:
            A scalar, and the loss with the mean cosine of what was foretold and what came.
        """
        own = batch["sequences"][: self.sequences // processes.count()]
        s, a = own["pixels"][:, : self.sequence_length + 1], own["action"]
        with torch.no_grad():
            came = self._augmented(s[:, 1:].flatten(0, 1), agent)
            target = self.target_projector(agent.target_projection(agent.target_trunk(came)))
            target = target.unflatten(0, (len(s), self.sequence_length))
        z = agent.critic_projection(agent.trunk(self._augmented(s[:, 0], agent)))
        foretold = []
        for k in range(self.sequence_length):
            z, _ = self.transition(torch.cat([z, a[:, k]], dim=-1))
            foretold.append(z)
        y = self.predictor(self.projector(torch.stack(foretold, dim=1))).float()
        target = target.float()  # near convergence y - target is less than bfloat16's steps
        distance = (F.normalize(y, dim=-1, eps=_SHORTEST) - F.normalize(target, dim=-1, eps=_SHORTEST)).square().sum(-1)
        loss = self.weight * distance.sum() / max(distance.numel(), 1)
        cosine = F.cosine_similarity(y.detach(), target, dim=-1).sum() / max(distance.numel(), 1)
        return loss, {"train/spr_loss": loss.detach(), "train/spr_cosine": cosine}

    def _augmented(self, images: Tensor, agent: SACModule) -> Tensor:
        return self.augmentation(agent.augmentation(images, agent.generator), agent.generator)

    def update_targets(self, agent: SACModule) -> None:
        """Move p̄ towards p."""
        soft_update(self.target_projector, self.projector, self.tau)


def _mlp(latent: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, latent))
