"""The seconds of a run's parts: each without those inside it, all of them adding up, and over a resume."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from covr_lightning.callbacks.profile import PARTS, RunProfile, profile_table

from covr_lightning import step_times
from covr_lightning.agent.sac import SACModule
from covr_lightning.step_times import StepTimes
from tests.short_runs import fit


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(step_times, "time", clock)
    return clock


def test_a_part_is_without_the_parts_inside_it(clock: Clock) -> None:
    times = StepTimes()
    for _ in range(2):
        with times("environment"):
            clock.now += 1
            with times("act"):
                clock.now += 10
            with times("render"):
                clock.now += 100
                with times("act"):
                    clock.now += 1000
    assert times.seconds == {"act": 2020, "render": 200, "environment": 2}
    assert times.counts == {"act": 4, "render": 2, "environment": 2}


def test_laps_follow_each_other_and_are_inside_what_is_open(clock: Clock) -> None:
    times = StepTimes()
    with times("round"):
        clock.now += 1
        lap = times.laps()
        clock.now += 10
        with times("label"):
            clock.now += 100
        lap("critic")
        clock.now += 1000
        lap("actor")
        clock.now += 10000
    assert times.seconds == {"label": 100, "critic": 10, "actor": 1000, "round": 10001}


def test_a_part_that_fails_is_counted_and_closed(clock: Clock) -> None:
    times = StepTimes()

    def fail() -> None:
        with times("store"), times("label"):
            clock.now += 3
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    with times("sample"):
        clock.now += 5
    assert times.seconds == {"label": 3, "store": 0, "sample": 5}


def test_a_run_writes_its_profile_and_a_resumed_one_adds_to_it(
    untrained_vlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, untrained_vlm, "--data.max_env_steps", "3000") == 0
    assert "environment" not in capsys.readouterr().out  # only if asked for
    first = json.loads((tmp_path / "run" / "profile.json").read_text())
    # 75 agent steps, of which the 20th brings the first update, every second one with the actor's; one round after 30.
    # The collector asks the policy once more, to see what it gives.
    counts = {"environment": 75, "act": 76, "store": 75, "sample": 56, "critic": 56, "actor": 28, "fine-tune": 1}
    assert {name: first["counts"][name] for name in counts} == counts
    assert (
        first["counts"]["render"] == 75 + 4
    )  # the collector resets once to see the shapes, then three episodes' starts
    assert sum(first["seconds"].values()) == pytest.approx(first["total_seconds"])
    assert set(first["seconds"]) <= set(PARTS)
    assert min(first["seconds"].values()) >= 0
    assert first["seconds"]["fine-tune"] > first["seconds"]["sample"]

    more = ["--data.max_env_steps", "6000", "--ckpt_path", "last", "--profile", "true"]
    assert fit(tmp_path, untrained_vlm, *more) == 0
    both = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert both["counts"]["critic"] == 56 + 75
    assert all(both["seconds"][name] >= first["seconds"][name] for name in counts)
    assert sum(both["seconds"].values()) == pytest.approx(both["total_seconds"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*counts, "evaluation", "checkpoint", "other"))


def test_a_resume_writes_at_once_what_the_checkpoint_had(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text('{"seconds": {"critic": 600.0}, "counts": {}, "total_seconds": 1000.0}')
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path)
    resumed = RunProfile()
    resumed.load_state_dict({"seconds": {"critic": 6.0, "other": 4.0}, "counts": {"critic": 3}, "total_seconds": 10.0})
    resumed.on_fit_start(trainer, Mock(spec=SACModule, times=StepTimes()))  # type: ignore[arg-type]
    written = json.loads((tmp_path / "profile.json").read_text())
    assert written["seconds"] == {"critic": 6.0, "other": pytest.approx(4, abs=0.5)}
    assert (written["counts"], written["total_seconds"]) == ({"critic": 3}, pytest.approx(10, abs=0.5))


def test_the_table_has_shares_in_the_order_of_a_step() -> None:
    profile = {"seconds": {"other": 1.0, "critic": 6.0, "render": 3.0}, "counts": {"critic": 4}, "total_seconds": 10.0}
    columns = [list(column.cells) for column in profile_table(profile).columns]
    assert columns == [
        ["render", "critic", "other"],
        ["3.00", "6.00", "1.00"],
        ["30.0%", "60.0%", "10.0%"],
        ["", "4", ""],
        ["", "1500.00", ""],
    ]
