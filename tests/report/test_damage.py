"""The report on folders in which something is missing, odd or set aside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from covr_lightning.report.groups import group_runs
from covr_lightning.report.reading import read_run
from covr_lightning.report.runs import find_runs
from tests.report.pages import report

CURVE = "env_steps,return,return_std\n8,11.0,1.0\n1000,90.0,2.0\n2000,40.0,3.0\n"
ROUND = {
    "round": 1, "env_steps": 1000, "rows": 20, "kept": 5, "trained": 4, "held_out": 1, "held_out_episodes": 1,
    "entropy": -0.5, "action_dim": 1, "tau": 3.0, "score_quantiles": [0.0, 1.0, 2.0, 3.0, 4.0],
    "histogram": {"edges": [0.0, 2.0, 4.0], "all": [15, 5], "kept": [0, 5]}, "kept_top95": 19, "tau_top95": 0.1,
    "error_before": 0.5, "error_after": 0.4, "error_constant": 0.45, "noise": 0.1, "unparsable_before": 0.0,
    "unparsable_after": 0.1, "unanswered_before": 0.0, "unanswered_after": 0.0, "losses": [1.0, 0.5],
    "seconds": 3.0, "renewed": 2, "seconds_renewing": 1.0, "vlm_return": 30.0, "peak_memory_mb": 200.0, "note": "",
}  # fmt: skip
SAMPLES = {
    "high": np.array([True, False]), "score": np.ones(2), "action": np.zeros((2, 1)), "before": np.zeros((2, 1)),
    "before_valid": np.array([True, False]), "before_answered": np.array([True, False]),
    "after": np.zeros((2, 1)), "after_valid": np.array([True, False]), "after_answered": np.array([True, True]),
    "frames": np.zeros((2, 3, 4, 4), dtype=np.uint8), "frame_rows": np.array([0, 1]),
    "action_low": -np.ones(1), "action_high": np.ones(1),
}  # fmt: skip
ALONE = {
    "return": np.array([30.0, 32.0]), "actions": np.zeros((3, 1)), "rewards": np.ones(3),
    "frames": np.zeros((2, 3, 4, 4), dtype=np.uint8), "frame_steps": np.array([0, 2]),
}  # fmt: skip
PROFILE = {"seconds": {"update": 5.0, "environment": 2.0}, "counts": {"update": 100}, "total_seconds": 8.0}
ODD: list[Any] = [None, "text", [], float("nan")]


def small_run(folder: Path, seed: int = 0, curve: str = CURVE, **config: Any) -> Path:
    (folder / "rounds").mkdir(parents=True)
    callback = {"class_path": "covr_lightning.callbacks.ProgressiveFineTune", "init_args": {"vlm_episodes": 2}}
    whole = {
        "data": {"init_args": {"seed": seed, "max_env_steps": 2000, "env": {"class_path": "DMControl"}}},
        "trainer": {"callbacks": [callback]}, **config,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(whole))
    (folder / "curve.csv").write_text(curve)
    (folder / "profile.json").write_text(json.dumps(PROFILE))
    (folder / "rounds" / "round_001.json").write_text(json.dumps(ROUND))
    save_file(SAMPLES, folder / "rounds" / "round_001_samples.safetensors")
    save_file(ALONE, folder / "rounds" / "round_001_vlm.safetensors", {"asked": "10", "unparsable": "1"})
    return folder


@pytest.mark.parametrize("key", ROUND)
def test_a_round_with_a_missing_or_odd_figure(key: str, tmp_path: Path) -> None:
    folder = small_run(tmp_path / "run")
    path = folder / "rounds" / "round_001.json"
    missing = {name: value for name, value in ROUND.items() if name != key}
    path.write_text(json.dumps(missing))
    rounds = read_run(folder).rounds
    assert [one["round"] for one in rounds] == ([] if key in ("round", "env_steps") else [1])
    report(folder, out=tmp_path / "out")
    for odd in ODD:
        path.write_text(json.dumps({**ROUND, key: odd}))
        if (key, odd) != ("note", "text"):
            assert [{**one, "note": ""} for one in read_run(folder).rounds] == [{**one, "note": ""} for one in rounds]


@pytest.mark.parametrize("histogram", [{}, {"edges": [0.0, 1.0], "all": [1, 2], "kept": [1]}, {"edges": 3}, [1]])
def test_a_histogram_that_is_none(histogram: Any, tmp_path: Path) -> None:
    folder = small_run(tmp_path / "run")
    (folder / "rounds" / "round_001.json").write_text(json.dumps({**ROUND, "histogram": histogram}))
    assert "histogram" not in read_run(folder).rounds[0]
    report(folder, out=tmp_path / "out")


@pytest.mark.parametrize("file", ["samples", "vlm"])
def test_recorded_rows_and_episodes_that_lack_a_column(file: str, tmp_path: Path) -> None:
    folder = small_run(tmp_path / "run")
    path = folder / "rounds" / f"round_001_{file}.safetensors"
    columns = load_file(path)
    for name in columns:
        save_file({k: v for k, v in columns.items() if k != name}, path, {"format": "pt"})
        run = read_run(folder)
        if file == "samples":
            assert bool(run.samples) == name.endswith("answered")
        else:
            assert bool(run.vlm) == (name != "return")
        report(folder, out=tmp_path / "out")
    (folder / "rounds" / "round_abc_samples.safetensors").write_bytes(b"")
    read_run(folder)


@pytest.mark.parametrize(
    "profile", [{"seconds": None}, {"seconds": {"update": None, "x": 1.0}, "counts": {"x": "y"}, "total_seconds": "z"},
                {"seconds": [], "counts": 3}],
)  # fmt: skip
def test_a_profile_that_is_none(profile: dict[str, Any], tmp_path: Path) -> None:
    folder = small_run(tmp_path / "run")
    (folder / "profile.json").write_text(json.dumps(profile))
    report(folder, out=tmp_path / "out")


def test_an_evaluation_without_a_return_is_left_out(tmp_path: Path) -> None:
    page = report(
        small_run(tmp_path / "run", curve="env_steps,return,return_std\n8,nan,nan\ninf,5,1\n1000,90.0,2.0\n"),
        out=tmp_path / "out",
    )
    assert ["run", "0", "1,000"] in [row[:3] for row in page.rows]


def test_a_line_without_its_end_is_not_whole_yet(tmp_path: Path) -> None:
    folder = small_run(tmp_path / "run", curve="env_steps,return,return_std\n8,11.0,1.0\n1000,9")  # of 90.0
    assert [point["return"] for point in read_run(folder).curve] == [11]
    (folder / "curve.csv").write_bytes(b"env_steps,return,return_std\r\n8,11.0,1.0\r\n1000,90.0,2.0\r\n")
    assert [point["return"] for point in read_run(folder).curve] == [11, 90]


def test_settings_that_are_no_numbers(tmp_path: Path) -> None:
    config = {"init_args": {"seed": "a", "max_env_steps": "b", "env": {"class_path": "DMControl"}}}
    run = read_run(small_run(tmp_path / "run", data=config))
    assert (run.seed, run.length) == (0, 0)


def test_what_a_sweep_has_set_aside_is_no_seed(tmp_path: Path) -> None:
    for seed in (1, 2):
        small_run(tmp_path / "config" / f"seed_{seed}", seed)
    small_run(tmp_path / "config" / "seed_3.cut", 3, curve="env_steps,return,return_std\n8,1.0,1.0\n")
    [group] = group_runs([read_run(folder) for folder in find_runs([tmp_path])])
    assert [run.seed for run in group.runs] == [1, 2]
    assert find_runs([tmp_path / "config" / "seed_3.cut"]) == [tmp_path / "config" / "seed_3.cut"]  # named


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    folder = small_run(tmp_path / "<td><i>x")
    page = report(folder, out=tmp_path / "out")
    assert "<td><i>x" in " ".join(page.text)
    assert "<td><i>x" not in (tmp_path / "out" / "index.html").read_text()
    hidden = [small_run(tmp_path / name, curve=CURVE.replace("90", str(n))) for n, name in enumerate(["_a", "b"])]
    shutil.copytree(hidden[0], tmp_path / "c\udcff")
    report(*hidden, tmp_path / "c\udcff", out=tmp_path / "out")


def test_answers_that_never_came_are_said(tmp_path: Path) -> None:
    folder = small_run(tmp_path / "run")
    facts = {"asked": "10", "unparsable": "1", "unanswered": "2"}
    save_file(ALONE, folder / "rounds" / "round_001_vlm.safetensors", facts)
    (folder / "rounds" / "round_001.json").write_text(json.dumps({**ROUND, "unanswered_after": 0.25}))
    text = " ".join(report(folder, out=tmp_path / "out").text)
    assert "Of 10 answers that the VLM was asked for while it played alone, 1 could not be parsed and 2 never" in text
    assert "no answer: 0 % → 25 %" in text
    assert "before no answer" in text
    assert "after unparsable" in text
