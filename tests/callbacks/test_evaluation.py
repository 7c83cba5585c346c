"""Which episode is recorded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from covr_lightning.callbacks import EvaluationVideo


@pytest.mark.parametrize(
    ("first_process", "episode", "recorded"), [(True, 0, True), (True, 1, False), (False, 0, False)]
)
def test_the_first_process_records_its_first_episode(first_process: bool, episode: int, recorded: bool) -> None:
    trainer, agent = SimpleNamespace(is_global_zero=first_process), SimpleNamespace(record_frames=None)
    EvaluationVideo().on_validation_batch_start(trainer, agent, 10_000, episode)  # type: ignore[arg-type]
    assert agent.record_frames is recorded
