"""Seeds of one configuration taken together: unequally far, with different rounds, and of driving."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from covr_lightning.cli import main
from covr_lightning.report import curves, figures
from covr_lightning.report.drawing import PAPER
from covr_lightning.report.groups import Group, group_runs
from covr_lightning.report.overview import rounds_said
from covr_lightning.report.page import number
from covr_lightning.report.reading import read_run
from covr_lightning.report.runs import find_runs
from covr_lightning.sweep.differences import differences
from tests.report.pages import report

CARTPOLE = {
    "class_path": "covr_lightning.envs.DMControl",
    "init_args": {"task": "cartpole-swingup"},
}
ROAD = {"class_path": "covr_lightning.envs.Road", "init_args": {"scenario": "highway"}}
NOTE = "the VLM does not beat the constant predictor on held-out rows"


def write_run(
    folder: Path,
    seed: int,
    curve: str = "",
    rounds: dict[int, int] | None = None,
    alone: dict[int, dict[str, list[float]]] | None = None,
    env: dict | None = None,
) -> None:
    """A run's folder: its configuration; its curve as lines of CSV; rounds → steps; rounds → episodes of the VLM."""
    run = folder / f"seed_{seed}"
    (run / "rounds").mkdir(parents=True)
    callback = {"class_path": "covr_lightning.callbacks.ProgressiveFineTune", "init_args": {"filter": None}}
    data = {"env": env or CARTPOLE, "max_env_steps": 100000, "seed": seed}
    (run / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "seed_everything": seed,
                "data": {"class_path": "covr_lightning.data.ExperienceData", "init_args": data},
                "model": {"class_path": "covr_lightning.agent.SACModule", "init_args": {"seed": seed}},
                "trainer": {"callbacks": [callback]},
            }
        )
    )
    if curve:
        (run / "curve.csv").write_text(curve)
    for n, env_steps in (rounds or {}).items():
        entropy = {1: -1.0, 2: 0.5, 3: 0.51}.get(n, 1 / n) + 0.1 * seed
        figures_ = {"round": n, "env_steps": env_steps, "rows": 10, "kept": 5, "entropy": entropy, "note": NOTE}
        (run / "rounds" / f"round_{n:03d}.json").write_text(json.dumps(figures_))
    for n, columns in (alone or {}).items():
        arrays = {name: np.array(values) for name, values in columns.items()}
        save_file(arrays, run / "rounds" / f"round_{n:03d}_vlm.safetensors")


def curve(*points: tuple[int, float]) -> str:
    """Lines of a curve whose episodes all came to within 9."""
    return "env_steps,return,return_std\n" + "".join(f"{steps},{value},9.0\n" for steps, value in points)


@pytest.fixture
def unequal(tmp_path: Path) -> Path:
    """Two seeds: the first at 30,000 steps with three rounds, the second at 20,000 with two."""
    folder = tmp_path / "runs" / "mine"
    far = curve((0, 10), (10000, 220), (20000, 100), (30000, 400))
    write_run(folder, 1, far, {1: 5000, 2: 15000, 3: 25000}, {0: {"return": [2.0, 4.0]}, 1: {"return": [5.0, 7.0]}})
    near = curve((0, 30), (10000, 40), (20000, 200))
    write_run(folder, 2, near, {1: 5000, 2: 15000}, {0: {"return": [6.0, 6.0]}})
    return folder


def group_of(folder: Path) -> Group:
    [group] = group_runs([read_run(run) for run in find_runs([folder])])
    return group


def test_means_are_of_the_last_step_that_all_seeds_have(unequal: Path, tmp_path: Path) -> None:
    page = report(unequal, out=tmp_path / "out")
    # At 20,000 steps 100 and 200: mean 150, spread √(50² + 50²) = 70.7. Not (400 + 200) / 2 = 300.
    assert "± over 2 seeds, at 20,000 steps, the last that all of them have; 20.0 at first" in page.text
    [beside] = [row for row in page.rows if row[0].startswith("mine, ")]
    assert beside[:2] == ["mine, 2 seeds, 20,000 steps", "150 ± 71"]
    [last] = [row for row in page.rows if row[0].startswith("last evaluation")]
    assert last == ["last evaluation, 20,000 steps", "150.0 ± 70.7", "2", "–", "–"]


def test_the_row_of_all_seeds_ends_where_the_slowest_is(unequal: Path, tmp_path: Path) -> None:
    page = report(unequal, out=tmp_path / "out")
    # Mean curve: 20, 130, 150. Areas: ((10 + 220)/2 + (220 + 100)/2)/2 = 137.5 and
    # ((30 + 40)/2 + (40 + 200)/2)/2 = 77.5; their mean is 107.5, their spread √(30² + 30²) = 42.4.
    [row] = [row for row in page.rows if row[:2] == ["mine", "all 2"]]
    assert row[2:] == ["20,000", "20.0", "150.0 ± 70.7", "20,000", "150.0 ± 70.7", "107.5 ± 42.4"]
    [first] = [row for row in page.rows if row[:2] == ["mine", "1"]]
    assert first[2:7] == ["30,000", "10.0", "400.0 ± 9.0", "30,000", "400.0 ± 9.0"]


def test_best_is_of_the_mean_curve_everywhere(tmp_path: Path) -> None:
    # Means 0, 60, 50; the seeds' own bests are 100 and 80, so that their mean would be 90.
    write_run(tmp_path / "runs" / "mine", 1, curve((0, 0), (10000, 100), (20000, 20)))
    write_run(tmp_path / "runs" / "mine", 2, curve((0, 0), (10000, 20), (20000, 80)))
    page = report(tmp_path / "runs", out=tmp_path / "out")
    [row] = [row for row in page.rows if row[:2] == ["mine", "all 2"]]
    assert row[4:6] == ["60.0 ± 56.6", "10,000"]  # √(40² + 40²)
    tile = page.text.index("best return of the mean curve")
    assert page.text[tile + 1 : tile + 3] == ["60.0 ± 56.6", "± over 2 seeds, at 10,000 steps"]
    assert not any("90.0" in text for text in page.text)


def test_the_band_is_one_standard_deviation(tmp_path: Path) -> None:
    write_run(tmp_path / "mine", 1, curve((0, 0), (10000, 100)))
    write_run(tmp_path / "mine", 2, curve((0, 0), (10000, 20)))
    figure = curves.learning_curves([group_of(tmp_path / "mine")], "return", "return")
    (band,) = figure.axes[0].collections
    bounds = sorted({round(y, 6) for x, y in np.asarray(band.get_paths()[0].vertices).tolist() if x == 10000})
    assert bounds == pytest.approx([60 - math.sqrt(3200), 60 + math.sqrt(3200)])  # of 100 and 20: 60 ± 56.6


def test_configurations_look_different_and_have_room(tmp_path: Path) -> None:
    assert len(set(figures.looks(24))) == 24
    assert len({(look.dashes, look.marker) for look in figures.looks(6)}) == 6  # without their colours, too
    heights = []
    for n in (6, 12):
        for i in range(n):
            write_run(tmp_path / str(n) / f"config_{i}", 1, curve((0, i), (10000, 10 * i)))
        groups = [group_of(folder) for folder in sorted((tmp_path / str(n)).iterdir())]
        heights.append(curves.learning_curves(groups, "return", "return").get_size_inches()[1])
    assert heights[1] > heights[0]


def test_lines_that_are_one_for_a_while_take_turns(tmp_path: Path) -> None:
    together, apart = [(0, 1), (10000, 2), (20000, 5)], [(30000, 9), (40000, 8)]
    lines = [together + apart, together + [(30000, 7), (40000, 8)], together[:2]]
    base, other, short = curves.shared_stretches(lines)
    assert base == [(together[:2], 0, 3), (together[1:], 0, 2), ([together[2], *apart], 0, 1)]
    assert other == [(together[:2], 1, 3), (together[1:], 1, 2), ([together[2], (30000, 7), (40000, 8)], 0, 1)]
    assert short == [(together[:2], 2, 3)]
    assert curves.shared_stretches([[], [(0, 1)]]) == [[], []]
    for name, points in zip("abc", lines, strict=True):
        write_run(tmp_path / name, 1, curve(*points))
    figure = curves.learning_curves([group_of(tmp_path / name) for name in "abc"], "return", "return")
    lines_ = [line for line in figure.axes[0].get_lines() if line.get_linestyle() != "None"]
    drawn = [(len(line.get_xdata()), line.get_color()) for line in lines_ if line.is_dashed()]
    blue, orange, green = figures.COLORS[:3]
    shared = [(2, blue), (2, blue), (2, orange), (2, orange), (2, green)]
    assert [one for one in drawn if one[0] == 2] == shared
    # What is a line's own is drawn as the legend has it: the first one whole, the next in dashes of their own.
    assert [one for one in drawn if one[0] != 2] == [(3, orange), (0, orange), (0, green)]


def test_a_round_says_how_many_seeds_are_behind_it(unequal: Path, tmp_path: Path) -> None:
    page = report(unequal, out=tmp_path / "out")
    header = page.rows.index(["after round", "policy return", "seeds", "VLM alone return", "seeds"])
    assert page.rows[header + 1 : header + 5] == [
        ["0", "–", "–", "4.5 ± 2.1", "2"],  # 3 and 6: √(1.5² + 1.5²)
        ["1", "130.0 ± 127.3", "2", "6.0", "1"],  # 220 and 40: √(90² + 90²)
        ["2", "150.0 ± 70.7", "2", "–", "–"],
        ["3", "400.0", "1", "–", "–"],  # one seed has no spread over seeds; 9.0 is over its episodes
    ]
    group = group_of(unequal)
    assert group.policy_after(3).seeds == (1,)
    assert math.isnan(group.policy_after(3).spread)


def test_an_evaluation_at_a_rounds_own_step_is_of_the_policy_before_it(tmp_path: Path) -> None:
    write_run(tmp_path / "mine", 1, curve((0, 1), (5000, 2), (15000, 3), (20000, 4)), {1: 5000, 2: 15000})
    group = group_of(tmp_path / "mine")
    assert [group.policy_after(n).mean for n in (1, 2)] == [3.0, 4.0]


def test_rounds_of_other_seeds_are_not_joined(unequal: Path) -> None:
    figure = figures.performance_per_round(group_of(unequal), "return", "return")
    assert figure is not None
    lines = [container.lines[0] for container in figure.axes[0].containers]
    assert [list(line.get_xdata()) for line in lines] == [[1, 2], [3], [0], [1]]
    assert [line.get_markerfacecolor() == PAPER for line in lines] == [False, True, False, True]


def test_a_run_that_has_only_just_begun(unequal: Path, tmp_path: Path) -> None:
    write_run(unequal, 3)
    page = report(unequal, out=tmp_path / "out")
    [beside] = [row for row in page.rows if row[0].startswith("mine, ")]
    assert beside[:2] == ["mine, 2 of 3 seeds, 20,000 steps", "150 ± 71"]
    [row] = [row for row in page.rows if row[:2] == ["mine", "3"]]
    assert row[2:] == ["0", "–", "–", "–", "–", "–"]
    assert [row[2] for row in page.rows if row[:2] == ["mine", "2 of 3"]] == ["20,000"]
    alone = report(unequal / "seed_3", out=tmp_path / "alone")
    assert "no evaluation yet" in alone.text
    assert any(text.startswith("There is no evaluation yet") for text in alone.text)


def test_a_run_with_only_its_first_evaluation_is_left_out_beside_others(unequal: Path, tmp_path: Path) -> None:
    write_run(unequal, 3, curve((0, -100)))
    page = report(unequal, out=tmp_path / "out")
    assert "± over 2 of 3 seeds, at 20,000 steps, the last that all of them have; 20.0 at first" in page.text
    [row] = [row for row in page.rows if row[:2] == ["mine", "2 of 3"]]
    assert row[2:] == ["20,000", "20.0", "150.0 ± 70.7", "20,000", "150.0 ± 70.7", "107.5 ± 42.4"]
    write_run(tmp_path / "new", 1, curve((0, 10)))
    write_run(tmp_path / "new", 2, curve((0, 30)))
    [(steps, measured)] = group_of(tmp_path / "new").points()  # none has more
    assert (steps, measured.mean, measured.seeds) == (0, 20, (1, 2))


def test_one_seed_has_the_spread_of_its_episodes(unequal: Path, tmp_path: Path) -> None:
    page = report(unequal / "seed_2", out=tmp_path / "out")
    header = page.rows.index(["after round", "policy return", "VLM alone return"])
    assert page.rows[header + 2][:2] == ["1", "40.0 ± 9.0"]
    assert "± over episodes, at 20,000 steps; 30.0 at first" in page.text
    assert "return, ± standard deviation over episodes (VLM alone 2)" in page.text


def test_the_spread_over_episodes_is_that_of_n(tmp_path: Path) -> None:
    write_run(tmp_path / "mine", 1, curve((0, 1)), {1: 5000}, {0: {"return": [2.0, 4.0]}})
    alone = group_of(tmp_path / "mine").vlm_after(0)
    assert (alone.mean, alone.spread) == (3.0, 1.0)


def test_notes_of_rounds_are_said_once(unequal: Path, tmp_path: Path) -> None:
    page = report(unequal, out=tmp_path / "out")
    assert (
        "Seed 1: the VLM does not beat the constant predictor in rounds 1 to 3. "
        "Seed 2: the VLM does not beat the constant predictor in rounds 1 and 2." in page.text
    )
    assert (
        "The VLM does not beat the constant predictor in rounds 1 and 2."
        in report(unequal / "seed_2", out=tmp_path / "one").text
    )


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ([2], "round 2"),
        ([1, 2], "rounds 1 and 2"),
        ([1, 2, 3, 5], "rounds 1 to 3 and 5"),
        ([1, 3, 4, 6, 7, 8], "rounds 1, 3, 4 and 6 to 8"),
    ],
)
def test_rounds_in_words(rounds: list[int], said: str) -> None:
    assert rounds_said(rounds) == said


def test_each_seeds_rounds_have_its_colour_and_their_numbers(unequal: Path) -> None:
    group = group_of(unequal)
    figure = figures.sigmoid_of_entropy(group, 1.0)
    assert figure is not None
    [axes] = figure.axes
    blue, orange = figures.COLORS[:2]
    assert [(text.get_text(), text.get_color()) for text in axes.texts] == [
        ("1", blue), ("2", blue), ("3", blue), ("1", orange), ("2", orange),
    ]  # fmt: skip
    first, second, third = (text.get_position()[0] for text in axes.texts[:3])
    assert first == pytest.approx(-0.9)
    # At 0.6 and 0.61, were they not to lie on each other: as far to either side.
    assert second + third == pytest.approx(0.6 + 0.61)
    assert third - second > 0.1
    assert [tick.get_text() for tick in axes.get_yticklabels()][-2:] == ["seed 1", "seed 2"]
    curve_over_training = figures.entropy(group)
    assert curve_over_training is not None
    dots = [dots for dots in curve_over_training.axes[0].collections if len(dots.get_offsets())]
    assert [tuple(dot.get_facecolor()[0]) for dot in dots] == [
        tuple(dot.get_facecolor()[0]) for dot in axes.collections
    ]


def test_the_proses_sign_mirrors_the_sigmoid(tmp_path: Path) -> None:
    write_run(tmp_path / "mine", 1, curve((0, 1)), {1: 5000})  # ε = −0.9
    for sign in (1.0, -1.0):
        figure = figures.sigmoid_of_entropy(group_of(tmp_path / "mine"), sign)
        assert figure is not None
        (dots,) = figure.axes[0].collections
        assert np.asarray(dots.get_offsets())[0].tolist() == pytest.approx([-0.9, 1 / (1 + math.exp(0.9 * sign))])
        (line,) = figure.axes[0].lines
        x, y = map(np.asarray, line.get_data())
        assert np.interp(-0.9, x, y) == pytest.approx(1 / (1 + math.exp(0.9 * sign)), abs=1e-3)


def test_entropy_over_training_is_per_action_dimension(tmp_path: Path) -> None:
    write_run(tmp_path / "mine", 1, curve((0, 1)), {1: 5000})
    folder = tmp_path / "mine" / "seed_1"
    path = folder / "rounds" / "round_001.json"
    path.write_text(path.read_text().replace('"rows"', '"action_dim": 4, "rows"'))
    (folder / "logs" / "csv").mkdir(parents=True)
    (folder / "logs" / "csv" / "metrics.csv").write_text("step,train/entropy\n1000,-2\n2000,6\n")
    figure = figures.entropy(group_of(tmp_path / "mine"))
    assert figure is not None
    (line,) = figure.axes[0].lines
    assert np.asarray(line.get_ydata()).tolist() == [-0.5, 1.5]


def test_places_keep_their_distance() -> None:
    assert figures.spaced([0.0, 0.25, 2.0], 0.5) == [-0.125, 0.375, 2.0]
    # A block meets the next one: {0, 0} would reach 0.25, too near to 0.5. Offsets −1/2, 0, 1/2 around the mean 1/6.
    assert figures.spaced([0.0, 0.0, 0.5], 0.5) == pytest.approx([1 / 6 - 0.5, 1 / 6, 1 / 6 + 0.5])
    assert figures.spaced([], 0.5) == []


def test_of_many_rounds_some_numbers_stand_below_the_sigmoid(tmp_path: Path) -> None:
    write_run(tmp_path / "many", 1, curve((0, 1), (99_000, 2)), {n: 1000 * n for n in range(1, 31)})
    figure = figures.sigmoid_of_entropy(group_of(tmp_path / "many"), 1.0)
    assert figure is not None
    assert sorted(int(text.get_text()) for text in figure.axes[0].texts) == [1, 4, 7, 10, 13, 16, 19, 22, 25, 28]


def test_driving_has_er_and_dd_over_seeds(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    columns = "env_steps,return,return_std,distance,distance_std,collision,collision_std\n"
    alone = {0: {"return": [1.0], "distance": [20.0]}, 1: {"return": [3.0], "distance": [30.0]}}
    write_run(folder, 1, columns + "0,-10,1,5,1,0,0\n5000,100,2,110,3,60,4\n", {1: 4000}, alone, ROAD)
    write_run(folder, 2, columns + "0,-30,1,7,1,0,0\n5000,140,2,150,3,80,4\n", {1: 4000}, alone, ROAD)
    page = report(folder, out=tmp_path / "out")
    # ER 100 and 140: 120 ± √(20² + 20²); DD 110 m and 150 m: 130 ± 28.3.
    for name, value in (("last ER", "120.0 ± 28.3"), ("last DD (m)", "130.0 ± 28.3")):
        assert page.text[page.text.index(name) + 1] == value
    header = page.rows.index(
        ["configuration", "seed", "steps", "first ER", "best ER", "at steps", "last ER", "last DD (m)",
         "collisions (N·s)", "lane invasions", "area under curve"]
    )  # fmt: skip
    assert page.rows[header + 1][6:10] == ["100.0 ± 2.0", "110.0 ± 3.0", "60.0 ± 4.0", "–"]
    assert page.rows[header + 3][1:10] == [
        "all 2", "5,000", "−20.0", "120.0 ± 28.3", "5,000", "120.0 ± 28.3", "130.0 ± 28.3", "70.0 ± 14.1", "–",
    ]  # fmt: skip
    for label, value in (("ER", "120.0 ± 28.3"), ("DD (m)", "130.0 ± 28.3")):
        head = ["after round", f"policy {label}", "seeds", f"VLM alone {label}", "seeds"]
        [header] = [i for i, row in enumerate(page.rows) if row[:5] == head]
        assert page.rows[header + 2][:3] == ["1", value, "2"]
    assert ["method", "ER", "DD (m)", "ER"] in page.rows
    [beside] = [row for row in page.rows if row[0].startswith("mine, ")]
    assert beside[:3] == ["mine, 2 seeds, 5,000 steps", "120 ± 28", "130 ± 28"]
    [covr] = [row for row in page.rows if row[0] == "COVR (Ours)"]
    assert covr[1:3] == ["248 ± 81", "259 ± 85"]  # Table 1
    assert not any("return" in cell for row in page.rows for cell in row)


def test_tasks_have_curves_of_their_own(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "swing", 1, curve((0, 10), (10000, 20)))
    write_run(tmp_path / "runs" / "drive", 1, "env_steps,return,distance\n0,-10,5\n5000,100,110\n", env=ROAD)
    page = report(tmp_path / "runs", out=tmp_path / "out")
    assert {"DMControl cartpole-swingup", "Road highway"} <= set(page.text)
    assert {row[6] for row in page.rows if row[:1] == ["configuration"]} == {"last return", "last ER"}


def test_a_sweep_below_the_folder_of_all_runs_is_found(tmp_path: Path) -> None:
    write_run(tmp_path / "plain", 1, curve((0, 1)))
    for seed in (1, 2):
        write_run(tmp_path / "sweep" / "rad", seed, curve((0, seed)))
    found = [path.relative_to(tmp_path).parts[0] for path in find_runs([tmp_path])]
    assert found == ["plain", "sweep", "sweep"]


def test_a_page_that_no_report_wrote_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", 1, curve((0, 1)))
    page = tmp_path / "site" / "index.html"
    page.parent.mkdir()
    page.write_text("<html>mine</html>")
    assert main(["report", str(tmp_path / "run"), "--out", str(page.parent)]) == 2
    assert f"{page} is no report's page" in capsys.readouterr().err
    assert page.read_text() == "<html>mine</html>"
    page.unlink()
    report(tmp_path / "run", out=page.parent)
    report(tmp_path / "run", out=page.parent)  # its own may be


def test_no_number_is_minus_zero() -> None:
    assert [number(value) for value in (-0.04, -0.06, 0.0, -1234.5)] == ["0.0", "−0.1", "0.0", "−1,234.5"]


def test_where_a_simulator_is_makes_no_configuration(tmp_path: Path) -> None:
    one, other = (
        {"data": {"init_args": {"env": {"class_path": "covr_lightning.envs.Carla", "init_args": place}, "seed": 1}}}
        for place in ({"port": 2000, "tm_port": 8000, "town": 1}, {"port": [2010], "tm_port": None, "town": 1})
    )
    assert differences(one, other) == []
    other["data"]["init_args"]["env"]["init_args"]["town"] = 2
    assert differences(one, other) == ["data.env.town is 1 there, 2 here"]


def test_a_vlm_whose_every_answer_is_unparsable_says_so_first(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 1, curve((0, 1)), {1: 5000})
    path = tmp_path / "run" / "seed_1" / "rounds" / "round_001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "unparsable_after": 1.0, "error_after": None}))
    text = report(tmp_path / "run", out=tmp_path / "out").text
    assert text[text.index("unparsable answers") + 1] == "100 %"


def test_a_mean_over_some_of_the_answers_says_over_how_many(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 1, curve((0, 1)), {1: 5000})
    columns = {
        "high": np.array([True, True, True, False]), "score": np.array([3.0, 3, 3, 1]),
        "action": np.zeros((4, 1), np.float32), "before": np.full((4, 1), 0.5, np.float32),
        "before_valid": np.array([True, False, False, True]), "before_answered": np.ones(4, bool),
        "frame_rows": np.array([0, 3]), "frames": np.zeros((2, 3, 4, 8), np.uint8),
        "action_low": np.array([-1.0]), "action_high": np.array([1.0]),
    }  # fmt: skip
    save_file(columns, tmp_path / "run" / "seed_1" / "rounds" / "round_001_samples.safetensors")
    page = report(tmp_path / "run", out=tmp_path / "out")
    assert ["1", "high", "3", "0.750 (1 of 3)", "–"] in page.rows
    assert ["1", "low", "1", "0.750", "–"] in page.rows
    assert "Rows of D_f in round 1: the first is of high return." in page.text
    assert (tmp_path / "out" / "index.html").read_text().count('style="--frames:2"') == 2


def test_the_similarity_is_the_mean_over_dimensions() -> None:
    # 1 − (|0.5 − 0| / 2 + |0 − 0.2| / 4) / 2 = 0.85; the second row's answer could not be parsed, the third is low.
    columns = {
        "high": np.array([True, True, False]), "action": np.array([[0.5, 0.0], [0.0, 0.0], [1.0, 2.0]]),
        "after": np.array([[0.0, 0.2], [9.0, 9.0], [-1.0, -2.0]]), "after_valid": np.array([True, False, True]),
        "action_low": np.array([-1.0, -2.0]), "action_high": np.array([1.0, 2.0]),
    }  # fmt: skip
    assert figures.similarities(columns, True, "after") == pytest.approx([0.85])
    assert figures.similarities(columns, False, "after") == pytest.approx([0.0])
    assert figures.similarities(columns, True, "before").shape == (0,)
