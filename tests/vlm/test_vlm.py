"""The VLM as an actor, with the shipped weights on real frames."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from covr_lightning.envs import TASKS, DMControl, PointReach, Road
from covr_lightning.errors import ConfigError
from covr_lightning.vlm.engines.engine import Engine
from covr_lightning.vlm.pictures import side_by_side
from covr_lightning.vlm.prompts import Prompt, prompt_for
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


def test_the_agents_precision_is_not_the_vlms() -> None:
    """A test of the VLM alone runs in Lightning's autocast, where the run asked it outside."""
    answers, images = [], frames("cartpole-swingup", 64)
    for mixed in (False, True):
        vlm = VLM()
        vlm.load(DMControl("cartpole-swingup").spec)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            answers.append(vlm.answer(images))
        assert vlm.decoder.way == "prefix cache"
    assert answers[0] == answers[1]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gets_answers_of_its_size(task: str) -> None:
    vlm = VLM()
    vlm.load(DMControl(task).spec)
    actions, valid = vlm.propose(frames(task, 8))
    assert actions.shape == (8, DMControl(task).spec.action_dim)
    assert valid.float().mean() >= 0.5


def test_the_point_gets_answers_of_its_size_although_the_vlm_never_saw_it() -> None:
    vlm, env = VLM(), PointReach().make(0)
    vlm.load(env.env_spec)
    actions, valid = vlm.propose(torch.stack([env.reset()["pixels"][-3:] for _ in range(8)]))
    assert actions.shape == (8, 2)
    assert valid.all()


def test_it_may_be_shown_several_frames(untrained_vlm: Path) -> None:
    spec = DMControl("cartpole-swingup", size=40).spec
    vlm, one = VLM(str(untrained_vlm), frames=2), VLM(str(untrained_vlm))
    for each in (vlm, one):
        each.load(spec)
    assert vlm.prompt.system.endswith("The picture shows the last 2 moments side by side, the newest on the right.")
    assert one.prompt == prompt_for("cartpole-swingup")
    pixels = torch.randint(0, 256, (2, 9, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    actions, _ = vlm.propose(side_by_side(pixels, 2))
    assert actions.shape == (2, 1)
    own = replace(prompt_for("cartpole-swingup"), system="Two moments.")
    told = VLM(str(untrained_vlm), prompt=own, frames=2)
    told.load(spec)
    assert told.prompt == own
    with pytest.raises(ConfigError, match=r"vlm\.frames is 4, but an observation .* has 3 frames .* can be 1 to 3"):
        VLM(str(untrained_vlm), frames=4).load(spec)
    with pytest.raises(ConfigError, match=r"vlm\.frames is 0; it must be at least 1"):
        VLM(frames=0)


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


def test_begins_with_an_adapter_of_another_run(untrained_vlm: Path, tmp_path: Path) -> None:
    lora = LoRA(rank=2, alpha=4, targets=["q_proj"])
    trained = VLM(str(untrained_vlm), lora)
    trained.load(Road("highway").spec)
    trained.add_adapter()
    with torch.no_grad():
        for name, parameter in trained.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    trained.save_adapter(tmp_path / "adapter")

    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    begun, untouched = VLM(str(untrained_vlm), lora, adapter=str(tmp_path / "adapter")), VLM(str(untrained_vlm), lora)
    for vlm in (begun, untouched):
        vlm.load(Road("highway_a").spec)
    assert begun.round == 0
    logits = [v.model(**v.inputs.prompt_batch(images)).logits for v in (trained, begun, untouched)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])

    for wrong, message in (
        (
            VLM(str(untrained_vlm), LoRA(rank=3, alpha=4, targets=["q_proj"]), adapter=str(tmp_path / "adapter")),
            "rank 2",
        ),
        (VLM(str(untrained_vlm), lora, adapter=str(tmp_path)), "no adapter is"),
    ):
        with pytest.raises(ConfigError, match=message):
            wrong.load(Road("highway").spec)


@pytest.mark.parametrize("task", ["highway", "ghost_pedestrian"])
def test_driving_prompts_say_what_the_paper_s_say(task: str) -> None:
    prompt = prompt_for(Road(task).spec.task)
    assert prompt.action_size == 2
    assert "CARLA" in prompt.system
    assert "front camera" in prompt.system
    assert "[-1, 1]" in prompt.system
    assert prompt.user.endswith("action:[steer, throttle]")
    assert ("throttle should be above 0.5" in prompt.user) == (task == "highway")
    assert ("Pedestrians may suddenly cross" in prompt.user) == (task == "ghost_pedestrian")


class Says(Engine):
    """Gives what it is told to."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def open(self, vlm: VLM) -> None:
        pass

    def answers(self, frames: torch.Tensor) -> list[str | None]:
        return self.given

    def use(self, adapter: Path | None) -> None:
        pass


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["action:[0.10]"], "1 answers"),
        (["action:[0.10]", 0.5], "['action:[0.10]', 0.5]"),
        (torch.zeros(2, 1), "tensor("),
        (None, "None"),
    ],
)
def test_an_engine_of_ones_own_that_does_not_answer_each_frame(given: Any, told: str) -> None:
    vlm = VLM(engine=Says(given))
    vlm.load(DMControl("cartpole-swingup").spec)
    with pytest.raises(ConfigError, match=re.escape(f"Says.answers (vlm.engine) gave {told}")) as refused:
        vlm.propose(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert str(refused.value).endswith("for 2 frames; it must give a list with a text, or None, for each.")


def test_an_engine_of_ones_own_answers() -> None:
    vlm = VLM(engine=Says(["action:[0.10]", None, "left"]))
    vlm.load(DMControl("cartpole-swingup").spec)
    actions, valid, answered = vlm.ask(torch.zeros(3, 3, 64, 64, dtype=torch.uint8))
    assert actions[0].item() == pytest.approx(0.1)
    assert (valid.tolist(), answered.tolist()) == ([True, False, False], [True, False, True])


@pytest.mark.parametrize("shows", [" Answer action:[cart_force]", " Answer action: [ cart_force ]", ""])
def test_a_prompt_that_does_not_show_how_to_answer_is_told(shows: str, caplog: pytest.LogCaptureFixture) -> None:
    user = "Push the cart." + shows
    vlm = VLM(prompt=Prompt("", user, ("cart_force",)), engine=Says([]))
    with caplog.at_level(logging.WARNING, "covr_lightning"):
        vlm.load(DMControl("cartpole-swingup").spec)
    expected = (
        "The prompt (vlm.prompt) does not show the VLM how to answer, action:[cart_force]; an answer in other "
        "words is not used."
    )
    assert [record.getMessage() for record in caplog.records] == [expected] * (not shows)


@pytest.mark.parametrize("task", [*TASKS, "point-reach"])
def test_every_shipped_prompt_shows_how_to_answer(task: str, caplog: pytest.LogCaptureFixture) -> None:
    vlm = VLM(engine=Says([]))
    vlm.load(PointReach().spec if task == "point-reach" else DMControl(task).spec)
    for scenario in ("highway", "ghost_pedestrian"):
        VLM(engine=Says([])).load(Road(scenario).spec)
    assert not caplog.records
