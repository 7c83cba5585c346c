"""Encoders: what turns stacked frames into the features that actor and critics share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from covr_lightning.agent.convolutions import Convolution, feature_maps, feature_maps_on_cpu, maps_size
from covr_lightning.agent.networks import initialise
from covr_lightning.errors import ConfigError


class Encoder(nn.Module, ABC):
    """From stacked frames to flat features; projections of actor and critics turn these into their latents z.

    Moved by the critics' loss and the objectives, never by the actor's. Input is uint8; it is scaled to [0, 1] in here
    and nowhere else.

    Attributes:
        features: Number of features; set by :meth:`build`.
    """

    features: int

    @abstractmethod
    def build(self, channels: int, image_size: tuple[int, int], filters: int, strides: Sequence[int]) -> None:
        """Create the layers. Called once, before anything else.

        Args:
            channels: Input channels, 3 per stacked frame, oldest frame first.
            image_size: Height and width that come out of the augmentation.
            filters: Output channels of every convolution (``model.filters``).
            strides: Stride of each convolution (``model.strides``).

        Raises:
            ConfigError: Images or frames of this kind cannot be encoded so.
        """

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Encode images (B, `channels`, H, W) uint8 as (B, `features`)."""


class ConvTrunk(Encoder):
    """The convolutions of RAD and its relatives over all frames at once: the default.

    3×3 kernels, no padding, ReLU after each.

    Args:
        init: ``"delta_orthogonal"``: only a kernel's centre is not 0 (RAD, CURL, SAC-AE). ``"orthogonal"``: over the
            whole kernel (DrQ).

    Raises:
        ConfigError: `init` is neither.
    """

    def __init__(self, init: Literal["delta_orthogonal", "orthogonal"] = "delta_orthogonal") -> None:
        super().__init__()
        if init not in ("delta_orthogonal", "orthogonal"):
            raise ConfigError(f"model.encoder.init is {init!r}; it can be 'delta_orthogonal' or 'orthogonal'.")
        self.init = init

    def build(self, channels: int, image_size: tuple[int, int], filters: int, strides: Sequence[int]) -> None:
        """Create one convolution per stride. RAD: (2, 1, 1, 1)."""
        if not strides or min(strides) < 1:
            raise ConfigError(f"model.strides is {list(strides)}; it must be numbers of at least 1, one a convolution.")
        layers: list[nn.Module] = []
        for i, stride in enumerate(strides):
            layers += [nn.Conv2d(channels if i == 0 else filters, filters, 3, stride=stride), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        height, width = maps_size(image_size, strides)
        if min(height, width) < 1:
            raise ConfigError(
                f"An image of {image_size[0]}×{image_size[1]} shrinks to nothing in {len(strides)} convolutions "
                f"of strides {tuple(strides)}: use a larger image (data.env.size, model.augmentation) or fewer, "
                "smaller strides (model.strides)."
            )
        self.features = filters * height * width
        self.apply(initialise)
        if self.init == "orthogonal":
            for layer in layers[::2]:
                nn.init.orthogonal_(cast(Tensor, layer.weight), nn.init.calculate_gain("relu"))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """The feature maps (B, `features`) of images (B, C, H, W) uint8, flattened in the order H′, W′, filter."""
        convolutions = [layer for layer in self.layers if isinstance(layer, nn.Conv2d)]
        layers = [Convolution(c.weight, cast(Tensor, c.bias), c.stride[0]) for c in convolutions]
        # Scaling to [0, 1] is the first weights' part: they are few, and the images need no second pass.
        # A tensor divides as the number does; from that, PyTorch 2.11 cannot make ONNX.
        layers[0] = layers[0]._replace(weight=layers[0].weight / torch.full((), 255.0))
        on_cpu = not torch.compiler.is_compiling() and images.device.type == "cpu" and len(images) > 0
        return (feature_maps_on_cpu if on_cpu else feature_maps)(images, layers)


class Flare(Encoder):
    """Each frame on its own, and how its features changed since the frame before (Shang et al., 2021).

    h = [f_2, …, f_k, f_2 − sg(f_1), …, f_k − sg(f_{k−1})] with f_t = conv(frame t), the same :class:`ConvTrunk` for
    every frame, sg without gradient (flare, ``encoder.py``). The authors train it as RAD with translations.

    Args:
        differences: Without them, h = [f_1, …, f_k]: the frames meet in the projection only.
    """

    def __init__(self, differences: bool = True) -> None:
        super().__init__()
        self.differences = differences

    def build(self, channels: int, image_size: tuple[int, int], filters: int, strides: Sequence[int]) -> None:
        """Create the convolutions for one frame."""
        self.frames = _frames(channels, 2, "Flare")
        self.frame = ConvTrunk()
        self.frame.build(3, image_size, filters, strides)
        self.features = (2 * (self.frames - 1) if self.differences else self.frames) * self.frame.features

    def forward(self, images: Tensor) -> Tensor:
        """The features (B, `features`) of images (B, 3·k, H, W) uint8."""
        b, _, height, width = images.shape
        f = self.frame(images.reshape(b * self.frames, 3, height, width)).view(b, self.frames, -1)
        if not self.differences:
            return f.flatten(1)
        now, before = f[:, 1:], f[:, :-1].detach()
        return torch.cat([now, now - before], dim=1).flatten(1)


class ResActEncoder(Encoder):
    """What is seen now less what was seen one step before, each through convolutions of its own (Liu et al., 2025).

    h = conv(s) − conv₋(s₋), of two :class:`ConvTrunk` (ResAct, ``encoder.py``). Of the k stacked frames s are the
    newest k − 1 and s₋ the oldest k − 1; the authors stack three, so k is 4 (``data.env.frame_stack``). One draw of the
    augmentation covers both. At an episode's first step s₋ is its first frame throughout, where the authors' code has
    black images; from the second step on there is no difference.
    """

    def build(self, channels: int, image_size: tuple[int, int], filters: int, strides: Sequence[int]) -> None:
        """Create both convolution trunks."""
        _frames(channels, 2, "ResActEncoder")
        self.now, self.before = ConvTrunk(), ConvTrunk()
        for trunk in (self.now, self.before):
            trunk.build(channels - 3, image_size, filters, strides)
        self.features = self.now.features

    def forward(self, images: Tensor) -> Tensor:
        """The features (B, `features`) of images (B, 3·k, H, W) uint8."""
        return self.now(images[:, 3:]) - self.before(images[:, :-3])


def _frames(channels: int, least: int, name: str) -> int:
    """Number of stacked frames, if there are enough."""
    if channels // 3 < least:
        raise ConfigError(
            f"The encoder {name} compares frames, but data.env.frame_stack is {channels // 3}; "
            f"it must be at least {least}."
        )
    return channels // 3
