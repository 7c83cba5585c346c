"""Augmentations against plain loops and slices."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from covr_lightning.agent import Augmentation, RandomCrop, RandomCutout, RandomShift, RandomTranslate, augmentations
from covr_lightning.errors import ConfigError
from tests.agent.small_agents import agent, batch


def numbered(n: int = 4, size: int = 10) -> torch.Tensor:
    return torch.arange(n * 6 * size * size).reshape(n, 6, size, size).remainder(251).to(torch.uint8)


def wide(n: int = 4) -> torch.Tensor:
    return torch.arange(n * 6 * 10 * 16).reshape(n, 6, 10, 16).remainder(251).to(torch.uint8) // 2 + 1


def test_crop_cuts_windows_that_exist_and_all_channels_alike() -> None:
    images = numbered()
    crops = RandomCrop(7)(images, torch.Generator().manual_seed(0))
    for image, crop in zip(images, crops, strict=True):
        places = [(y, x) for y in range(4) for x in range(4) if torch.equal(image[:, y : y + 7, x : x + 7], crop)]
        assert len(places) >= 1
    assert torch.equal(RandomCrop(6).centre(images), images[..., 2:8, 2:8])
    assert torch.equal(RandomCrop(10)(images), images)


def test_crop_reaches_every_offset() -> None:
    image = torch.arange(25, dtype=torch.uint8).reshape(1, 1, 5, 5).expand(400, -1, -1, -1)
    corners = RandomCrop(3)(image, torch.Generator().manual_seed(0))[:, 0, 0, 0].unique()
    assert corners.tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12]


@pytest.mark.parametrize(("h", "w", "size"), [(20, 30, 16), (8, 8, 8), (7, 9, 1), (9, 7, 6)])
def test_windows_are_those_that_slices_cut_however_the_images_lie_in_memory(h: int, w: int, size: int) -> None:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 12, h, w), dtype=torch.uint8, generator=g)
    ways = {
        "as they come": images,
        "some of the channels, as a replay gives them": images[:, 3:],
        "not the first": images[2:],
        "channels last": images.contiguous(memory_format=torch.channels_last),
        "one, repeated": images[:1].expand(4, -1, -1, -1),
        "transposed": images.transpose(0, 1),
    }
    for name, seen in ways.items():
        top = torch.randint(0, h - size + 1, (len(seen),), generator=g)
        left = torch.randint(0, w - size + 1, (len(seen),), generator=g)
        top[-1], left[-1] = h - size, w - size  # up to the memory's end
        cut = augmentations._windows(seen, top, left, size, None)
        for image, y, x, window in zip(seen, top, left, cut, strict=True):
            assert torch.equal(window, image[:, y : y + size, x : x + size]), name
        assert cut.is_contiguous(memory_format=torch.channels_last)
    assert RandomCrop(size)(images[:0]).shape == (0, 12, size, size)


def test_translate_places_the_frame_and_moves_the_next_one_alike() -> None:
    images = numbered() // 2 + 1
    canvas = RandomTranslate(13)(images, torch.Generator().manual_seed(0))
    for image, placed in zip(images, canvas, strict=True):
        ys, xs = placed[0].nonzero(as_tuple=True)
        y, x = int(ys.min()), int(xs.min())
        assert torch.equal(placed[:, y : y + 10, x : x + 10], image)
        assert int((placed > 0).sum()) == image.numel()
    assert torch.equal(RandomTranslate(14).centre(images)[..., 2:12, 2:12], images)
    module = agent(augmentation=RandomTranslate(24))
    b = batch()
    views = module.views(b["pixels"], b["pixels"], module.augmentation, module.generator)
    assert torch.equal(views.actor, views.target[0])  # one offset for both
    views = module.views(b["pixels"], b["pixels"], RandomCrop(12), module.generator)
    assert not torch.equal(views.actor, views.target[0])  # crops are independent


def test_translate_reaches_every_place_of_its_canvas() -> None:
    canvas = RandomTranslate(13)(wide(400)[..., :10], torch.Generator().manual_seed(0))
    places = {tuple(int(xs.min()) for xs in placed[0].nonzero(as_tuple=True)) for placed in canvas}
    assert places == {(y, x) for y in range(4) for x in range(4)}


def test_the_middle_of_frames_that_are_not_square() -> None:
    images = wide()
    assert torch.equal(RandomCrop(6).centre(images), images[..., 2:8, 5:11])
    assert torch.equal(RandomTranslate(20).centre(images)[..., 5:15, 2:18], images)


@pytest.mark.parametrize("images", [numbered(), wide()])
def test_shift_equals_padding_and_cropping(images: torch.Tensor) -> None:
    shifted = RandomShift(3)(images, torch.Generator().manual_seed(5))
    g = torch.Generator().manual_seed(5)
    top, left = torch.randint(0, 7, (4,), generator=g), torch.randint(0, 7, (4,), generator=g)
    padded = F.pad(images.float(), (3, 3, 3, 3), mode="replicate")
    for i in range(4):
        expected = padded[i, :, top[i] : top[i] + 10, left[i] : left[i] + images.shape[-1]]
        assert torch.equal(shifted[i].float(), expected)


@pytest.mark.parametrize("augmentation", [RandomCrop(7), RandomTranslate(13), RandomShift(3)])
def test_copies_are_in_the_memory_order_of_the_convolutions(augmentation: Augmentation) -> None:
    images = augmentation(numbered(), torch.Generator().manual_seed(0))
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("make", [lambda: RandomCrop(7), lambda: RandomShift(2)])
def test_compiled_they_draw_and_copy_the_same(make: Callable[[], Augmentation]) -> None:
    plain, compiled, images = make(), make(), numbered()
    compiled.compile("eager")  # traced, and run as it is
    a, b = (one(images, torch.Generator().manual_seed(0)) for one in (plain, compiled))
    assert torch.equal(a, b)
    assert b.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(copy.deepcopy(compiled)(images, torch.Generator().manual_seed(0)), a)
    pickle.dumps(compiled)  # workers get one


def test_impossible_sizes_are_refused_in_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"crop of 30 pixels .* larger than the frame of 20×20"):
        agent(augmentation=RandomCrop(30))
    with pytest.raises(ConfigError, match=r"canvas of 10 pixels .* smaller than the frame"):
        agent(augmentation=RandomTranslate(10))


def test_cutout_blackens_one_rectangle_and_nothing_else() -> None:
    images = numbered(200) // 2 + 1  # nothing is black
    cut = RandomCutout(2, 4)(images, torch.Generator().manual_seed(0))
    tops, sides = set(), set()
    for image, after in zip(images, cut, strict=True):
        ys, xs = (after[0] == 0).nonzero(as_tuple=True)
        top, left = int(ys.min()), int(xs.min())
        height, width = int(ys.max()) - top + 1, int(xs.max()) - left + 1
        expected = image.clone()
        for y in range(top, top + height):
            for x in range(left, left + width):
                expected[:, y, x] = 0  # in every frame
        assert torch.equal(after, expected)
        tops.add(top)
        sides |= {height, width}
    assert sides == {2, 3, 4}
    assert tops == set(range(9))  # of 10 rows; the smallest rectangle can begin in the ninth
    assert torch.equal(RandomCutout(2, 4).centre(images), images)
    assert torch.equal(RandomCutout(0, 0)(images), images)


@pytest.mark.parametrize(("smallest", "largest"), [(10, 29), (5, 4), (-1, 4)])
def test_wrong_cutouts(smallest: int, largest: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"cutout of {smallest} to {largest} pixels .* does not fit a frame of 20×20"
    ):
        agent(augmentation=RandomCutout(smallest, largest))
