"""What a run tells its sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchrl.data import TensorDictReplayBuffer

from covr_lightning.agent import SACModule
from covr_lightning.data import EmphasizingRecentSampler
from tests.short_runs import fit

#: No VLM, 20 agent steps of warm-up, 60 in all, 40 environment steps each, an update each from the 20th on.
SHORT = ("--data.max_env_steps", "2400", "--model.prior", "covr_lightning.agent.NoPrior", "--trainer.callbacks", "null")


def test_how_far_the_run_has_come(untrained_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress: list[float] = []
    rows: set[float] = set()
    sample = EmphasizingRecentSampler.sample

    def noting(sampler: EmphasizingRecentSampler, *arguments: Any) -> Any:
        progress.append(sampler.progress)
        rows.add(sampler.run_rows)
        return sample(sampler, *arguments)

    monkeypatch.setattr(EmphasizingRecentSampler, "sample", noting)
    assert fit(tmp_path, untrained_vlm, *SHORT, "--data.sampler", "EmphasizingRecentSampler") == 0
    assert progress == pytest.approx([agent_step / 60 for agent_step in range(20, 61)])
    assert rows == {60}


def test_the_td_errors_of_its_rows(untrained_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updated: list[tuple[torch.Tensor, torch.Tensor]] = []
    drawn: list[torch.Tensor] = []
    step, update = SACModule.training_step, TensorDictReplayBuffer.update_priority

    def training_step(module: SACModule, batch: Any, batch_idx: int = 0) -> None:
        if not batch.is_empty():
            drawn.append(batch["index"].flatten().clone())
        step(module, batch, batch_idx)

    def update_priority(replay: Any, index: torch.Tensor, priority: torch.Tensor) -> None:
        updated.append((index.flatten().clone(), priority.clone()))
        update(replay, index, priority)

    monkeypatch.setattr(SACModule, "training_step", training_step)
    monkeypatch.setattr(TensorDictReplayBuffer, "update_priority", update_priority)
    assert fit(tmp_path, untrained_vlm, *SHORT, "--data.sampler", "ProportionalSampler") == 0
    assert len(drawn) == len(updated) == 41
    for rows, (index, errors) in zip(drawn, updated, strict=True):
        assert torch.equal(rows, index)
        assert errors.shape == (8,)
        assert (errors > 0).all()
