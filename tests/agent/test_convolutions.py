"""An encoder's convolutions in few passes on a CPU, against the same layers one after the other."""

from __future__ import annotations

import pytest
import torch

from covr_lightning.agent import ConvTrunk, convolutions
from covr_lightning.agent.convolutions import has_convolution_with_relu, part_size

PART = 8  # images of the size here
SIZES = [1, 5, PART, 2 * PART + 3]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "CPU_PIXELS", PART * 20 * 22)


def trunk(filters: int = 8, strides: tuple[int, ...] = (2, 1, 1)) -> ConvTrunk:
    torch.manual_seed(0)
    made = ConvTrunk()
    made.build(9, (20, 22), filters, strides)
    for p in made.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return made


def images(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 9, 20, 22), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def one_after_the_other(made: ConvTrunk, pictures: torch.Tensor) -> torch.Tensor:
    """Layer by layer, flattened as (row, column, filter)."""
    maps = made.layers(pictures.float() / 255)
    places = [maps[:, :, row, column] for row in range(maps.shape[2]) for column in range(maps.shape[3])]
    return torch.cat(places, dim=1)


def features_and_gradients(made: ConvTrunk, features: torch.Tensor) -> list[torch.Tensor]:
    """What came out, and the gradients of a sum of it with fixed factors."""
    factors = torch.randn(features.shape, generator=torch.Generator().manual_seed(9))
    made.zero_grad()
    (features.float() * factors).sum().backward()
    return [features.detach(), *(p.grad.clone() for p in made.parameters() if p.grad is not None)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of every call of oneDNN's convolution with its ReLU."""
    made: list[int] = []
    forward = convolutions._convolve

    def counted(x: torch.Tensor, layer: convolutions.Convolution) -> torch.Tensor:
        made.append(len(x))
        return forward(x, layer)

    monkeypatch.setattr(convolutions, "_convolve", counted)
    return made


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("strides", [(2,), (2, 1, 1), (1, 3)])
def test_features_and_gradients_are_those_of_the_layers(n: int, strides: tuple[int, ...], calls: list[int]) -> None:
    made = trunk(strides=strides)
    ours = features_and_gradients(made, made(images(n)))
    theirs = features_and_gradients(made, one_after_the_other(made, images(n)))
    assert len(ours) == len(theirs) == 1 + 2 * len(strides)
    for value, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    # Nothing if the constraints' PyTorch no longer has the call.
    parts = [len(part) for part in images(n).split(part_size(images(n)))]
    assert calls == [size for size in parts for _ in strides]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_features_are_those_of_pytorchs_own_calls(n: int, bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last digit on some CPUs; on others the two calls sum in another order."""
    made = trunk(filters=32)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16, cache_enabled=False):
        with_gradients = made(images(n))
        with torch.no_grad():
            without = made(images(n))
        monkeypatch.setattr(convolutions, "has_convolution_with_relu", lambda _: False)
        own = made(images(n))
    assert own.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    assert torch.equal(with_gradients, without)
    digits = torch.finfo(own.dtype).eps
    torch.testing.assert_close(without, own, rtol=2 * digits, atol=8 * digits)


def test_in_bfloat16_gradients_are_as_near_to_float32s_as_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made, pictures = trunk(filters=32), images(SIZES[-1])
    exact = features_and_gradients(made, made(pictures))[1:]
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        ours = features_and_gradients(made, made(pictures))[1:]
        monkeypatch.setattr(convolutions, "has_convolution_with_relu", lambda _: False)
        own = features_and_gradients(made, made(pictures))[1:]
    for value, other, expected in zip(ours, own, exact, strict=True):
        assert value.dtype == torch.float32
        error, others = ((v - expected).norm() / expected.norm() for v in (value, other))
        assert 0 < error < 1.1 * others


def test_parts_are_of_like_size() -> None:
    sizes = {n: [len(part) for part in images(n).split(part_size(images(n)))] for n in (1, 11, 12, 16, 19, 29)}
    assert sizes == {1: [1], 11: [11], 12: [6, 6], 16: [8, 8], 19: [10, 9], 29: [8, 8, 8, 5]}


def test_gradients_of_parts_are_summed_in_float32() -> None:
    made, layers = trunk(), 3
    pictures = images(2 * PART)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        both = features_and_gradients(made, made(pictures))[1:]
        factors = torch.randn(len(pictures), made.features, generator=torch.Generator().manual_seed(9))
        sums = [torch.zeros_like(p) for p in made.parameters()]
        for part, weights in zip(pictures.split(PART), factors.split(PART), strict=True):
            made.zero_grad()
            (made(part).float() * weights).sum().backward()
            sums = [total + p.grad for total, p in zip(sums, made.parameters(), strict=True) if p.grad is not None]
    assert len(both) == 2 * layers
    for value, expected in zip(both, sums, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_frozen_layers_get_no_gradient_and_keep_nothing() -> None:
    made = trunk()
    made.requires_grad_(False)
    assert not made(images(3)).requires_grad
    made.layers[2].requires_grad_(True)
    made(images(3)).sum().backward()
    assert [p.grad is not None for p in made.parameters()] == [False, False, True, True, False, False]


@pytest.mark.parametrize("n", SIZES)
def test_where_the_call_is_missing_pytorchs_own_are_taken(
    n: int, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    made, pictures = trunk(), images(n)
    weight = made.layers[0].weight
    assert has_convolution_with_relu(weight)
    assert not has_convolution_with_relu(weight.double())
    with torch.autocast("cpu", torch.float16):
        assert not has_convolution_with_relu(weight)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    assert not has_convolution_with_relu(weight)
    ours = features_and_gradients(made, made(pictures))
    theirs = features_and_gradients(made, one_after_the_other(made, pictures))
    for value, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    assert not calls


def test_no_images_have_no_features() -> None:
    made = trunk()
    assert made(images(1)[:0]).shape == (0, made.features)
    made(images(1)[:0]).sum().backward()
    assert not any(p.grad.any() for p in made.parameters() if p.grad is not None)
