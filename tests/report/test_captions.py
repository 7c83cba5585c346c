"""What the report calls its numbers, and what it says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from covr_lightning.report import figures
from covr_lightning.report.groups import Group
from covr_lightning.report.page import plus_minus
from covr_lightning.report.reading import read_run
from tests.report.pages import report
from tests.report.test_damage import PROFILE, ROUND, small_run
from tests.report.test_seeds import curve, write_run


def part(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": f"covr_lightning.finetune.{name}", "init_args": settings}


def fine_tuned(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A small run whose ProgressiveFineTune has these settings."""
    callback = {"class_path": "covr_lightning.callbacks.ProgressiveFineTune", "init_args": settings}
    return small_run(folder, seed, trainer={"callbacks": [callback]})


@pytest.mark.parametrize(
    ("score", "one", "many", "symbol"),
    [
        (None, "return", "Returns", "return g"),
        (part("ReturnScore"), "return", "Returns", "return g"),
        (part("RewardScore"), "reward", "Rewards", "reward r"),
        (part("QScore"), "min Q(s, a)", "Values of min Q(s, a)", "min Q(s, a)"),
        ({"class_path": "mine.Score"}, "score", "Scores", "score"),
    ],
)
def test_scores_that_are_no_returns_are_called_what_they_are(
    score: Any, one: str, many: str, symbol: str, tmp_path: Path
) -> None:
    folder = fine_tuned(tmp_path / "run", score=score)
    page = report(folder, out=tmp_path / "out")
    text = " ".join(page.text)
    assert f"{many} in D_f, round 1" in text
    assert f"{many} of the rows in D_f when the round came" in text
    assert f"IQR of the {many[0].lower()}{many[1:]}." in text
    assert f"Blue are rows of high {one} " in text
    assert f"Rows of D_f in round 1: the first is of high {one}." in text
    assert ["round", one, "rows", "before", "after"] in page.rows
    assert f"{one} 1.0" in page.text
    run = read_run(folder)
    figure = figures.scores_in_buffer(run.rounds[0], run.score.symbol)
    assert figure is not None
    assert figure.axes[0].get_xlabel() == symbol


def test_configurations_with_other_scores_have_scores(tmp_path: Path) -> None:
    runs = [fine_tuned(tmp_path / name, score=part(name)) for name in ("ReturnScore", "QScore")]
    text = " ".join(report(*runs, out=tmp_path / "out").text)
    assert "Scores of the rows in D_f when the round came" in text
    assert "Returns in D_f, round 1" in text
    assert "Values of min Q(s, a) in D_f, round 1" in text


@pytest.mark.parametrize(
    ("settings", "sigmoid", "raw"), [({}, "σ(ε)", False), ({"sign": "prose", "compare": "raw"}, "σ(−ε)", True)]
)
def test_the_threshold_is_the_filters(settings: dict[str, str], sigmoid: str, raw: bool, tmp_path: Path) -> None:
    folder = fine_tuned(tmp_path / "run", filter=part("EDDF", **settings))
    text = " ".join(report(folder, out=tmp_path / "out").text)
    assert f"τ = median + {sigmoid}·IQR of the returns" in text
    assert ("τ is in units of z-scores" in text) == raw


def test_the_time_of_a_run_under_way_is_that_up_to_its_last_evaluation(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 1, curve((0, 1), (50000, 2)))
    run = tmp_path / "run" / "seed_1"
    (run / "profile.json").write_text(json.dumps(PROFILE))
    assert "8 s up to the last evaluation, at 50,000 steps" in report(run, out=tmp_path / "out").text
    (run / "summary.json").write_text('{"env_steps": 100000}')
    assert "8 s in all" in report(run, out=tmp_path / "out").text


def test_how_many_episodes_are_behind_a_spread(tmp_path: Path) -> None:
    data = {"init_args": {"max_env_steps": 2000, "eval_episodes": 7, "env": {"class_path": "DMControl"}}}
    text = " ".join(report(small_run(tmp_path / "run", data=data), out=tmp_path / "out").text)
    assert "± over 7 episodes, at 2,000 steps" in text
    assert "± standard deviation over an evaluation's 7 episodes." in text
    assert "return, ± standard deviation over episodes (policy 7, VLM alone 2)" in text
    data["init_args"]["eval_episodes"] = 1
    text = " ".join(report(small_run(tmp_path / "one", data=data), out=tmp_path / "out").text)
    assert "one episode, at 2,000 steps" in text


def test_areas_over_other_steps_do_not_compare(tmp_path: Path) -> None:
    text = " ".join(report(small_run(tmp_path / "run"), out=tmp_path / "out").text)
    assert "Each is over a row's own steps, so those of rows that end at others do not compare." in text


def test_the_latest_video_of_each_run_comes_first(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (small_run(tmp_path / name, batch=name) / "videos").mkdir()
        for step in (40, 2000, 1000):
            (tmp_path / name / "videos" / f"step_{step}.mp4").write_bytes(b"x" * 2_000_000)
    page = report(tmp_path / "a", tmp_path / "b", out=tmp_path / "out")
    told = [text for text in page.text if "seed 0: step_" in text]
    assert told == [f"{name}, seed 0: step_{step}" for step in (2000, 1000, 40) for name in "ab"]
    assert sum(place.startswith("data:video") for place in page.fetched) == 3


def test_kept_rows_alone_are_numbered_where_bars_are_many(tmp_path: Path) -> None:
    for n, numbers in ((3, 9), (5, 5), (11, 0)):
        run = read_run(small_run(tmp_path / str(n)))
        run.rounds = [{**ROUND, "round": i + 1} for i in range(n)]
        figure = figures.kept_per_round(run)
        assert figure is not None
        assert len(figure.axes[0].texts) == numbers
        told = {text.get_text() for text in figure.axes[0].texts}
        assert told == {3: {"20", "19", "5"}, 5: {"5"}, 11: set()}[n]


def test_pictures_say_what_they_are_of_and_rows_have_titles(tmp_path: Path) -> None:
    report(small_run(tmp_path / "run"), out=tmp_path / "out")
    html = (tmp_path / "out" / "index.html").read_text()
    for alt in ("round 1, row 0, high return", "round 1, row 1, low return", "VLM alone, after round 1, step 2"):
        assert f'alt="{alt}"' in html
    assert '<tr><th scope="row">run</th><td>0</td>' in html


def test_an_infinite_spread_is_none(tmp_path: Path) -> None:
    folder = small_run(tmp_path / "run", curve="env_steps,return,return_std\n8,11.0,inf\n1000,90.0,2.0\n")
    assert read_run(folder).curve[0] == {"env_steps": 8, "return": 11}
    assert "inf" not in report(folder, out=tmp_path / "out").text
    assert plus_minus(3.0, float("nan")) == "3.0"


def test_a_round_whose_file_is_missing_bounds_nothing(tmp_path: Path) -> None:
    points = curve((0, 1), (10000, 2), (20000, 3), (30000, 4), (40000, 5))
    write_run(tmp_path / "mine", 1, points, {1: 5000, 2: 15000, 3: 35000})
    (tmp_path / "mine" / "seed_1" / "rounds" / "round_002.json").write_text("{")
    run = read_run(tmp_path / "mine" / "seed_1")
    group = Group("mine", [run])
    # That of round 1 may have come after round 2; round 2 has no step that a later one could be after.
    assert [len(group.policy_after(n).seeds) for n in (1, 2, 3)] == [0, 0, 1]
    assert group.policy_after(3).mean == 5
    assert run.missing_rounds == [2]
    assert [run.round_at(n) for n in (0, 1, 3, 4)] == [0, 5000, 35000, np.inf]
    text = " ".join(report(tmp_path / "mine", out=tmp_path / "out").text)
    assert "rounds/round_002.json  cannot be read" in text


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (part("LinearSchedule", psi0_env_steps="5e3"), "yet: the first is due at 5e3 environment steps."),
        (part("GivenSchedule", at_env_steps=[9000, 10000]), "yet: the first is due at 9,000 environment steps."),
        (part("GivenSchedule", at_env_steps=9000), "yet: the first is due at 9,000 environment steps."),
        (part("GivenSchedule", at_env_steps=[]), "No round has been run yet."),
        (None, "yet: the first is due at 5,000 environment steps."),
        ("mine.Schedule", "No round has been run yet."),
    ],
)
def test_when_the_first_round_is_due(schedule: Any, said: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run", 1, curve((0, 1)))
    path = tmp_path / "run" / "seed_1" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["trainer"]["callbacks"][0]["init_args"]["schedule"] = schedule
    path.write_text(yaml.safe_dump(config))
    assert said in " ".join(report(tmp_path / "run", out=tmp_path / "out").text)
