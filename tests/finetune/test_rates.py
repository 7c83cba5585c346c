"""The learning rate over a round's steps by hand, and which of the steps count."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from covr_lightning.finetune.module import FineTuneSettings, VLMFineTuner


@pytest.mark.parametrize(
    ("warmup_fraction", "expected"),
    [
        # Half a cosine over 6 steps: (1 + cos(π·k/6)) / 2.
        (0.0, [1.0, 0.5 + math.sqrt(3) / 4, 0.75, 0.5, 0.25, 0.5 - math.sqrt(3) / 4]),
        # Two steps of warm-up, to a third and two thirds, then half a cosine over the 4 that are left.
        (0.34, [1 / 3, 2 / 3, 1.0, 0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4]),
    ],
)
def test_the_rate_falls_by_half_a_cosine(warmup_fraction: float, expected: list[float]) -> None:
    settings = FineTuneSettings(lr=0.2, warmup_fraction=warmup_fraction)
    of_six_steps = SimpleNamespace(
        model=nn.Linear(2, 1), settings=settings, trainer=SimpleNamespace(estimated_stepping_batches=6)
    )
    made = VLMFineTuner.configure_optimizers(of_six_steps)  # type: ignore[arg-type]
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert made["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.2 * rate for rate in expected])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_a_step_after_one_that_counted_is_judged_anew() -> None:
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(layer.parameters())
    tuner = SimpleNamespace(is_sharded=False, _has_gradient=True)
    for counted in (True, False):
        layer(torch.ones(1, 2)).sum().backward()
        VLMFineTuner.on_before_optimizer_step(tuner, optimizer)  # type: ignore[arg-type]
        assert all((p.grad is not None) == counted for p in layer.parameters())
