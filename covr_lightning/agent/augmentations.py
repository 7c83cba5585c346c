"""Image augmentations: uint8 in, uint8 out, one random draw per image and the same for all its stacked frames.

Those that copy images anyway give them in the memory order of the convolutions, channels last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from covr_lightning.errors import ConfigError


class Augmentation(ABC):
    """A random change of images, and the fixed one that acting and evaluation use in its place, by default none.

    Attributes:
        same_for_next: Whether an observation and its successor must get the same draw.
    """

    same_for_next: bool = False
    _backend: str | None = None

    def compile(self, backend: str) -> None:
        """Make the copies of images by what torch.compile's `backend` makes of them, where there are any to make.

        On a GPU a crop is then one pass over the images instead of two.
        """
        self._backend = backend

    @abstractmethod
    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augment images (B, C, H, W) uint8, each with a draw of its own."""

    def centre(self, images: Tensor) -> Tensor:
        """What the policy sees when it acts: images (B, C, H, W) uint8 without randomness; by default as they are."""
        return images

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that come out for images of a given height and width; by default the same.

        Raises:
            ConfigError: Images of this size cannot be augmented so.
        """
        return size


class NoAugmentation(Augmentation):
    """Images as they are: plain pixel SAC."""

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the images."""
        return images


class RandomCrop(Augmentation):
    """RAD's crop: a random window of the rendered frame; an observation and its successor are cropped independently.

    Args:
        size: Height and width of the window. RAD: 84 from frames of 100.

    Raises:
        ConfigError: `size` is below 1.
    """

    def __init__(self, size: int = 84) -> None:
        if size < 1:
            raise ConfigError(f"size of {type(self).__name__} is {size} (model.augmentation); it must be at least 1.")
        self.size = size

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Cut one random window (size × size) from each image."""
        top, left = _offsets(images, images.shape[-2] - self.size, images.shape[-1] - self.size, generator)
        return _windows(images, top, left, self.size, self._backend)

    def centre(self, images: Tensor) -> Tensor:
        """Cut the central window."""
        top, left = (images.shape[-2] - self.size) // 2, (images.shape[-1] - self.size) // 2
        return images[..., top : top + self.size, left : left + self.size]

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The window's size."""
        if self.size > min(size):
            raise ConfigError(
                f"A crop of {self.size} pixels (model.augmentation.size) is larger than the frame of "
                f"{size[0]}×{size[1]} (data.env.size); it can be 1 to {min(size)}."
            )
        return self.size, self.size


class RandomTranslate(Augmentation):
    """RAD's translate: the frame at a random place of a larger black canvas, the same place for the next observation.

    As described in the paper: frames are rendered at one size (100) and placed on the canvas (108). Acting and
    evaluation place them in the centre. The released code of RAD renders at 108 instead and shows the policy other
    pixels while training than while testing.

    Args:
        size: Height and width of the canvas.
    """

    same_for_next = True

    def __init__(self, size: int = 108) -> None:
        self.size = size

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Place each image at random on its canvas."""
        above, beside = self.size - images.shape[-2], self.size - images.shape[-1]
        top, left = _offsets(images, above, beside, generator)
        # What the canvas shows when the frame moves down is what a window over a black margin shows when it moves up.
        wide = F.pad(images, (beside, beside, above, above))
        return _windows(wide, above - top, beside - left, self.size, self._backend)

    def centre(self, images: Tensor) -> Tensor:
        """Place each image in the centre."""
        h, w = images.shape[-2:]
        top, left = (self.size - h) // 2, (self.size - w) // 2
        return F.pad(images, (left, self.size - w - left, top, self.size - h - top))

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The canvas's size."""
        if self.size < max(size):
            raise ConfigError(
                f"A canvas of {self.size} pixels (model.augmentation.size) is smaller than the frame of "
                f"{size[0]}×{size[1]} (data.env.size); it must be at least {max(size)}."
            )
        return self.size, self.size


class RandomShift(Augmentation):
    """DrQ's shift: replicate-pad by a few pixels, then a random crop back to the old size (Kostrikov et al., 2021).

    Args:
        pad: Pixels of padding on each side.

    Raises:
        ConfigError: `pad` is negative.
    """

    def __init__(self, pad: int = 4) -> None:
        if pad < 0:
            raise ConfigError(f"pad of {type(self).__name__} is {pad} (model.augmentation); it must be 0 or more.")
        self.pad = pad

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Shift each image by up to `pad` pixels in both directions."""
        h, w = images.shape[-2:]
        top, left = _offsets(images, 2 * self.pad, 2 * self.pad, generator)
        # Replicate padding and cropping in one: clamped coordinates.
        rows = (top[:, None] + torch.arange(h, device=images.device) - self.pad).clamp_(0, h - 1)
        columns = (left[:, None] + torch.arange(w, device=images.device) - self.pad).clamp_(0, w - 1)
        pick = _pixels if self._backend is None else _compiled(self._backend)
        return pick(images, rows, columns)


class RandomCutout(Augmentation):
    """RAD's cutout: a black rectangle somewhere in each image (Laskin et al., 2020).

    Height and width are drawn uniformly, then the place, uniformly among those where the rectangle lies inside. The
    authors' code (``data_augs.py``) takes the height as the distance from the top as well, and the width as that from
    the left, so that there a small rectangle is always near the corner.

    Args:
        smallest: Least height and width in pixels. RAD: 10.
        largest: Greatest height and width in pixels, included. RAD: 29.
    """

    def __init__(self, smallest: int = 10, largest: int = 29) -> None:
        self.smallest, self.largest = smallest, largest

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Blacken a rectangle of each image, the same in all its frames."""
        rows, columns = (self._span(images, length, generator) for length in images.shape[-2:])
        return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0)

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size."""
        if not 0 <= self.smallest <= self.largest <= min(size):
            raise ConfigError(
                f"A cutout of {self.smallest} to {self.largest} pixels (model.augmentation.smallest, largest) does not "
                f"fit a frame of {size[0]}×{size[1]} (data.env.size): 0 ≤ smallest ≤ largest ≤ {min(size)}."
            )
        return size

    def _span(self, images: Tensor, length: int, generator: torch.Generator | None) -> Tensor:
        """One interval inside 0 … length − 1 for each of B images, as a mask (B, length)."""
        n, device = len(images), images.device
        width = self.smallest + _draw(n, self.largest - self.smallest, generator, device)
        first = _draw(n, 2**40, generator, device) % (length - width + 1)  # so many that the remainders are uniform
        place = torch.arange(length, device=device) - first[:, None]
        return (place >= 0) & (place < width[:, None])


class RandomConvolution(Augmentation):
    """SVEA's strong augmentation: each image through a random convolution of its own (Hansen et al., 2021).

    255 · sigmoid(K ∗ x / 255) with a 3×3 kernel K (3 → 3 channels) ~ N(0, 1), drawn for each image and the same for all
    its frames, over replicate padding. The authors' code hands on the fraction that is rounded off here.
    """

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Convolve each image (3·k channels) with its random kernel."""
        b, c, h, w = images.shape
        device = generator.device if generator is not None else "cpu"
        kernels = torch.randn(3 * b, 3, 3, 3, generator=generator, device=device).to(images.device)
        # One convolution: frames are its batch, and every image is a group of three channels.
        frames = images.reshape(b, c // 3, 3, h, w).transpose(0, 1).reshape(c // 3, 3 * b, h, w)
        x = F.pad(frames.to(torch.float32) / 255, (1, 1, 1, 1), mode="replicate")
        x = torch.sigmoid_(F.conv2d(x, kernels, groups=b)).mul_(255).round_().to(torch.uint8)
        return x.reshape(c // 3, b, 3, h, w).transpose(0, 1).reshape(b, c, h, w)


class RandomIntensity(Augmentation):
    """Each image brighter or darker by a factor of its own, 1 + `scale` · clip(n, −2, 2), n ~ N(0, 1) (SPR).

    The authors' code hands on what lies above white and the fraction that is rounded off here.

    Args:
        scale: Standard deviation of the factor, but for the clipping.

    Raises:
        ConfigError: `scale` lies outside 0 to 0.5.
    """

    def __init__(self, scale: float = 0.05) -> None:
        if not 0 <= scale <= 0.5:
            raise ConfigError(f"RandomIntensity's scale is {scale}; it must lie in 0 to 0.5.")
        self.scale = scale

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Multiply each image by its random factor."""
        device = generator.device if generator is not None else "cpu"
        n = torch.randn(len(images), 1, 1, 1, generator=generator, device=device).to(images.device)
        bright = images.to(torch.float32).mul_(1 + self.scale * n.clamp_(-2, 2))
        return bright.round_().clamp_(0, 255).to(torch.uint8)

    def centre(self, images: Tensor) -> Tensor:
        """Return the images."""
        return images

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size."""
        return size


def _windows(images: Tensor, top: Tensor, left: Tensor, size: int, backend: str | None) -> Tensor:
    """Of images (B, C, H, W), each one's window (B, C, `size`, `size`) at its row and column (B,), channels last."""
    if backend is not None:
        side = torch.arange(size, device=images.device)
        return _compiled(backend)(images, top[:, None] + side, left[:, None] + side)
    cut = _cut_by_pieces if images.device.type == "cpu" and len(images) else _cut
    return cut(images, top, left, size).contiguous(memory_format=torch.channels_last)


def _cut(images: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    # A view of all windows; indexing it copies only the chosen ones.
    windows = images.unfold(2, size, 1).unfold(3, size, 1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def _cut_by_pieces(images: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """The same by long copies: a channel's window from its first pixel to its last, with what lies between its rows.

    Indexing copies a pixel at a time on a CPU; this takes an eighth of its time.
    """
    b, c, h, w = images.shape
    if images[0].stride() != (h * w, w, 1):
        images = images.contiguous()
    per_image, piece = images.stride(0), (size - 1) * w + size
    pieces = images.as_strided(((b - 1) * per_image + c * h * w - piece + 1, piece), (1, 1))  # one at every pixel
    first = (torch.arange(b) * per_image + top * w + left)[:, None] + torch.arange(c) * h * w
    return pieces.index_select(0, first.flatten()).as_strided((b, c, size, size), (c * piece, piece, w, 1))


def _pixels(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Of images (B, C, H, W), each one's rows (B, h) and columns (B, w), as (B, C, h, w), channels last in memory."""
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@cache
def _compiled(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The same, compiled; not kept in augmentations, which are copied and sent to other processes."""
    return torch.compile(_pixels, backend=backend, dynamic=False)


def _offsets(images: Tensor, max_top: int, max_left: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Row and column offsets (B,) each of images (B, …), uniform over 0 … max, drawn on the generator's device."""
    top = _draw(len(images), max_top, generator, images.device)
    return top, _draw(len(images), max_left, generator, images.device)


def _draw(n: int, largest: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    if largest == 0:  # nothing to choose: draw nothing, so that noise drawn later stays as it is without augmentation
        return torch.zeros(n, dtype=torch.long, device=device)
    drawn_on = generator.device if generator is not None else "cpu"
    return torch.randint(0, largest + 1, (n,), generator=generator, device=drawn_on).to(device)
