"""Optimizers of the adapter: AdamW, and bitsandbytes' that lie in memory the GPU may hand to the host (QLoRA)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch.nn import Parameter

from covr_lightning.errors import ConfigError

OptimizerName = Literal["adamw", "paged_adamw", "paged_adamw_8bit"]


def check_optimizer(name: str, device: torch.device | None = None) -> None:
    """Refuse an optimizer that does not exist or cannot run on a device.

    Args:
        name: One of :data:`OptimizerName`.
        device: Where the adapter will be trained; None if that is not known yet.

    Raises:
        ConfigError: If so.
    """
    if name not in get_args(OptimizerName):
        choices = ", ".join(map(repr, get_args(OptimizerName)))
        raise ConfigError(f"settings.optimizer is {name!r}; it can be {choices}.")
    if name == "adamw" or device is None:
        return
    if device.type != "cuda":
        raise ConfigError(
            f"settings.optimizer is {name!r}, which needs a CUDA device, but the VLM is trained on {device.type!r}; "
            "there it can be 'adamw'."
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"settings.optimizer is {name!r}, which needs bitsandbytes ({error}): install it with pip install "
            "'covr_lightning[quantised]', or take 'adamw'."
        ) from error


def make_optimizer(name: OptimizerName, parameters: Iterable[Parameter], lr: float) -> torch.optim.Optimizer:
    """AdamW without weight decay, β = (0.9, 0.999).

    Args:
        name: ``"adamw"`` keeps two fp32 moments a parameter on the device; ``"paged_adamw"`` keeps the same in unified
            memory, whose pages move to the host when the GPU is full; ``"paged_adamw_8bit"`` keeps them there in 8
            bits, in blocks of 256 (Dettmers et al., 2022), matrices of fewer than 4096 entries in fp32.
        parameters: What is trained.
        lr: Learning rate.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    from bitsandbytes.optim import PagedAdamW8bit, PagedAdamW32bit

    paged = PagedAdamW32bit if name == "paged_adamw" else PagedAdamW8bit
    return paged(parameters, lr=lr, weight_decay=0.0)
