"""The ways that benchmarks/fine_tuning.py compares do the same work; its table has what it measured."""

from __future__ import annotations

import pytest
import torch

from benchmarks import fine_tuning
from benchmarks.qwen import driving_spec, make_model, make_processor, make_vlm, shrunk, training_rows
from covr_lightning.finetune.module import FineTuneSettings, VLMFineTuner
from covr_lightning.vlm.adapters import CARLA_LORA_TARGETS, LoRA

CPU = torch.device("cpu")


def tuner(label_smoothing: float = 0.1) -> VLMFineTuner:
    """A narrow Qwen2.5-VL whose adapter is not zero, so that all of it has a gradient; without dropout."""
    processor = make_processor("highway", tokens=1000)
    model = make_model(shrunk(64, 2, 64, 1, vocabulary=1024), processor, torch.float32, CPU)
    lora = LoRA(rank=4, alpha=8, dropout=0.0, targets=CARLA_LORA_TARGETS)
    made = VLMFineTuner(
        make_vlm(model, processor, driving_spec(), lora), FineTuneSettings(label_smoothing=label_smoothing)
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    made.prepare()
    return made


def loss_and_gradients(made: VLMFineTuner, loss: fine_tuning.Loss, batch: tuple) -> tuple[torch.Tensor, list]:
    made.zero_grad()
    value = loss(made, batch)
    value.backward()
    return value.detach(), [p.grad.clone() for p in made.parameters() if p.requires_grad]


def test_logits_at_label_positions_give_the_loss_and_gradients_of_all() -> None:
    made, batch = tuner(), training_rows(driving_spec(), 3)
    loss, gradients = loss_and_gradients(made, fine_tuning.at_labels, batch)
    full_loss, full_gradients = loss_and_gradients(made, fine_tuning.everywhere, batch)
    torch.testing.assert_close(loss, full_loss)
    assert all(gradient.any() for gradient in gradients)
    for gradient, full in zip(gradients, full_gradients, strict=True):
        torch.testing.assert_close(gradient, full, rtol=1e-3, atol=1e-6)


def test_the_library_s_own_loss_is_the_same_without_weights_and_smoothing() -> None:
    frames, actions, _ = training_rows(driving_spec(), 3)
    made, batch = tuner(label_smoothing=0.0), (frames, actions, torch.ones(3))
    loss, gradients = loss_and_gradients(made, fine_tuning.at_labels, batch)
    library_loss, library_gradients = loss_and_gradients(made, fine_tuning.library, batch)
    torch.testing.assert_close(loss, library_loss)
    for gradient, other in zip(gradients, library_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-6)


def test_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    made = tuner()
    before = [p.detach().clone() for p in made.parameters() if p.requires_grad]
    medians = fine_tuning.measure_size("tiny", made, batch_size=2, turns=2)
    assert list(medians) == ["labels", "everywhere", "library"]
    assert all(0 < seconds < 60 for seconds in medians.values())
    assert any(
        not torch.equal(p, b) for p, b in zip([p for p in made.parameters() if p.requires_grad], before, strict=True)
    )
    heading, *_, last = capsys.readouterr().out.strip().splitlines()
    assert "language 2 × 64, vision 1 × 64" in heading
    assert "batch 2" in heading
    assert "vocabulary 1024" in heading
    assert f"| library | {medians['library']:.2f} (" in last
