"""The VLM acting alone: asked every n-th step, held in between, idle when it cannot be understood."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from covr_lightning.callbacks.vlm_acts import HeldAnswers

from covr_lightning.cli import main
from covr_lightning.vlm.answers import Answers
from covr_lightning.vlm.vlm import Proposals


class Counting:
    """Answers 0.1, 0.2, …; the second answer cannot be parsed, the fourth never comes. Remembers what it was shown."""

    def __init__(self) -> None:
        self.shown: list[torch.Tensor] = []
        self.frames = 1

    def ask(self, frames: torch.Tensor) -> Proposals:
        self.shown.append(frames)
        n = len(self.shown)
        return Proposals(torch.full((1, 2), n / 10), torch.tensor([n not in (2, 4)]), torch.tensor([n != 4]))


def test_answers_are_held_and_unparsable_ones_do_nothing() -> None:
    vlm, counts = Counting(), Answers()
    policy = HeldAnswers(vlm, idle_action=(0.0, -1.0), hold_agent_steps=3, counts=counts)
    pixels = torch.arange(9, dtype=torch.uint8)[None, :, None, None].expand(1, 9, 4, 4)
    actions = torch.cat([policy(pixels, previous_action=None if t == 0 else pixels) for t in range(10)])
    assert actions[:, 0].tolist() == pytest.approx([0.1] * 3 + [0.0] * 3 + [0.3] * 3 + [0.0])
    assert actions[:, 1].tolist() == pytest.approx([0.1] * 3 + [-1.0] * 3 + [0.3] * 3 + [-1.0])
    assert counts == Answers(asked=4, unparsable=1, unanswered=1)
    assert vlm.shown[0].shape == (1, 3, 4, 4)
    assert vlm.shown[0][0, :, 0, 0].tolist() == [6, 7, 8]  # the newest frame
    # A new episode, or the same again, is not driven by an answer to the one before.
    assert float(policy(pixels, previous_action=None)[0, 0]) == pytest.approx(0.5)
    vlm.frames = 2
    HeldAnswers(vlm, idle_action=(0.0, 0.0), hold_agent_steps=3, counts=counts)(pixels)
    assert vlm.shown[-1].shape == (1, 3, 4, 8)
    assert vlm.shown[-1][0, :, 0, ::4].tolist() == [[3, 6], [4, 7], [5, 8]]


def test_covr_test_with_the_vlm_alone(untrained_vlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"data.env.action_repeat": 100, "data.eval_episodes": 2, "data.label_every_agent_steps": 4}
    command = ["--config", "quickstart.yaml", "--vlm.path", str(untrained_vlm), "--actor", "vlm"]
    command += [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    command += ["--runs_dir", str(tmp_path), "--trainer.enable_progress_bar", "false"]
    assert main(["test", *command]) == 0
    printed = capsys.readouterr().out
    assert "test/return" in printed
    # 10 agent steps an episode, asked at steps 0, 4 and 8, two episodes.
    assert "6 frames asked" in printed
    assert main(["validate", *command]) == 0  # plays the same episodes, where a policy's test has its own
    told = (re.search(rf"{name}/return\W+([0-9.]+)", text) for name, text in
            (("test", printed), ("eval", capsys.readouterr().out)))  # fmt: skip
    of_test, of_validate = (float(found[1]) for found in told if found)
    assert of_test == of_validate > 0
    assert main(["fit", *command]) == 2
    assert "it can be 'policy'" in capsys.readouterr().err
