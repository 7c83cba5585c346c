"""Which of the paper's numbers stand beside a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from covr_lightning.published.results import published_results
from covr_lightning.report.published import SWEEP_TABLES, comparison, per_round, swept
from covr_lightning.report.runs import Run
from tests.report.pages import report
from tests.report.test_seeds import write_run


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


def test_every_configuration_of_a_sweep_is_a_row_of_its_table() -> None:
    configs = Path(__file__).parents[2] / "configs"
    for number, folder in {5: "ablations", 12: "sweep_lambda", 13: "sweep_psi0", 16: "sweep_vlm"}.items():
        names = [file.stem for file in (configs / folder).glob("*.yaml")]
        found = swept(names)
        assert list(found) == [number]
        assert sorted(found[number].values()) == sorted(names)
        assert set(found[number]) == {row.method for row in published_results(number)}
    assert sorted(SWEEP_TABLES) == [5, 12, 13, 16]
    assert swept(["covr", "mine"]) == {}  # COVR alone is no ablation


def test_a_sweeps_rows_stand_beside_the_papers(tmp_path: Path) -> None:
    carla = {"class_path": "covr_lightning.envs.Carla", "init_args": {"scenario": "highway"}}
    line = "env_steps,return,return_std,distance,distance_std\n5000,{},1,{},1\n"
    for name, seed, er, dd in (("m5", 1, 200, 210), ("m5", 2, 220, 230), ("covr", 1, 250, 260)):
        # As names tell configurations apart here, so must a setting.
        env = {**carla, "init_args": {"scenario": "highway", "size": len(name)}}
        write_run(tmp_path / name, seed, line.format(er, dd), env=env)
    page = report(tmp_path, out=tmp_path / "page")
    head = ["", "paper: ER", "paper: DD (m)", "ER", "DD (m)", "of"]
    begin = page.rows.index(head)
    table = {row[0]: row[1:] for row in page.rows[begin + 1 : begin + 13]}
    assert table["M5"] == ["210 ± 99", "221 ± 102", "210 ± 14", "220 ± 14", "2 seeds, 5,000 steps"]
    assert table["COVR"] == ["248 ± 81", "259 ± 85", "250 ± 1", "260 ± 1", "seed 1, 5,000 steps"]
    assert table["M1"] == ["144 ± 74", "155 ± 77", "–", "–", "–"]
    assert "Table 5: Ablations, on CARLA's #HW" in page.text


def test_a_configuration_of_two_sweeps_is_a_row_of_both_tables(tmp_path: Path) -> None:
    """``ablations/covr`` and ``sweep_lambda/lambda_2`` differ in nothing; the latter has come a seed further."""
    env = {"class_path": "covr_lightning.envs.Carla", "init_args": {"scenario": "highway"}}
    line = "env_steps,return,return_std,distance,distance_std\n5000,{0},1,{0},1\n"
    for name, seeds in (("ablations/covr", (1, 2)), ("sweep_lambda/lambda_2", (1, 2, 3))):
        for seed in seeds:
            write_run(tmp_path / "runs" / name, seed, line.format(100 * seed), env=env)
    smaller = {**env, "init_args": {"scenario": "highway", "size": 5}}
    write_run(tmp_path / "runs" / "ablations" / "m5", 1, line.format(9), env=smaller)
    page = report(tmp_path / "runs", out=tmp_path / "page")
    for row in ("COVR", "λ = 2"):
        [measured] = [cells[3:] for cells in page.rows if cells[0] == row and len(cells) == 6]
        assert measured == ["200 ± 100", "200 ± 100", "3 seeds, 5,000 steps"], row
