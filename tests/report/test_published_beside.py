"""Which of the paper's numbers stand beside a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from covr_lightning.report.published import comparison, per_round
from covr_lightning.report.runs import Run


def run_in(kind: str, **settings: str) -> Run:
    env = {"class_path": f"covr_lightning.envs.{kind}", "init_args": settings}
    return Run(Path("x"), {"data": {"class_path": "…", "init_args": {"env": env}}})


@pytest.mark.parametrize(
    ("run", "setting", "covr"),
    [
        (run_in("DMControl", task="cartpole-swingup"), "DMControl 100k: Cartpole, Swingup", "872 ± 2"),
        (run_in("DMControl", task="ball_in_cup-catch"), "DMControl 100k: Ball in cup, Catch", None),
        (run_in("DMControl", task="walker-run"), "DMControl 500k: Walker, Run", None),
        (run_in("Carla", scenario="highway"), "CARLA HW", "248 ± 81"),
        (run_in("Carla", scenario="ghost_pedestrian"), "CARLA GP", "235 ± 89"),
        (run_in("CarRacing"), "CarRacing", "619 ± 221"),
    ],
)
def test_results_on_the_same_task(run: Run, setting: str, covr: str | None) -> None:
    found = comparison(run)
    assert found is not None
    assert found.setting == setting
    assert len({row.method for row in found.results}) == len(found.results)
    if covr is not None:
        assert [str(row) for row in found.results if row.method == "COVR (Ours)"] == [covr]
    assert not found.caution


def test_the_road_is_not_carla() -> None:
    found = comparison(run_in("Road", scenario="highway"))
    assert found is not None
    assert "do not compare" in found.caution
    assert comparison(run_in("Road", scenario="mine.yaml")) is None


def test_rounds_are_published_for_the_highway_only() -> None:
    er = per_round(run_in("Carla", scenario="highway"), "ER")
    assert (str(er["VLM after round 5"]), str(er["policy after round 5"])) == ("97 ± 22", "206 ± 79")
    assert per_round(run_in("Carla", scenario="ghost_pedestrian"), "ER") == {}
