"""What a trained agent is asked for: actions, entropy and values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import lightning as L
import torch
from torch import Tensor, nn

from covr_lightning.agent.actors import GaussianActor
from covr_lightning.agent.augmentations import Augmentation
from covr_lightning.agent.encoders import Encoder
from covr_lightning.agent.networks import Projection, TwinQ, only_asked
from covr_lightning.envs.base import EnvSpec

P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def _only_asked(answer: Callable[Concatenate[M, P], T]) -> Callable[Concatenate[M, P], T]:
    """The same by networks that are :func:`only_asked`."""

    @wraps(answer)
    def asked(self: M, *args: P.args, **kwargs: P.kwargs) -> T:
        with only_asked(self):
            return answer(self, *args, **kwargs)

    return asked


class Spread(NamedTuple):
    """How far a policy's actions scatter, per action dimension.

    Attributes:
        entropy: The entropy estimate ε: −mean log π (nats).
        noise: Mean |a − tanh μ|. No prediction of a from the observation comes closer on average, since tanh μ is the
            median of a.
    """

    entropy: float
    noise: float


class Acting(L.LightningModule):
    """Answers of an agent's networks outside its update, for frames as rendered; none takes gradients or changes them.

    The networks are :class:`covr_lightning.agent.SACModule`'s.
    """

    spec: EnvSpec
    architecture: dict[str, Any]
    seed: int
    augmentation: Augmentation
    trunk: Encoder
    actor_projection: Projection
    actor: GaussianActor
    critic_projection: Projection
    critic: TwinQ
    log_alpha: nn.Parameter

    @property
    def needs_previous_action(self) -> bool:
        """Whether the actor reads the action taken just before; whoever asks for actions then hands it in."""
        return self.actor.needs_previous_action

    @_only_asked
    def act(
        self,
        pixels: Tensor,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
        previous_action: Tensor | None = None,
    ) -> Tensor:
        """Choose actions.

        Args:
            pixels: (B, 3·k, H, W) uint8, as rendered.
            deterministic: tanh μ instead of a sample.
            generator: Source of the noise.
            previous_action: The actions (B, A) taken just before; None at an episode's first step, where it is zero.

        Returns:
            (B, A) in [−1, 1].
        """
        if previous_action is None:
            previous_action = torch.zeros(len(pixels), self.spec.action_dim)
        z, a_prev = self.actor_projection(self._features(pixels)), self._read(previous_action)
        if deterministic:
            return torch.tanh(self.actor(z, a_prev)[0])
        return self.actor.sample(z, generator, a_prev)[0]

    def actor_alone(self) -> Acting:
        """A copy, on the CPU and without gradients, of what :meth:`act` needs and nothing else."""
        copied = Acting()
        copied.spec, copied.seed = self.spec, self.seed
        for name in ("augmentation", "trunk", "actor_projection", "actor"):
            setattr(copied, name, copy.deepcopy(getattr(self, name)))
        return copied.cpu().requires_grad_(False)

    def _features(self, pixels: Tensor) -> Tensor:
        return self.trunk(self.augmentation.centre(pixels.to(self.device)))

    def _read(self, previous_action: Tensor | None) -> Tensor | None:
        """A previous action on the agent's device, if the actor reads it at all."""
        if previous_action is None or not self.needs_previous_action:
            return None
        return previous_action.to(self.device)

    @_only_asked
    def spread(self, pixels: Tensor, previous_action: Tensor | None = None) -> Spread:
        """How far the policy's actions scatter, estimated by one action for each frame.

        Args:
            pixels: (B, 3·k, H, W) uint8.
            previous_action: (B, A), if the actor `needs_previous_action`.
        """
        generator = torch.Generator(self.device).manual_seed(self.seed)
        log_pi, noise = [], []
        for rows in torch.arange(len(pixels)).split(256):
            a_prev = self._read(None if previous_action is None else previous_action[rows])
            z = self.actor_projection(self._features(pixels[rows]))
            action, of_action, middle = self.actor.sample(z, generator, a_prev)
            log_pi.append(of_action)
            noise.append((action - middle).abs())
        return Spread(-torch.cat(log_pi).mean().item() / self.spec.action_dim, torch.cat(noise).mean().item())

    @_only_asked
    def min_q(self, pixels: Tensor, action: Tensor) -> Tensor:
        """min(Q₁, Q₂)(s, a) (B,) of frames as rendered and actions (B, A)."""
        z = self.critic_projection(self._features(pixels))
        return torch.minimum(*self.critic(z, action.to(self.device))).squeeze(-1)

    @_only_asked
    def state_value(self, pixels: Tensor, previous_action: Tensor | None = None) -> Tensor:
        """V(s) = min Q(s, ã) − α log π(ã | s) (B,) of one sampled action, for frames as rendered.

        Eq. 3 has the slow critics Q̄ there, as a target for learning; this is what the agent thinks of s now.

        Args:
            pixels: (B, 3·k, H, W) uint8.
            previous_action: (B, A), if the actor `needs_previous_action`.
        """
        h = self._features(pixels)
        generator = torch.Generator(self.device).manual_seed(self.seed)
        action, log_pi, _ = self.actor.sample(self.actor_projection(h), generator, self._read(previous_action))
        q = torch.minimum(*self.critic(self.critic_projection(h), action))
        return (q - self.log_alpha.exp() * log_pi).squeeze(-1)
