"""The table against hand arithmetic."""

from __future__ import annotations

import csv
from pathlib import Path

from covr_lightning.sweep.table import Row, as_csv, as_markdown, make_row, write_table


def curve(*returns: float, distance: float | None = None) -> list[dict[str, float]]:
    points = [{"env_steps": 100.0 * n, "return": value, "return_std": 9.0} for n, value in enumerate(returns, 1)]
    if distance is not None:
        for point in points:
            point["distance"] = distance
    return points


def test_mean_and_std_over_seeds_by_hand() -> None:
    row = make_row("a", {1: curve(0, 7, 2), 2: curve(0, 1, 4), 5: curve(9, 1, 9)}, planned=4)
    # Last: 2, 4, 9: mean 5, deviations −3, −1, 4, so 26 / 2 = 13, std √13 = 3.606. Best: 7, 4, 9: mean 20/3, std 2.517.
    lines = as_csv([row, make_row("b", {1: curve(3, 8)}, 4), make_row("c", {}, 4)]).splitlines()
    assert lines == [
        "config,seeds,env_steps,return,return_std,best_return,best_return_std",
        "a,3,300,5.00,3.61,6.67,2.52",
        "b,1,200,8.00,,8.00,",
        "c,0,0,,,,",
    ]


def test_driving_tells_er_and_dd() -> None:
    rows = [make_row("hw", {1: curve(5, 30, 10, distance=40), 2: curve(1, 50, 30, distance=60)}, 2)]
    (cells,) = csv.DictReader(as_csv(rows).splitlines())
    # ER: 10, 30: mean 20, std √200 = 14.14; DD: 40, 60: the same about 50; best ER: 30, 50.
    assert (cells["ER"], cells["ER_std"], cells["DD"], cells["DD_std"]) == ("20.00", "14.14", "50.00", "14.14")
    assert (cells["return"], cells["best_return"]) == ("20.00", "40.00")
    markdown = as_markdown(rows, "covr sweep x", ["hw seed 3 failed: exit status 2"])
    assert "| config | seeds | env steps | ER | DD (m) | best ER |" in markdown
    assert "| hw | 2 of 2 | 300 | 20.0 ± 14.1 | 50.0 ± 14.1 | 40.0 ± 14.1 |" in markdown
    assert markdown.endswith("\n- hw seed 3 failed: exit status 2\n")
    mixed = as_markdown([*rows, make_row("dmc", {1: curve(3)}, 1)], "t")
    assert "| config | seeds | env steps | final return | best return | ER | DD (m) |" in mixed
    assert "| dmc | 1 of 1 | 100 | 3.0 | 3.0 | – | – |" in mixed


def test_files(tmp_path: Path) -> None:
    rows = [Row("a", [1], 1, 5, {"return": [1.0]})]
    paths = write_table(rows, tmp_path / "new", "title")
    assert [path.name for path in paths] == ["sweep.csv", "sweep.md"]
    assert paths[0].read_text() == as_csv(rows)
    assert paths[1].read_text().startswith("# title\n")
