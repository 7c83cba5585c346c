"""3×3 convolutions with their ReLUs, as an encoder runs them: by PyTorch's own calls, or by fewer passes on a CPU.

On a CPU an update of the pixels' networks waits for memory as much as for arithmetic. There a batch goes through all
layers a few images at a time, forwards and backwards, each convolution and its ReLU are one call of oneDNN's, and
every image comes from uint8 straight into what is computed in, float32 or bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Pixels of a batch that go through the convolutions at once on a CPU, 32 images of 84×84: few enough that most of a
#: layer's output is still in the cache when the next one reads it, and enough for every core.
CPU_PIXELS = 32 * 84 * 84


class Convolution(NamedTuple):
    """What one convolution without padding, followed by a ReLU, is made of.

    Attributes:
        weight: (C_out, C_in, 3, 3).
        bias: (C_out,).
        stride: The same for rows and columns.
    """

    weight: Tensor
    bias: Tensor
    stride: int


def feature_maps(images: Tensor, layers: Sequence[Convolution]) -> Tensor:
    """The last layer's output, by PyTorch's own calls on any device.

    Args:
        images: (B, C, H, W) uint8.
        layers: In their order.

    Returns:
        (B, H′·W′·C_out), flattened in the order row, column, filter, in which convolutions leave it in memory.
    """
    dtype = torch.float32
    if images.is_cuda:
        # A GPU's matrix units take channels by the eight; cuDNN would pad each time. bfloat16 has all of 0 … 255.
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else dtype
        more = (0, 0, 0, 0, 0, -images.shape[1] % 8)
        images, first = F.pad(images, more), layers[0]
        layers = [first._replace(weight=F.pad(first.weight, more)), *layers[1:]]
    x = _converted(images, dtype)
    for layer in layers:
        x = F.relu_(F.conv2d(x, layer.weight, layer.bias, layer.stride))
    return _flat(x)


def feature_maps_on_cpu(images: Tensor, layers: Sequence[Convolution]) -> Tensor:
    """The same as :func:`feature_maps` for images (B, C, H, W) uint8 on a CPU, B > 0, a part of them at a time.

    Features are the same but for the last digits of a CPU on which the two calls sum in another order; where there are
    several parts, gradients are summed in another order.
    """
    if not has_convolution_with_relu(layers[0].weight):
        return torch.cat([feature_maps(part, layers) for part in images.split(part_size(images))])
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    strides = [layer.stride for layer in layers]
    parameters = [value for layer in layers for value in (layer.weight, layer.bias)]
    if torch.is_grad_enabled() and any(value.requires_grad for value in parameters):
        return _FeatureMaps.apply(images, dtype, strides, *parameters)
    return _forward(images, _cast(parameters, strides, dtype))[0]


def has_convolution_with_relu(weight: Tensor) -> bool:
    """Whether oneDNN's call, which is no public interface, is there for these weights and for what is computed in."""
    mkldnn = torch.ops.mkldnn
    if weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(mkldnn, "_convolution_pointwise"):
        return False
    if not torch.is_autocast_enabled("cpu"):
        return True
    # A processor without instructions for it is refused by oneDNN's call, not by PyTorch's.
    known = hasattr(mkldnn, "_is_mkldnn_bf16_supported") and mkldnn._is_mkldnn_bf16_supported()
    return known and torch.get_autocast_dtype("cpu") == torch.bfloat16


def maps_size(image_size: Sequence[int], strides: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the last layer's output for images of a height and width; below 1 where nothing is left."""
    height, width = image_size
    for stride in strides:
        height, width = (height - 3) // stride + 1, (width - 3) // stride + 1
    return height, width


def part_size(images: Tensor) -> int:
    """How many of the images (B, C, H, W) go through the convolutions at once: parts of like size."""
    parts = max(1, round(len(images) * images.shape[-2] * images.shape[-1] / CPU_PIXELS))
    return -(-len(images) // parts)


class _FeatureMaps(torch.autograd.Function):
    """:func:`feature_maps_on_cpu` with gradients of weights and biases."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, dtype: torch.dtype, strides: list[int], *parameters: Tensor) -> Tensor:
        layers = _cast(parameters, strides, dtype)
        features, hidden = _forward(images, layers, keep=True)
        ctx.strides, ctx.last = strides, maps_size(images.shape[-2:], strides)
        cast = [value for layer in layers for value in (layer.weight, layer.bias)]
        ctx.save_for_backward(images, features, *cast, *hidden)
        return features

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        images, features, *saved = ctx.saved_tensors
        n = len(ctx.strides)
        layers = _cast(saved[: 2 * n], ctx.strides, features.dtype)
        hidden = saved[2 * n :]
        sums: list[Tensor] = []
        size = part_size(images)
        parts = zip(*(whole.split(size) for whole in (images, features, gradient)), strict=True)
        for i, (pictures, last, by_last) in enumerate(parts):
            outputs = [*hidden[i * (n - 1) : (i + 1) * (n - 1)], _maps(last, ctx.last)]
            inputs = [_converted(pictures, features.dtype), *outputs[:-1]]
            by_output = _maps(by_last, ctx.last)
            of_part: list[Tensor] = []
            for k in reversed(range(n)):
                by_sum = torch.ops.aten.threshold_backward(by_output, outputs[k], 0)
                by_output, *of_layer = torch.ops.aten.convolution_backward(
                    by_sum, inputs[k], layers[k].weight, [len(layers[k].bias)], [layers[k].stride] * 2, [0, 0],
                    [1, 1], False, [0, 0], 1, [k > 0, True, True],
                )  # fmt: skip
                of_part = [*of_layer, *of_part]
            # In float32 from part to part, whatever a part is computed in.
            if sums:
                torch._foreach_add_(sums, of_part)
            else:
                sums = [value.float() for value in of_part]
        return None, None, None, *sums


def _forward(images: Tensor, layers: Sequence[Convolution], keep: bool = False) -> tuple[Tensor, list[Tensor]]:
    """The features and, if they are kept, every part's outputs of all layers but the last, part by part."""
    height, width = maps_size(images.shape[-2:], [layer.stride for layer in layers])
    dtype, filters = layers[-1].weight.dtype, len(layers[-1].weight)
    features = torch.empty(len(images), height * width * filters, dtype=dtype)
    hidden: list[Tensor] = []
    size = part_size(images)
    for part, out in zip(images.split(size), features.split(size), strict=True):
        x = _converted(part, dtype)
        for layer in layers:
            hidden += [x] if keep and layer is not layers[0] else []
            x = _convolve(x, layer)
        out.copy_(_flat(x))
    return features, hidden


def _convolve(x: Tensor, layer: Convolution) -> Tensor:
    """A convolution and its ReLU in one pass over the memory, as PyTorch's own compiler calls it."""
    stride = [layer.stride] * 2
    return torch.ops.mkldnn._convolution_pointwise(
        x, layer.weight, layer.bias, [0, 0], stride, [1, 1], 1, "relu", [], ""
    )


def _cast(parameters: Sequence[Tensor], strides: Sequence[int], dtype: torch.dtype) -> list[Convolution]:
    values = [value.to(dtype) for value in parameters]
    return [Convolution(*layer) for layer in zip(values[::2], values[1::2], strides, strict=True)]


def _converted(images: Tensor, dtype: torch.dtype) -> Tensor:
    return images.to(dtype=dtype, memory_format=torch.channels_last)


def _flat(maps: Tensor) -> Tensor:
    """(B, C, H, W), channels last in memory, as (B, H·W·C) without a copy."""
    return maps.permute(0, 2, 3, 1).flatten(1)


def _maps(flat: Tensor, side: tuple[int, int]) -> Tensor:
    """(B, H·W·C) as (B, C, H, W), channels last in memory, without a copy."""
    return flat.unflatten(1, (*side, -1)).permute(0, 3, 1, 2)
