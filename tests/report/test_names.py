"""Names of configurations: told apart, with their tasks and folders, and no longer than there is room for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from covr_lightning.cli import main
from covr_lightning.report import curves, figures
from covr_lightning.report.drawing import new_figure
from covr_lightning.report.groups import group_runs
from covr_lightning.report.reading import read_run
from covr_lightning.report.runs import find_runs
from tests.report.pages import report
from tests.report.test_damage import small_run
from tests.report.test_seeds import ROAD, curve, group_of, write_run

LONG = "a_configuration_whose_name_says_everything_that_was_ever_set_in_it_and_where"


def other(folder: Path, seed: int, size: int) -> None:
    """A run whose configuration is another with each size."""
    write_run(folder, seed, curve((0, 1), (1000, size)))
    path = folder / f"seed_{seed}" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["data"]["batch_size"] = size
    path.write_text(yaml.safe_dump(config))


def names_of(*folders: Path) -> list[str]:
    return [group.name for group in group_runs([read_run(run) for run in find_runs(folders)])]


def test_equal_names_are_told_apart_by_the_folder_that_differs(tmp_path: Path) -> None:
    for size, sweep in enumerate(("night", "day")):
        for seed in (1, 2):
            other(tmp_path / sweep / "runs" / "covr", seed, size)
    other(tmp_path / "day" / "runs" / "rad", 1, 5)
    assert names_of(tmp_path / "night", tmp_path / "day") == ["night/covr", "day/covr", "rad"]


def test_equal_names_in_one_folder_are_numbered(tmp_path: Path) -> None:
    other(tmp_path / "covr", 1, 8)
    other(tmp_path / "covr", 2, 16)
    other(tmp_path / "covr", 3, 32)
    assert names_of(tmp_path) == ["covr", "covr (2)", "covr (3)"]


def test_headings_have_the_task_where_tasks_differ(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "mine", 1, curve((0, 10), (10000, 20)))
    alone = report(tmp_path / "runs", out=tmp_path / "alone").text
    assert "mine " in alone  # in front of its state
    assert "Folders" not in alone  # the page's head has the one run's
    write_run(tmp_path / "runs" / "drive", 1, "env_steps,return,distance\n0,-10,5\n5000,100,110\n", env=ROAD)
    text = report(tmp_path / "runs", out=tmp_path / "out").text
    for heading in ("mine · DMControl cartpole-swingup", "drive · Road highway"):
        assert f"{heading} " in text  # at a glance
        assert heading in text
    assert f"seed 1 → {tmp_path / 'runs' / 'mine' / 'seed_1'}" in text


def test_long_names_have_a_column_of_their_own(tmp_path: Path) -> None:
    for i, name in enumerate([f"{LONG}_{i}" for i in range(4)] + ["short"]):
        other(tmp_path / name, 1, i)
    figure = curves.learning_curves([group_of(folder) for folder in sorted(tmp_path.iterdir())], "return", "return")
    [legend] = figure.legends
    assert legend._ncols == 1
    assert legend.get_window_extent().width <= figure.bbox.width
    told = [text.get_text() for text in legend.get_texts()]
    assert told[0] == figures.shortened(f"{LONG}_0", 54) != f"{LONG}_0"
    assert len(set(told)) == 5
    figure, axes = new_figure()
    for name in ("one", "two", "three", "four"):
        axes.plot([], [], label=name)
    assert figures.legend(axes, columns=4) == 1
    assert figure.legends[0]._ncols == 4


@pytest.mark.parametrize(("text", "short"), [("abcdefg", "abcdefg"), ("abcdefgh", "abc…fgh"), ("a" * 99, "aaa…aaa")])
def test_long_text_loses_its_middle(text: str, short: str) -> None:
    assert figures.shortened(text, 7) == short


def test_files_of_long_names_can_be_written(tmp_path: Path) -> None:
    for name in (LONG * 3, f"{LONG * 3}_b"):
        small_run(tmp_path / name)
    report(tmp_path / (LONG * 3), tmp_path / f"{LONG * 3}_b", out=tmp_path / "out")
    names = sorted(path.stem for path in (tmp_path / "out").glob("*.png"))
    assert max(map(len, names)) <= 83
    assert any(name.endswith("-vlm-error") for name in names)


def test_what_cannot_be_written_is_not_blamed_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(tmp_path / "run")
    (run / "videos").mkdir()
    (run / "videos" / "step_40.mp4").symlink_to(tmp_path / "gone.mp4")
    report(run, out=tmp_path / "out")  # a video that is gone is a link
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("in the way")
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 2
    assert "give another --out" in capsys.readouterr().err
    monkeypatch.setattr("covr_lightning.report.page.write_png", lambda *_: Path("/nowhere/font").read_bytes())
    assert main(["report", str(run), "--out", str(tmp_path / "else")]) == 2
    said = capsys.readouterr().err
    assert "/nowhere/font cannot be read or written" in said
    assert "--out" not in said
