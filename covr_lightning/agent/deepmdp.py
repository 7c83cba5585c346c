"""DeepMDP: the latent must foretell reward and the next latent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from torch import Tensor, nn

from covr_lightning.agent.networks import OutputLinear
from covr_lightning.agent.objectives import Objective
from covr_lightning.errors import ConfigError

if TYPE_CHECKING:
    from covr_lightning.agent.sac import SACModule
    from covr_lightning.agent.views import BatchViews


class DeepMDP(Objective):
    """A transition model and a reward model on the latent z of the critics' encoder.

    L = mean[½ ((T(z, a) − sg(z')) / σ)² + log σ] + MSE(R(z, a), r), z = enc(s), z' = enc(s'): both from the online
    trunk and critic projection, z' without gradient; the first mean is over batch and latent. σ is 1 unless
    `stochastic`. T and R are Linear(`hidden`) → LayerNorm → ReLU → Linear on [z, a]. s and s' are the augmented views
    that this update's critics and their target saw first.

    This is the baseline of DBC (Zhang et al., 2021; deep_bisim4control, ``agent/deepmdp_agent.py``), which COVR takes
    on CARLA. It leaves out the Wasserstein distance and the gradient penalty of the first DeepMDP (Gelada et al.,
    2019), as that code does. The reward is read from [z, a]; DBC's own agent reads it from the foretold z'. There, this
    loss comes between the critics' update and the actor's; here after both. The weight decay is that of that
    code's scripts, on T and R alone.

    Args:
        lr: Learning rate of T and R.
        encoder_lr_multiplier: The encoder's learning rate under this loss, as a multiple of `lr`.
        weight_decay: L2 penalty on T and R.
        hidden: Width of T and R.
        stochastic: Let T foretell a σ in [1e-4, 10] for each dimension of z'.

    Raises:
        ConfigError: `hidden` is below 1.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        encoder_lr_multiplier: float = 1.0,
        weight_decay: float = 1e-7,
        hidden: int = 512,
        stochastic: bool = False,
    ) -> None:
        super().__init__(lr, encoder_lr_multiplier, weight_decay=weight_decay)
        if hidden < 1:
            raise ConfigError(f"The DeepMDP objective's hidden is {hidden}; it must be at least 1 (model.objectives).")
        self.hidden = hidden
        self.stochastic = stochastic
        self.transition: TransitionModel
        self.reward: nn.Sequential

    def build(self, agent: SACModule) -> None:
        """Create T and R for the agent's latent and actions."""
        latent, inputs = agent.latent, agent.latent + agent.spec.action_dim
        self.transition = TransitionModel(inputs, self.hidden, latent, self.stochastic)
        self.reward = nn.Sequential(*_trunk(inputs, self.hidden), OutputLinear(self.hidden, 1))

    def loss(self, batch: TensorDictBase, views: BatchViews, agent: SACModule) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch.

        Args:
            batch: Transitions (B,) with ``action`` and ``("next", "reward")``.
            views: Their first critic view is s, their first target view s'.
            agent: For trunk and critic projection.

        Returns:
            A scalar, and its two parts.
        """
        za = torch.cat([agent.critic_projection(agent.trunk(views.critic[0])), batch["action"]], dim=-1)
        with torch.no_grad():
            z_next = agent.critic_projection(agent.trunk(views.target[0]))
        mu, sigma = (part.float() for part in self.transition(za))
        loss_t = (0.5 * ((mu - z_next.float()) / sigma).square() + sigma.log()).mean()
        loss_r = F.mse_loss(self.reward(za), batch["next", "reward"])
        return loss_t + loss_r, {"train/transition_loss": loss_t.detach(), "train/reward_loss": loss_r.detach()}


class TransitionModel(nn.Module):
    """T: a Gaussian for the next latent.

    Args:
        inputs: Size of [z, a].
        hidden: Width.
        latent: Size D of z.
        stochastic: Give σ, instead of ones.
        sigma_bounds: Bounds of σ.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        latent: int,
        stochastic: bool,
        sigma_bounds: tuple[float, float] = (1e-4, 10.0),
    ) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*_trunk(inputs, hidden))
        self.mu = nn.Linear(hidden, latent)
        self.sigma = nn.Linear(hidden, latent) if stochastic else None
        self.sigma_bounds = sigma_bounds

    def forward(self, za: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and σ of z', each (B, D), of [z, a] (B, D + A)."""
        h = self.trunk(za)
        mu = self.mu(h)
        if self.sigma is None:
            return mu, torch.ones_like(mu)
        low, high = self.sigma_bounds
        return mu, low + (high - low) * torch.sigmoid(self.sigma(h))


def _trunk(inputs: int, hidden: int) -> list[nn.Module]:
    return [nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.ReLU()]
