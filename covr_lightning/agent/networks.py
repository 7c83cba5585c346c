"""The networks behind the encoder, as RAD and its relatives have them (Laskin et al., 2020; Yarats et al., 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Module):
    """Linear → LayerNorm (→ tanh), from feature maps to the latent z. Actor and critic each have their own.

    Args:
        features: Size of the flattened feature maps.
        latent: Size D of z.
        tanh: Squash z. RAD and CURL do not; SAC-AE and DrQ do.
    """

    def __init__(self, features: int, latent: int = 50, tanh: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(features, latent)
        self.norm = nn.LayerNorm(latent)
        self.tanh = tanh
        self.apply(initialise)

    def forward(self, h: Tensor) -> Tensor:
        """Map feature maps (B, `features`) to z (B, D)."""
        z = self.norm(self.linear(h))
        return torch.tanh(z) if self.tanh else z


class TwinQ(nn.Module):
    """Two independent Q(z, a).

    Args:
        latent: Size of z.
        action_dim: A.
        hidden: Width of the two hidden layers of each.
    """

    def __init__(self, latent: int, action_dim: int, hidden: int = 1024) -> None:
        super().__init__()
        self.q1 = mlp(latent + action_dim, hidden, 1)
        self.q2 = mlp(latent + action_dim, hidden, 1)

    def forward(self, z: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Both values, each (B, 1), of z (B, D) and action (B, A)."""
        za = torch.cat([z, action], dim=-1)
        return self.q1(za), self.q2(za)


class OutputLinear(nn.Linear):
    """A last layer, which computes in float32 also where autocast computes in bfloat16.

    bfloat16 has eight significant bits: Q between 256 and 512 would come in steps of 2, and the smaller of two critics
    that differ by less would be neither.
    """

    def forward(self, h: Tensor) -> Tensor:
        """Map (B, hidden) to float32 (B, outputs)."""
        with without_autocast(h.device):
            return super().forward(h.to(self.weight.dtype))


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Where nothing on a device is cast to a smaller type.

    A gradient is of a float32 operation's precision only if the backward pass runs in it, too.
    """
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two hidden ReLU layers, initialised as :func:`initialise` says; the outputs are float32."""
    net = nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), OutputLinear(hidden, outputs)
    )
    return net.apply(initialise)


def initialise(module: nn.Module) -> None:
    """Orthogonal linear layers (gain 1), delta-orthogonal convolutions (ReLU gain), zero biases.

    Delta-orthogonal: only the centre tap of a kernel is non-zero (Xiao et al., 2018).
    """
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.zeros_(module.weight)
        centre = module.kernel_size[0] // 2
        nn.init.orthogonal_(module.weight[:, :, centre, centre], nn.init.calculate_gain("relu"))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def squared_error(q: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of (q − y)² over a batch (B, 1), each row's times its weight (B,) or (B, 1) where there are weights."""
    if weight is None:
        return F.mse_loss(q, y)
    return (weight.reshape(-1, 1) * F.mse_loss(q, y, reduction="none")).mean()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Take no gradients for a module's parameters, but let them pass through it."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


@contextmanager
def only_asked(module: nn.Module) -> Iterator[None]:
    """Inside, a module answers without gradients and as it is written, and has afterwards what it had before.

    Compiled networks are compiled for the update's batches; each other number of frames would be compiled anew. What it
    has beside weights, such as a BatchNorm's averages, is put back: those are of the update's batches alone, so that
    all processes of a run have the same.
    """
    owners = [(owner, dict(owner._buffers)) for owner in module.modules() if owner._buffers]
    before = [(b, b.clone()) for _, buffers in owners for b in buffers.values() if b is not None]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield
        for owner, buffers in owners:  # one may have been assigned anew
            owner._buffers.update(buffers)
        for buffer, value in before:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


@torch.no_grad()
def soft_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move a target network towards its source: θ̄ ← (1 − τ) θ̄ + τ θ."""
    moved: list[Tensor] = [*target.parameters()]
    if moved:
        torch._foreach_lerp_(moved, [*source.parameters()], tau)
