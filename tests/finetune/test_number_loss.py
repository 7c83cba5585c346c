"""The loss on numbers' tokens against hand arithmetic, and inside the fine-tuning loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from covr_lightning.envs import DMControl
from covr_lightning.errors import ConfigError
from covr_lightning.finetune import FineTuneSettings, VLMFineTuner, ralw_loss
from covr_lightning.finetune.loss import IGNORED, weighted_nll
from covr_lightning.finetune.number_loss import NumberTokens
from covr_lightning.vlm.action_text import ActionText
from covr_lightning.vlm.vlm import VLM, LoRA


@pytest.fixture
def vlm(untrained_vlm: Path) -> VLM:
    model = VLM(str(untrained_vlm), LoRA(rank=8, alpha=16, dropout=0.0))
    model.load(DMControl("reacher-easy").spec)
    return model


class Digits:
    """Inputs whose tokens are single characters."""

    tokenizer: Digits

    def __init__(self) -> None:
        self.tokenizer = self

    def answer_ids(self, answer: str) -> list[int]:
        return [*answer.encode()]

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode()


def test_numbers_are_whole_values_or_digits(vlm: VLM) -> None:
    numbers = NumberTokens(vlm.inputs, vlm.codec)
    texts = [vlm.inputs.tokenizer.decode([token]) for token in numbers.ids.tolist()]
    assert texts == [f"{step / 100:.2f}" if step else "0.00" for step in range(-100, 101)]
    assert torch.equal(numbers.values, torch.tensor([float(text) for text in texts]))
    digits = NumberTokens(Digits(), ActionText([-1.0, 0.0], [1.0, 250.0]))  # type: ignore[arg-type]
    assert digits.ids.tolist() == [*b"0123456789"]
    assert digits.values.tolist() == [*range(10)]
    assert NumberTokens(Digits(), ActionText(0.0, 0.0)).values.tolist() == [0.0]  # type: ignore[arg-type]


def test_expected_distance_by_hand() -> None:
    numbers = NumberTokens(Digits(), ActionText(-1.0, 1.0))  # type: ignore[arg-type]
    logits = torch.full((3, 128), -30.0)
    logits[:, ord("2")], logits[:, ord("9")] = 0.0, torch.tensor(3.0).log()  # 1/4 and 3/4 of the digits'
    logits[:, ord("x")] = 50.0  # no number: of no account
    # To "3": 1/4·1 + 3/4·6; to "2": 3/4·7; "," is no number.
    distances = numbers.expected_distance(logits, torch.tensor([ord("3"), ord("2"), ord(",")]))
    torch.testing.assert_close(distances, torch.tensor([4.75, 5.25, 0.0]))


def test_the_fine_tuning_loss_has_it_beside_eq_6(vlm: VLM) -> None:
    images = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    actions = torch.tensor([[0.1, -0.98], [0.0, 0.5], [-1.0, 1.0]])
    weights = torch.tensor([0.0, 1.0, 0.25])
    tuner = VLMFineTuner(vlm, FineTuneSettings(number_loss=12.0))
    loss = tuner.loss(images, actions, weights)

    inputs, labels = vlm.inputs.training_batch(images, [vlm.codec.encode(action) for action in actions])
    logits = tuner.model(**inputs, use_cache=False).logits
    first = vlm.inputs.answer_ids("-1.00")[0]
    values = torch.arange(-100, 101) / 100
    total = torch.zeros(())
    for row, weight in enumerate(weights):
        value = iter(actions[row].tolist())
        for place, token in enumerate(labels[row].tolist()):
            if first <= token < first + 201:
                shares = logits[row, place - 1, first : first + 201].softmax(-1)
                total = total + weight * (shares * (values - next(value)).abs()).sum()
        assert next(value, None) is None  # as many values as the action has
    expected = ralw_loss(logits, labels, weights) + 12.0 * total / (labels != IGNORED).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    shares = [
        VLMFineTuner(vlm, FineTuneSettings(number_loss=12.0)).loss(images, actions, weights, rank, 2)
        for rank in range(2)
    ]
    torch.testing.assert_close(sum(shares) / 2, loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("number_loss", "answer"), [(0.0, -1.0), (100.0, 0.1)])
def test_noisy_labels_are_answered_by_their_median(vlm: VLM, number_loss: float, answer: float) -> None:
    # 40 labels of -1.00 and one each of 0.01 to 0.60: their mode is -1, their median lies between 0.10 and 0.11.
    numbers = NumberTokens(vlm.inputs, vlm.codec)
    labels = torch.cat([torch.full((40,), -1.0), torch.arange(1, 61) / 100])
    targets = numbers.ids[((labels + 1) * 100).round().long()]
    logits = torch.zeros(int(numbers.ids.max()) + 1, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.05)
    for _ in range(500):
        rows = logits.expand(len(labels), -1)
        loss = weighted_nll(rows, targets, torch.ones(len(labels)))
        loss = (loss + number_loss * numbers.expected_distance(rows, targets).sum()) / len(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    said = numbers.values[logits[numbers.ids].argmax()].item()
    assert said == pytest.approx(answer, abs=0.03)


@pytest.mark.parametrize("number_loss", [-1.0, float("inf"), float("nan")])
def test_what_cannot_be_is_refused(number_loss: float) -> None:
    with pytest.raises(ConfigError, match=r"settings.number_loss is .*; it must be 0 or more, and a number"):
        FineTuneSettings(number_loss=number_loss)
