"""What the report says of Eq. 4's term."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from covr_lightning.report.groups import Group
from covr_lightning.report.guidance import LOSS, Stretch, over_training, stretches
from covr_lightning.report.page import percent
from covr_lightning.report.reading import read_run
from tests.report.pages import report
from tests.report.test_seeds import write_run

HEAD = "step,train/lambda,train/labelled,train/prior_loss\n"


def guided(folder: Path, seed: int, metrics: str, prior: str = "DelayedPrior", **init_args: Any) -> Path:
    """A run with rounds at 5,000 and 10,000 environment steps, and what its updates logged."""
    write_run(folder, seed, rounds={1: 5000, 2: 10000})
    run = folder / f"seed_{seed}"
    config = yaml.safe_load((run / "config.yaml").read_text())
    own = {"class_path": f"covr_lightning.agent.{prior}", "init_args": {"lam": 2.0, **init_args}}
    config["model"]["init_args"]["prior"] = own
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "logs" / "csv").mkdir(parents=True)
    (run / "logs" / "csv" / "metrics.csv").write_text(metrics)
    return run


def test_updates_belong_to_the_stretch_behind_the_round_before_them(tmp_path: Path) -> None:
    # 5,000 is the first round's own update, before the round; the row without a loss is an evaluation's.
    lines = "2000,0,0,0\n5000,0,0.25,0\n7000,0,,\n10000,2,0.5,0.5\n12000,2,0.5,0.2\n14000,1,0.25,0.4\n"
    run = read_run(guided(tmp_path, 1, HEAD + lines))
    assert stretches(run) == [
        Stretch(0, 0, 0.0, 0.0, 0.125),
        Stretch(1, 5000, 0.5, 2.0, 0.5),
        Stretch(2, 10000, pytest.approx(0.3), 1.5, 0.375),
    ]


def test_stretches_over_seeds(tmp_path: Path) -> None:
    guided(tmp_path / "runs" / "mine", 1, f"{HEAD}6000,2,0.5,0.5\n12000,2,0.1,0.2\n")
    guided(tmp_path / "runs" / "mine", 2, f"{HEAD}6000,2,0.1,0.1\n")
    page = report(tmp_path / "runs", out=tmp_path / "out")
    header = page.rows.index(["stretch", "from step", "seeds", "λ", "rows with an answer", "λ‖a_v − a_r‖²"])
    assert page.rows[header + 1 : header + 3] == [
        ["after round 1", "5,000", "2", "2.00 ± 0.00", "30 %", "0.300 ± 0.283"],  # 0.5 and 0.1: √(0.2² + 0.2²)
        ["after round 2", "10,000", "1", "2.00", "10 %", "0.200"],
    ]
    for name in ("mine-guidance-loss", "mine-labelled"):
        assert (tmp_path / "out" / f"{name}.png").is_file()


def test_the_share_that_the_critics_prefer(tmp_path: Path) -> None:
    lines = "6000,2,0.5,0.5,0.2\n7000,2,0.5,0.5,0.4\n12000,2,0.1,0.2,0.6\n"
    guided(tmp_path / "runs" / "mine", 1, HEAD.replace("\n", ",train/preferred\n") + lines, q_filter=True)
    page = report(tmp_path / "runs", out=tmp_path / "out")
    titles = ["stretch", "from step", "λ", "rows with an answer", "of these preferred", "λ‖a_v − a_r‖²"]
    header = page.rows.index(titles)
    assert [row[4] for row in page.rows[header + 1 : header + 3]] == ["30 %", "60 %"]
    assert "only those answers count that the critics prefer" in "".join(page.text)


def test_a_batch_without_an_answer_says_nothing_of_what_the_critics_prefer(tmp_path: Path) -> None:
    # Its 0 is logged of no row: (0.5·0.2 + 0.25·0.6) / 0.75 = 1/3, not the mean 0.267 of three updates.
    lines = "2000,0,0,0,0\n6000,2,0.5,0.5,0.2\n7000,2,0,0,0\n8000,2,0.25,0.5,0.6\n12000,2,0,0,0\n"
    head = HEAD.replace("\n", ",train/preferred\n")
    guided(tmp_path / "runs" / "mine", 1, head + lines, q_filter=True)
    guided(tmp_path / "runs" / "mine", 2, f"{head}6000,2,0,0,0\n", q_filter=True)
    page = report(tmp_path / "runs", out=tmp_path / "out")
    header = next(i for i, row in enumerate(page.rows) if "of these preferred" in row)
    assert [row[5] for row in page.rows[header + 1 : header + 4]] == ["–", "33 %", "–"]
    run = read_run(tmp_path / "runs" / "mine" / "seed_1")
    assert [one.preferred for one in stretches(run)] == pytest.approx([float("nan"), 1 / 3, float("nan")], nan_ok=True)


def test_a_round_whose_file_is_missing_merges_no_stretches(tmp_path: Path) -> None:
    lines = "2000,0,0.5,0\n6000,2,0.5,0.5\n12000,2,0.5,0.2\n22000,2,0.5,0.1\n"
    folder = guided(tmp_path, 1, HEAD + lines)
    figures = folder / "rounds" / "round_002.json"
    (folder / "rounds" / "round_003.json").write_text(
        figures.read_text().replace("10000", "20000").replace(": 2,", ": 3,")
    )
    assert [(one.round, one.loss) for one in stretches(read_run(folder))] == [(0, 0), (1, 0.5), (2, 0.2), (3, 0.1)]
    figures.unlink()
    assert [(one.round, one.loss) for one in stretches(read_run(folder))] == [(0, 0), (3, 0.1)]


def test_a_run_that_is_over_has_no_guidance_to_come(tmp_path: Path) -> None:
    folder = guided(tmp_path / "runs", 1, f"{HEAD}2000,0,0,0\n")
    (folder / "summary.json").write_text('{"env_steps": 100000}')
    text = " ".join(report(folder, out=tmp_path / "out").text)
    assert "λ was 0 throughout: the VLM has not guided the policy." in text


def test_lines_break_at_rounds_and_a_share_that_is_not_0_is_not_shown_as_0(tmp_path: Path) -> None:
    rows = "".join(f"{step},{0 if step <= 5000 else 2},0.004,{step / 1000}\n" for step in range(1000, 9000, 1000))
    run = read_run(guided(tmp_path, 1, HEAD + rows))
    (line,) = over_training(Group("mine", [run]), LOSS, "loss").axes[0].lines
    steps, losses = (np.asarray(values, float) for values in line.get_data())
    np.testing.assert_array_equal(steps, [3000, np.nan, 7000, np.nan, np.nan])  # means of 1 to 5 and of 6 to 8
    np.testing.assert_array_equal(losses, [3, np.nan, 7, np.nan, np.nan])
    assert [percent(share) for share in (0, 0.004, 0.006, 0.5)] == ["0 %", "< 1 %", "1 %", "50 %"]


@pytest.mark.parametrize(
    ("metrics", "prior", "sentence"),
    [
        ("step,eval/return\n0,3\n", "DelayedPrior", "No update has logged it yet"),
        (f"{HEAD}2000,0,0,0\n", "DelayedPrior", "the VLM has not guided the policy yet"),
        (f"{HEAD}2000,0,0,0\n", "NoPrior", None),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, metrics: str, prior: str, sentence: str | None) -> None:
    text = report(guided(tmp_path / "runs", 1, metrics, prior), out=tmp_path / "out").text
    assert ("Guidance" in text) == (sentence is not None)
    if sentence:
        assert sentence in " ".join(text)


def test_pngs_of_an_earlier_page_go_with_it(tmp_path: Path) -> None:
    one = guided(tmp_path / "one", 1, f"{HEAD}6000,2,0.5,0.5\n")
    out = tmp_path / "out"
    report(one, out=out)
    (out / "mine.png").write_bytes(b"not a page's")
    assert (out / "one-guidance-loss.png").is_file()
    report(guided(tmp_path / "other", 1, f"{HEAD}6000,2,0.5,0.5\n"), out=out)
    assert not list(out.glob("one-*.png"))
    assert (out / "mine.png").is_file()
    assert (out / "other-guidance-loss.png").is_file()
