"""Actor heads: from the latent z to a squashed Gaussian policy."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covr_lightning.agent.networks import mlp
from covr_lightning.errors import ConfigError


class GaussianActor(nn.Module):
    """Squashed Gaussian policy π(a | z): the default.

    Args:
        log_std_bounds: Bounds that log σ is squashed into by a tanh.

    Raises:
        ConfigError: The lower bound is not below the upper one, or one of them is no number.

    Attributes:
        needs_previous_action: Whether it reads the action taken just before; :class:`ResidualActor` does.
    """

    needs_previous_action: bool = False

    def __init__(self, log_std_bounds: tuple[float, float] = (-10.0, 2.0)) -> None:
        super().__init__()
        low, high = log_std_bounds
        if not -math.inf < low < high < math.inf:
            raise ConfigError(
                f"model.actor_head.log_std_bounds is {[low, high]}; it must be two numbers, the lower one first."
            )
        self.log_std_bounds = log_std_bounds

    def build(self, latent: int, action_dim: int, hidden: int) -> None:
        """Create the layers. Called once, before anything else.

        Args:
            latent: Size D of z.
            action_dim: A.
            hidden: Width of the two hidden layers.
        """
        self.mlp = mlp(latent, hidden, 2 * action_dim)

    def forward(self, z: Tensor, previous_action: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of the Gaussian before the tanh, each (B, A).

        Args:
            z: (B, D).
            previous_action: (B, A); not read here.
        """
        mu, log_std = self.mlp(z).chunk(2, dim=-1)
        low, high = self.log_std_bounds
        return mu, low + 0.5 * (high - low) * (torch.tanh(log_std) + 1)

    def sample(
        self, z: Tensor, generator: torch.Generator | None = None, previous_action: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw actions, differentiably.

        log π(a) = Σ_i [log N(u_i; μ_i, σ_i) − log(relu(1 − a_i²) + 1e-6)] with a = tanh(u), as in SAC-AE and RAD.

        Args:
            z: (B, D).
            generator: Source of the noise.
            previous_action: (B, A), if it :attr:`needs_previous_action`.

        Returns:
            The action (B, A), its log π (B, 1), and tanh μ (B, A).
        """
        mu, log_std = self(z, previous_action)
        noise = torch.randn(mu.shape, generator=generator, device=mu.device, dtype=mu.dtype)
        action = torch.tanh(mu + log_std.exp() * noise)
        log_gaussian = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1, keepdim=True)
        log_pi = log_gaussian - torch.log(F.relu(1 - action.square()) + 1e-6).sum(-1, keepdim=True)
        return action, log_pi, torch.tanh(mu)


class ResidualActor(GaussianActor):
    """ResAct's head: a correction of the action taken just before (Liu et al., 2025).

    a = tanh(a₋ + u), u ~ N(μ, σ) with μ and σ from [z, a₋]; a₋ is zero at an episode's first step. log π is that of
    :class:`GaussianActor` about the mean a₋ + μ (ResAct, ``sac_ae.py``). Goes with :class:`ResActEncoder` and the
    DeepMDP objective.

    Whoever asks for actions hands in a₋; whoever gives batches puts it in as ``previous_action`` (see
    :meth:`SACModule.training_step`).

    Args:
        log_std_bounds: Bounds that log σ is squashed into by a tanh.
    """

    needs_previous_action = True

    def build(self, latent: int, action_dim: int, hidden: int) -> None:
        """Create the layers for [z, a₋]."""
        super().build(latent + action_dim, action_dim, hidden)

    def forward(self, z: Tensor, previous_action: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean a₋ + μ and log σ of the Gaussian before the tanh, each (B, A).

        Args:
            z: (B, D).
            previous_action: a₋ (B, A).

        Raises:
            TypeError: There is no a₋.
        """
        if previous_action is None:
            raise TypeError("ResidualActor corrects the previous action, and none was given.")
        mu, log_std = super().forward(torch.cat([z, previous_action], dim=-1))
        return previous_action + mu, log_std
