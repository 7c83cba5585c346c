"""A policy in a VLM's place answers as it acts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.known_task import PolicyVLM
from covr_lightning.errors import ConfigError
from covr_lightning.vlm.action_text import ActionText
from covr_lightning.vlm.pictures import side_by_side

SPEC = SimpleNamespace(frame_height=6, frame_width=8)


class OneNumber(nn.Module):
    """Tells all pixels of a stack apart."""

    def forward(self, pixels: Tensor) -> Tensor:
        flat = pixels.flatten(1).float()
        return torch.sin(flat @ torch.arange(flat.shape[1]).float() / 1000)[:, None]


def vlm(frames: int) -> SimpleNamespace:
    return SimpleNamespace(codec=ActionText((-1.0,), (1.0,)), frames=frames, spec=SPEC)


@pytest.fixture
def policy(tmp_path: Path) -> str:
    batch = torch.export.Dim("batch")
    example = torch.zeros(2, 9, 6, 8, dtype=torch.uint8)
    torch.export.save(
        torch.export.export(OneNumber(), (example,), dynamic_shapes={"pixels": {0: batch}}), tmp_path / "policy.pt2"
    )
    return str(tmp_path / "policy.pt2")


def test_it_is_shown_the_stack_that_the_policy_was_shown(policy: str) -> None:
    engine, generator = PolicyVLM(policy), torch.Generator().manual_seed(0)
    engine.open(vlm(3))
    for rows in (1, 5):
        stacks = torch.randint(0, 256, (rows, 9, 6, 8), dtype=torch.uint8, generator=generator)
        expected = [f"action:[{action:.2f}]" for action in OneNumber()(stacks)[:, 0].tolist()]
        with torch.autocast("cpu", torch.bfloat16):  # as a test in bf16-mixed asks
            assert engine.answers(side_by_side(stacks, 3)) == expected


def test_other_frames_and_a_missing_policy_are_refused(policy: str) -> None:
    with pytest.raises(ConfigError, match=r"takes no frames of \(6, 6, 8\)"):
        PolicyVLM(policy).open(vlm(2))
    with pytest.raises(ConfigError, match="no such file"):
        PolicyVLM(policy + "x").open(vlm(3))
