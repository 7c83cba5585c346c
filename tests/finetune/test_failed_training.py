"""Training that fails, and what of the VLM is left then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from covr_lightning.finetune import training
from covr_lightning.finetune.module import DivergedError, FineTuneSettings, VLMFineTuner
from covr_lightning.progress import bar
from tests.finetune.small_rounds import CPU, a_round, frames, vlm


class Failing:
    """Stands in for the loss: the first `times` calls fail as told, those after it compute it."""

    def __init__(self, error: Exception | None, times: int) -> None:
        self.error, self.times, self.original = error, times, VLMFineTuner.loss
        self.batches: list[int] = []

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> Failing:
        def loss(tuner: VLMFineTuner, images: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            self.batches.append(len(images))
            computed = self.original(tuner, images, *rest)
            if len(self.batches) > self.times:
                return computed
            if self.error is not None:
                raise self.error
            return computed * torch.nan

        monkeypatch.setattr(VLMFineTuner, "loss", loss)
        return self


FAILURES = {
    "out of memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB"),
    "out of memory on the CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate"),
    "diverged": None,
}


@pytest.mark.parametrize("why", FAILURES)
def test_a_failed_training_is_tried_again_with_half_the_batch(
    why: str, untrained_vlm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(FAILURES[why], 1).patch(monkeypatch)
    report = a_round(vlm(untrained_vlm))
    assert failing.batches == [8] + 40 * [4]  # ten times 16 training rows
    assert len(report.losses) == 40
    (failure,) = report.failures
    assert "(batches of 8)" in failure
    assert report.error_after < 0.05


@pytest.mark.parametrize(
    ("settings", "tried"), [((4, 4), [(4, 4), (2, 8)]), ((3, 4), [(3, 4), (1, 12)]), ((5, 1), [(5, 1), (2, 3)]),
                            ((1, 4), [(1, 4)])],
)  # fmt: skip
def test_the_second_try_sees_as_many_rows_a_step(
    settings: tuple[int, int], tried: list[tuple[int, int]], untrained_vlm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def fail(tuner: VLMFineTuner, attempt: FineTuneSettings, *rest: object) -> None:
        seen.append((attempt.batch_size, attempt.accumulate))
        raise DivergedError("the loss is nan")

    monkeypatch.setattr(training, "_fit", fail)
    batch_size, accumulate = settings
    report = a_round(vlm(untrained_vlm), batch_size=batch_size, accumulate=accumulate)
    assert seen == tried
    assert len(report.failures) == len(tried)


@pytest.mark.parametrize("why", FAILURES)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_after_two_failures_the_adapter_of_the_round_before_stays(
    why: str, gradient_checkpointing: bool, untrained_vlm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vlm(untrained_vlm)
    assert a_round(model).losses
    before, said = {k: v.clone() for k, v in model.model.state_dict().items()}, model.answer(frames(4))
    with monkeypatch.context() as patch:
        failing = Failing(FAILURES[why], 2).patch(patch)
        report = a_round(model, number=2, gradient_checkpointing=gradient_checkpointing)
    assert failing.batches == [8, 4]
    assert (report.losses, len(report.failures), report.error_after != report.error_after) == ([], 2, True)
    assert report.note.startswith("the adapter stays as it was: ")
    assert model.round == 1
    assert not model.model.training
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())
    assert model.answer(frames(4)) == said


def test_after_two_failures_of_the_first_round_the_second_begins_as_in_a_resumed_run(
    untrained_vlm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vlm(untrained_vlm)
    with monkeypatch.context() as patch:
        Failing(FAILURES["out of memory"], 2).patch(patch)
        assert len(a_round(model, epochs=1).failures) == 2
    assert not model.has_adapter
    assert model.answer(frames(4)) == vlm(untrained_vlm).answer(frames(4))
    assert a_round(model, number=2, epochs=1).losses == a_round(vlm(untrained_vlm), number=2, epochs=1).losses


def test_a_failed_training_leaves_no_bar_behind(untrained_vlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def noted(*arguments: Any) -> Any:
        made.append(bar(*arguments))
        return made[-1]

    monkeypatch.setattr("covr_lightning.finetune.training.bar", noted)
    monkeypatch.setitem(CPU, "enable_progress_bar", True)
    Failing(FAILURES["out of memory"], 2).patch(monkeypatch)
    assert len(a_round(vlm(untrained_vlm), epochs=1).failures) == 2
    assert [one.disable for one in made] == [True, True]  # closed


def test_an_adapter_that_ends_up_infinite_counts_as_diverged(
    untrained_vlm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = VLMFineTuner.finish

    def finish(tuner: VLMFineTuner) -> None:
        original(tuner)
        next(p for p in tuner.model.parameters() if p.requires_grad).data[0] = torch.inf

    monkeypatch.setattr(VLMFineTuner, "finish", finish)
    model = vlm(untrained_vlm)
    report = a_round(model, epochs=1)
    assert "the adapter is not finite after the last step" in report.note
    assert all(torch.isfinite(p).all() for p in model.model.parameters())


def test_other_errors_are_not_hidden(untrained_vlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Failing(RuntimeError("shapes differ"), 1).patch(monkeypatch)
    with pytest.raises(RuntimeError, match="shapes differ"):
        a_round(vlm(untrained_vlm), epochs=1)
