"""FSDP2: base weights that lie in parts on several devices while the adapter is trained."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def shard(model: Any, mesh: DeviceMesh) -> None:
    """Share out each layer's weights over a mesh; a layer's own are put together only while it computes.

    Layers are the elements of the model's outermost module lists (a VLM's decoder layers and vision blocks). What lies
    outside them, embeddings, projector and head, stays whole on every device: the head may share its weights with the
    embedding, and the loss asks it for label positions alone.

    Args:
        model: The VLM with its adapter, the same on every process.
        mesh: One dimension.
    """
    for layers in _outermost_lists(model):
        for layer in layers:
            fully_shard(layer, mesh=mesh)


def _outermost_lists(module: nn.Module) -> list[nn.ModuleList]:
    found: list[nn.ModuleList] = []
    for child in module.children():
        found += [child] if isinstance(child, nn.ModuleList) else _outermost_lists(child)
    return found


def average_whole_gradients(model: Any) -> None:
    """Average over the processes the gradients that FSDP2 does not: of what :func:`shard` left whole."""
    for parameter in model.parameters():
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def make_adapter_whole(model: Any) -> None:
    """Put every trained parameter together again, on the CPU, to be written; the model computes no more after that.

    Every process has to call it.
    """
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.requires_grad and isinstance(parameter, DTensor):
                    module.register_parameter(name, nn.Parameter(parameter.full_tensor().cpu()))
