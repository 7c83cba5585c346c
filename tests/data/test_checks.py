"""What a run is warned of before it begins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from covr_lightning.agent import ConstantPrior, DelayedPrior, NoPrior, Prior
from covr_lightning.data import checks
from covr_lightning.finetune import LinearSchedule, NeverSchedule, Schedule
from covr_lightning.vlm.vlm import VLM


@pytest.mark.parametrize(
    ("prior", "schedule", "says"),
    [
        (DelayedPrior(after_rounds=4), LinearSchedule(5000), None),  # rounds at 5k, 15k, 30k, 50k and 75k
        (DelayedPrior(after_rounds=5), LinearSchedule(6667), "5 fine-tune rounds (after_rounds), but this run has 4 "),
        (DelayedPrior(after_rounds=1), NeverSchedule(), "1 fine-tune rounds (after_rounds), but this run has 0 "),
        (DelayedPrior(after_rounds=1), None, "this run has no ProgressiveFineTune (trainer.callbacks)"),
        (DelayedPrior(after_rounds=0), None, None),
        (ConstantPrior(), None, None),
    ],
)
def test_a_prior_that_will_never_guide(
    monkeypatch: pytest.MonkeyPatch, prior: Prior, schedule: Schedule | None, says: str | None
) -> None:
    said: list[str] = []
    monkeypatch.setattr(checks.log, "warning", lambda text, *values: said.append(text % values))
    callbacks = [SimpleNamespace(measures_vlm=True, schedule=schedule)] if schedule else []
    checks.check_vlm(VLM("nowhere"), True, prior, callbacks, 100_000)
    assert len(said) == (says is not None)
    assert says is None or says in said[0]


@pytest.mark.parametrize(
    ("due", "prior", "schedule", "warned"),
    [
        (15, ConstantPrior(), None, True),
        (16, ConstantPrior(), None, False),
        (15, NoPrior(), None, False),
        (15, ConstantPrior(), LinearSchedule(5000), False),  # a round asks about all that wait
        (15, ConstantPrior(), NeverSchedule(), True),
    ],
)
def test_a_vlm_that_will_never_be_asked(
    monkeypatch: pytest.MonkeyPatch, due: int, prior: Prior, schedule: Schedule | None, warned: bool
) -> None:
    said: list[str] = []
    monkeypatch.setattr(checks.log, "warning", lambda text, *values: said.append(text % values))
    callbacks = [SimpleNamespace(measures_vlm=True, schedule=schedule)] if schedule else []
    checks.check_labels(due, 16, prior, callbacks, 100_000)
    assert len(said) == warned
    assert not said or said[0].startswith("15 frames come due for the VLM in this run (data.max_env_steps, data.label")
