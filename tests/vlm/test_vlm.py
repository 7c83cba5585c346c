"""The VLM as an actor, with the shipped weights on real frames."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from covr_lightning.envs import TASKS, DMControl
from covr_lightning.errors import ConfigError
from covr_lightning.vlm.vlm import VLM, LoRA


def frames(task: str, n: int) -> torch.Tensor:
    rollout = DMControl(task, size=64, rendering="fast").make(0).rollout(n, break_when_any_done=False)
    return rollout["pixels"][:, -3:]


@pytest.mark.parametrize("task", ["cartpole-swingup", "reacher-easy"])
def test_labels_of_a_batch_are_those_of_single_frames(task: str) -> None:
    vlm = VLM()
    vlm.load(DMControl(task).spec)
    images = frames(task, 12)
    actions, valid = vlm.propose(images)
    assert valid.any()
    assert actions.abs().max() <= 1
    for i, image in enumerate(images):
        alone, ok = vlm.propose(image[None])
        assert bool(ok[0]) == bool(valid[i])
        assert torch.equal(alone[0], actions[i])


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gets_answers_of_its_size(task: str) -> None:
    vlm = VLM()
    vlm.load(DMControl(task).spec)
    actions, valid = vlm.propose(frames(task, 8))
    assert actions.shape == (8, DMControl(task).spec.action_dim)
    assert valid.float().mean() >= 0.5


def test_targets_by_regular_expression_and_wrong_targets(untrained_vlm: Path) -> None:
    language = VLM(str(untrained_vlm), LoRA(rank=2, targets=r".*text_model.*(q|v)_proj"))
    language.load(DMControl().spec)
    language.add_adapter()
    adapted = [name for name, p in language.model.named_parameters() if p.requires_grad]
    assert adapted
    assert all("text_model" in name for name in adapted)
    wrong = VLM(str(untrained_vlm), LoRA(targets=["no_such_proj"]))
    wrong.load(DMControl().spec)
    with pytest.raises(ConfigError, match=r"vlm\.lora\.targets is \['no_such_proj'\]"):
        wrong.add_adapter()
