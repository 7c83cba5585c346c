"""CURL: two random views of one observation must know each other among those of the whole batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from torch import Tensor, nn

from covr_lightning.agent.networks import without_autocast
from covr_lightning.agent.objectives import Objective

if TYPE_CHECKING:
    from covr_lightning.agent.sac import SACModule
    from covr_lightning.agent.views import BatchViews


class CURL(Objective):
    """Instance contrast with a momentum encoder and a bilinear similarity (Srinivas et al., 2020; InfoNCE).

    L = −1/B Σ_i log (exp(q_i W k_iᵀ) / Σ_j exp(q_i W k_jᵀ)); q_i is the critics' latent of this update's first view of
    s_i, k_j the target encoder's latent of another augmentation of s_j, without gradient. W (D × D) begins uniform over
    [0, 1).

    In the authors' code (``curl_sac.py``) two Adam optimizers of rate 1e-3 step the encoder at every update, so its
    multiplier here is 2, and one steps W. There the target encoder moves just before this loss, here just after. It
    contrasts crops: the agent's augmentation should be one.

    Args:
        lr: Learning rate of W.
        encoder_lr_multiplier: The encoder's learning rate under this loss, as a multiple of `lr`.
    """

    def __init__(self, lr: float = 1e-3, encoder_lr_multiplier: float = 2.0) -> None:
        super().__init__(lr, encoder_lr_multiplier)
        self.w: nn.Parameter

    def build(self, agent: SACModule) -> None:
        """Create W for the agent's latent."""
        self.w = nn.Parameter(torch.rand(agent.latent, agent.latent))

    def loss(self, batch: TensorDictBase, views: BatchViews, agent: SACModule) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch.

        Args:
            batch: Transitions (B,) with ``pixels``.
            views: Their first critic view gives the queries.
            agent: For its encoder, target encoder, augmentation and noise.

        Returns:
            A scalar, and the loss with the share of queries that are most like their own key.
        """
        q = agent.critic_projection(agent.trunk(views.critic[0]))
        with torch.no_grad():
            k = agent.target_projection(agent.target_trunk(agent.augmentation(batch["pixels"], agent.generator)))
        with without_autocast(q.device):  # bfloat16 keeps too little of logits that differ by little
            logits = q.float() @ self.w @ k.float().T
        own = torch.arange(len(logits), device=logits.device)
        loss = F.cross_entropy(logits, own)
        accuracy = (logits.detach().argmax(1) == own).float().mean()
        return loss, {"train/curl_loss": loss.detach(), "train/curl_accuracy": accuracy}
