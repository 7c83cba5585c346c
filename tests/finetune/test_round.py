"""The second LightningModule and a whole round, on the embedded architecture with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from tensordict import TensorDict

from covr_lightning.agent import SkilledPrior
from covr_lightning.errors import ConfigError
from covr_lightning.finetune import EDDF, RALW, KeepAll, UniformWeight, ralw_loss
from covr_lightning.finetune.module import FineTuneSettings, VLMFineTuner
from covr_lightning.finetune.round import RoundReport, ask_all, fine_tune_round, proposal_error
from covr_lightning.finetune.training import train_adapter
from covr_lightning.random_state import derived_seed, own_randomness, seed_of
from covr_lightning.vlm.vlm import VLM, LoRA, Proposals
from tests.finetune.small_rounds import CPU, REACHER, SETTINGS, frames, rows, vlm


def test_each_process_of_a_round_draws_its_own_dropout_by_the_round(untrained_vlm: Path) -> None:
    model = vlm(untrained_vlm)
    seeds = set()
    for of_run, round_, rank in ((0, 1, 0), (0, 1, 1), (0, 2, 0), (5, 1, 0), (0, 1, 0)):
        model.round = round_
        tuner = VLMFineTuner(model, FineTuneSettings(seed=of_run))
        tuner._trainer = SimpleNamespace(world_size=2, global_rank=rank)
        torch.manual_seed(0)  # as the Trainer of several processes does, whatever the round
        tuner.on_fit_start()
        seeds.add(torch.initial_seed())
    assert len(seeds) == 4
    others = {of(run, n) for of in (derived_seed, seed_of) for run in (0, 5) for n in range(5)}
    assert not seeds & {0, *others}


def test_loss_equals_eq_6_on_full_logits(untrained_vlm: Path) -> None:
    tuner = VLMFineTuner(vlm(untrained_vlm), FineTuneSettings(label_smoothing=0.3))
    images = frames(4)
    # One answer holds "-0.98" and one "0.98": the token counts may differ, so that padding is exercised too.
    actions = torch.tensor([[0.1, -0.98], [0.0, 0.5], [-1.0, 1.0], [0.33, 0.0]])
    weights = torch.tensor([0.0, 1.0, 0.25, 0.0])
    loss = tuner.loss(images, actions, weights)
    answers = [tuner.vlm.codec.encode(a) for a in actions]
    inputs, labels = tuner.vlm.inputs.training_batch(images, answers)
    logits = tuner.model(**inputs, use_cache=False).logits
    torch.testing.assert_close(loss, ralw_loss(logits, labels, weights, 0.3), rtol=1e-4, atol=1e-5)


def test_a_batch_of_weight_0_needs_no_forward_pass(untrained_vlm: Path) -> None:
    tuner = VLMFineTuner(vlm(untrained_vlm), FineTuneSettings())
    tuner.model.forward = None  # type: ignore[assignment]
    loss = tuner.loss(frames(2), torch.zeros(2, 2), torch.zeros(2))
    assert loss.item() == 0.0
    loss.backward()  # to gradients of 0
    gradients = [p.grad for p in tuner.model.parameters() if p.grad is not None]
    assert gradients
    assert all(not gradient.any() for gradient in gradients)


def test_a_loss_scaler_steps_over_batches_of_weight_0(untrained_vlm: Path) -> None:
    # float16 has a scaler, which asserts that there are gradients. On a CPU it takes bfloat16's arithmetic.
    model = vlm(untrained_vlm)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    weights = torch.zeros(32)
    weights[0] = 1.0
    trained = frames(32), torch.zeros(32, 2), weights
    losses, failures = train_adapter(
        model, *trained, replace(SETTINGS, epochs=1, batch_size=4, accumulate=1), {**CPU, "plugins": [precision]}
    )
    assert failures == []
    assert sum(loss > 0 for loss in losses) == 1
    assert len(losses) == 8


def test_labelling_in_batches_equals_frame_by_frame(untrained_vlm: Path) -> None:
    model, images = vlm(untrained_vlm), frames(6)
    assert model.answer(images) == [model.answer(image[None])[0] for image in images]
    together, valid = model.propose(images)
    for i, image in enumerate(images):
        alone, ok = model.propose(image[None])
        assert torch.equal(alone[0], together[i])
        assert bool(ok[0]) == bool(valid[i])


def test_a_round_teaches_the_vlm_and_leaves_the_random_state_alone(untrained_vlm: Path, tmp_path: Path) -> None:
    model = vlm(untrained_vlm)
    before = proposal_error(ask_all(model, frames(4)), torch.tensor([0.5, -0.5]).expand(4, 2))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    report = RoundReport(1, 1000, 20)
    fine_tune_round(
        report, model, rows(20), torch.arange(20.0), 0.0, KeepAll(), UniformWeight(), SETTINGS, CPU
    )  # fmt: skip
    assert torch.equal(torch.rand(3), expected)
    assert (report.kept, report.trained, report.held_out) == (20, 16, 4)
    assert before[1] == report.unparsable_before == 1.0  # random weights cannot answer
    assert report.unparsable_after == 0.0
    assert report.error_after < 0.05
    assert report.error_constant == pytest.approx(0.0)
    assert model.round == 1
    assert report.losses[-1] < report.losses[0]

    # The adapter survives a save; switched off, the base answers as before.
    model.save_adapter(tmp_path / "adapter")
    model.save_adapter(tmp_path / "adapter")  # a resumed run may do a round again
    other = vlm(untrained_vlm)
    other.load_adapter(tmp_path / "adapter", 1)
    assert other.answer(frames(3)) == model.answer(frames(3))
    with model.model.disable_adapter():
        assert model.answer(frames(3)) == vlm(untrained_vlm).answer(frames(3))
    assert {p.name for p in (tmp_path / "adapter").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}


@pytest.mark.parametrize("shown", [True, False])
def test_a_round_shows_how_far_it_has_come(
    untrained_vlm: Path, shown: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("covr_lightning.progress.SECONDS_IN_A_LOG", 0.0)
    model, settings = vlm(untrained_vlm), replace(SETTINGS, epochs=3, batch_size=4, accumulate=2)
    capsys.readouterr()  # transformers shows how it loads weights
    report = RoundReport(1, 1000, 20)
    fine_tune_round(
        report, model, rows(20), torch.arange(20.0), 0.0, KeepAll(), UniformWeight(), settings,
        CPU | {"enable_progress_bar": shown}, ask_at_once=3,
    )  # fmt: skip
    said = capsys.readouterr().err.split("\r")
    if not shown:
        assert said == [""]
        return
    for when in ("before", "after"):
        lines = [line for line in said if line.startswith(f"asking the VLM {when} fine-tuning: ")]
        assert ["0/4" in lines[0], "3/4" in lines[1], "4/4" in lines[2]] == [True] * 3
    # 16 rows in batches of 4, two of them to a step, three times over.
    steps = [line for line in said if line.startswith("fine-tuning the VLM: ")]
    assert [f"{n}/6" in line for n, line in zip((0, 1, 2, 3, 4, 5, 6), steps, strict=True)] == [True] * 7
    assert f"loss={report.losses[-1]:.3f}" in steps[-1]


@pytest.mark.parametrize("adapter", ["continue", "new"])
def test_what_a_round_s_adapter_begins_with(untrained_vlm: Path, adapter: Literal["continue", "new"]) -> None:
    # All rows are one batch, so a round's first loss is that of the weights it begins with.
    settings = FineTuneSettings(
        epochs=4, batch_size=20, accumulate=1, lr=3e-3, held_out=0.0, gradient_checkpointing=False, adapter=adapter
    )
    model = vlm(untrained_vlm)
    reports = [RoundReport(number, 1000 * number, 20) for number in (1, 2)]
    for report in reports:
        fine_tune_round(
            report, model, rows(20), torch.arange(20.0), 0.0, KeepAll(), UniformWeight(), settings, CPU
        )  # fmt: skip
    first, second = (report.losses[0] for report in reports)
    assert reports[0].losses[-1] < 0.9 * first
    assert second == pytest.approx(first, rel=1e-5) if adapter == "new" else second < 0.9 * first
    if adapter == "new":
        model.renew_adapter()
        assert model.answer(frames(3)) == vlm(untrained_vlm).answer(frames(3))


def test_a_wrong_adapter_to_begin_with() -> None:
    with pytest.raises(ConfigError, match=r"settings.adapter is 'old'; it can be 'continue' or 'new'"):
        FineTuneSettings(adapter="old")  # type: ignore[arg-type]


@pytest.mark.parametrize(("answer", "beaten"), [(0.4, True), (-0.71, False), (-0.9, False), (None, False)])
def test_a_round_says_whether_the_vlm_beats_the_constant_predictor(
    untrained_vlm: Path, answer: float | None, beaten: bool
) -> None:
    # 12 kept rows, 6 held out. Every action is 0.5 but for the held-out ones, which are −0.1: the constant predictor
    # says 0.5 and is 0.6 off. A VLM that says 0.4 is 0.5 off; −0.71, 0.61; −0.9, 0.8; one without a word, NaN.
    class Answers(VLM):
        def ask(self, images: torch.Tensor) -> Proposals:
            said = torch.full((len(images), 2), answer or 0.0)
            valid = torch.full((len(images),), answer is not None)
            return Proposals(said, valid, torch.ones_like(valid))

    model = Answers(str(untrained_vlm), LoRA(rank=8, alpha=16))
    model.load(REACHER)
    settings = FineTuneSettings(epochs=1, max_steps=1, batch_size=4, accumulate=1, held_out=0.5)
    with own_randomness(derived_seed(0, 1)):  # the round's own split
        held_out = torch.randperm(12)[:6]
    actions = torch.full((12, 2), 0.5)
    actions[held_out] = -0.1
    report = RoundReport(1, 1000, 12)
    some = TensorDict({"frame": frames(12), "action": actions}, [12])
    fine_tune_round(report, model, some, torch.arange(12.0), 0.0, KeepAll(), UniformWeight(), settings, CPU)
    assert report.error_constant == pytest.approx(0.6)
    if answer is not None:
        assert report.error_after == pytest.approx(abs(answer + 0.1))
    said = (
        "none of the VLM's answers on held-out rows could be parsed"
        if answer is None
        else "the VLM does not beat the constant predictor on held-out rows"
    )
    assert report.note == ("" if beaten else said)
    assert (said in str(report)) is not beaten  # what goes to the log, as a warning


def test_a_round_is_deterministic_in_its_seed(untrained_vlm: Path) -> None:
    short = FineTuneSettings(epochs=1, max_steps=3, batch_size=4, accumulate=1, lr=1e-3, held_out=0.2)
    losses = []
    for _ in range(2):
        report = RoundReport(1, 1000, 20)
        fine_tune_round(
            report, vlm(untrained_vlm, dropout=0.1), rows(20), torch.arange(20.0), 0.0, KeepAll(), RALW(), short, CPU
        )
        losses.append(report.losses)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_rows_are_said_and_change_nothing(untrained_vlm: Path, n: int) -> None:
    model = vlm(untrained_vlm)
    report = RoundReport(1, 1000, n)
    fine_tune_round(report, model, rows(n), torch.arange(float(n)), 0.0, EDDF(), RALW(), SETTINGS, CPU)
    assert "nothing to fine-tune on" in report.note
    assert not model.has_adapter


def test_the_vlm_is_back_on_its_device_without_gradients_before_it_answers(untrained_vlm: Path) -> None:
    # Lightning moves what it trained to the CPU when it ends, and leaves the last gradients.
    events = []

    class Watched(VLM):
        def to(self, device: torch.device) -> None:
            events.append(("to", device, any(p.grad is not None for p in self.model.parameters())))
            super().to(device)

        def ask(self, images: torch.Tensor) -> Proposals:
            events.append(("ask", len(images)))
            return super().ask(images)

    model = Watched(str(untrained_vlm), LoRA(rank=8, alpha=16))
    model.load(REACHER)
    short = FineTuneSettings(epochs=1, max_steps=1, batch_size=4, accumulate=1, held_out=0.2)
    fine_tune_round(
        RoundReport(1, 1000, 20), model, rows(20), torch.arange(20.0), 0.0, KeepAll(), UniformWeight(), short, CPU
    )
    assert events == [("ask", 4), ("to", torch.device("cpu"), False), ("ask", 4)]


@pytest.mark.gpu
def test_a_round_on_a_gpu(untrained_vlm: Path) -> None:
    model = VLM(str(untrained_vlm), LoRA(rank=8, alpha=16, dropout=0.0))
    model.to(torch.device("cuda", 0))
    model.load(REACHER)
    report = RoundReport(1, 1000, 20)
    gpu = {"accelerator": "gpu", "devices": [0]}
    fine_tune_round(report, model, rows(20), torch.arange(20.0), 0.0, KeepAll(), UniformWeight(), SETTINGS, gpu)
    assert report.error_after < 0.05
    assert {p.device.type for p in model.model.parameters()} == {"cuda"}


def test_a_vlm_that_answers_only_where_the_constant_is_right_has_no_skill(untrained_vlm: Path) -> None:
    class Sure(VLM):
        def ask(self, images: torch.Tensor) -> Proposals:
            bright = images.float().mean((1, 2, 3)) > 100
            return Proposals(torch.full((len(images), 2), 0.5), bright, torch.ones_like(bright))

    model = Sure(str(untrained_vlm), LoRA(rank=8, alpha=16))
    model.load(REACHER)
    dark = torch.arange(30) % 3 == 0  # the constant is 0.5; dark rows are −0.5
    actions = torch.where(dark, -0.5, 0.5)[:, None].expand(30, 2).clone()
    some = TensorDict({"frame": frames(30), "action": actions}, [30])
    some["frame"][dark] = 0
    report, settings = RoundReport(1, 1000, 30), replace(SETTINGS, epochs=1, max_steps=1, held_out=0.5)
    fine_tune_round(report, model, some, torch.arange(30.0), 0.0, KeepAll(), UniformWeight(), settings, CPU)
    assert 0 < report.unparsable_after < 1
    assert report.error_after == report.error_constant == 0.0
    assert report.note == "the VLM does not beat the constant predictor on held-out rows"
    prior = SkilledPrior()
    prior.measured(*report.measures)
    assert prior.skill == 0.0


def test_one_row_can_be_trained_on_where_none_is_held_out(untrained_vlm: Path) -> None:
    report, settings = RoundReport(1, 1000, 1), replace(SETTINGS, epochs=1, held_out=0.0)
    fine_tune_round(report, vlm(untrained_vlm), rows(1), torch.ones(1), 0.0, KeepAll(), UniformWeight(), settings, CPU)
    assert (report.trained, len(report.losses)) == (1, 1)


def test_a_round_without_rows_trains_nothing(untrained_vlm: Path) -> None:
    report = RoundReport(1, 1000, 0)
    nothing = TensorDict({}, [0])
    fine_tune_round(report, vlm(untrained_vlm), nothing, torch.zeros(0), 0.0, EDDF(), RALW(), SETTINGS, CPU)
    assert (report.kept, report.losses, report.action_dim) == (0, [], 0)
    assert report.note == "0 of 0 rows kept: nothing to fine-tune on"
