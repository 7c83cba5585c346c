"""Action text: round trips, strict parsing, and nothing a string can do makes it raise."""

import random

import numpy as np
import pytest
import torch

from covr_lightning.vlm import ActionText


def unit(size: int) -> ActionText:
    return ActionText([-1.0] * size, [1.0] * size)


@pytest.mark.parametrize("size", range(1, 13))
def test_round_trip_is_exact_to_two_decimals(size: int) -> None:
    codec = unit(size)
    generator = torch.Generator().manual_seed(size)
    for action in torch.rand(200, size, generator=generator) * 2 - 1:
        text = codec.encode(action)
        decoded, valid = codec.decode(text)
        assert valid
        assert decoded.shape == (size,)
        assert decoded.dtype == torch.float32
        # Half a step of 0.01, and float32's rounding.
        assert (decoded - action).abs().max() <= 0.005 + 1e-6
        assert codec.encode(decoded) == text


def test_encode_by_hand() -> None:
    codec = unit(2)
    assert codec.encode([0.02, -0.98]) == "action:[0.02, -0.98]"
    assert codec.encode(np.array([1.7, -1.7])) == "action:[1.00, -1.00]"
    assert codec.encode(torch.tensor([-0.004, 0.004])) == "action:[0.00, 0.00]"
    assert ActionText(-1.0, 1.0).encode(0.5) == "action:[0.50]"
    assert ActionText(-200.0, 10.0).encode(-123.456) == "action:[-123.46]"


def test_encode_rejects_wrong_size_and_not_finite() -> None:
    with pytest.raises(ValueError, match="3 values, expected 2"):
        unit(2).encode([0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="finite"):
        unit(1).encode(float("nan"))


def test_bounds_are_checked() -> None:
    with pytest.raises(ValueError, match="same length"):
        ActionText([-1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="low <= high"):
        ActionText([1.0], [-1.0])
    with pytest.raises(ValueError, match="finite"):
        ActionText([-float("inf")], [1.0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("action:[0.02, -0.98]", (0.02, -0.98)),
        ("  action:[0.02,-0.98]\n", (0.02, -0.98)),
        ("action: [ 1 , -.5 ]", (1.0, -0.5)),
        ("action:[7, -7.25]", (1.0, -1.0)),
        ("action:[1., -0]", (1.0, 0.0)),
    ],
)
def test_valid_texts(text: str, expected: tuple[float, float]) -> None:
    action, valid = unit(2).decode(text)
    assert valid
    torch.testing.assert_close(action, torch.tensor(expected))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "action:",
        "action:[]",
        "action:[0.1]",
        "action:[0.1, 0.2, 0.3]",
        "action:[0.1, 0.2",
        "action:[0.1, 0.2]]",
        "action:[0.1, 0.2] done",
        "I think action:[0.1, 0.2]",
        "Action:[0.1, 0.2]",
        "action:[0.1 0.2]",
        "action:[0.1,, 0.2]",
        "action:[0.1, 1e-1]",
        "action:[0.1, nan]",
        "action:[0.1, inf]",
        "action:[0.1, -inf]",
        "action:[0.1, --0.2]",
        "action:[0.1, +0.2]",
        "action:[0.1, .]",
        "action:[0.1, -]",
        "action:[0.1, 0.2.3]",
        "action:[0.1, 0_2]",
        "action:[0.1, 0x2]",
        "action:[0.1, \u0660.\u0661]",  # Arabic-Indic digits, which float() would take
        "action:[0.1, \uff11]",
        "action:[0.1, " + "9" * 5000 + "]",
        "action:[0.1,\t0.2]",
        "\x00action:[0.1, 0.2]",
    ],
)
def test_invalid_texts_are_masked(text: str) -> None:
    action, valid = unit(2).decode(text)
    assert not valid
    assert action.tolist() == [0.0, 0.0]


def test_invalid_falls_back_to_zero_within_bounds() -> None:
    action, valid = ActionText([0.5, -2.0], [1.0, -1.0]).decode("no")
    assert not valid
    assert action.tolist() == [0.5, -1.0]


def _adversarial(rng: random.Random) -> str:
    pieces = [
        "action:", "[", "]", ", ", ",", "-", ".", "+", " ", "\n", "e", "nan", "inf", "1e309", "0.02", "-0.98", "1.00",
        "99999999999999", "\u0663", "\u2212", "\ud800", "\x00", "\U0001f600", "{", "action:[0.1, 0.2]",
    ]  # fmt: skip
    kind = rng.random()
    if kind < 0.4:
        return "".join(rng.choice(pieces) for _ in range(rng.randrange(12)))
    if kind < 0.6:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(20)))
    text = list(f"action:[{rng.uniform(-9, 9):.{rng.randrange(5)}f}, {rng.gauss(0, 1):.2f}]")
    for _ in range(rng.randrange(4)):
        text[rng.randrange(len(text))] = rng.choice(pieces)
    return "".join(text)


def test_100_000_strings_parse_to_bounds_or_masked() -> None:
    rng = random.Random(0)
    codec = ActionText([-1.0, 0.0], [1.0, 0.5])
    valid_count = 0
    for _ in range(100_000):
        action, valid = codec.decode(_adversarial(rng))
        valid_count += valid
        first, second = action.tolist()
        assert -1.0 <= first <= 1.0
        assert 0.0 <= second <= 0.5
        assert valid or (first, second) == (0.0, 0.0)
    assert 5_000 < valid_count < 95_000
