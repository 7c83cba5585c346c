"""The page about runs: what it says is what their folders hold."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from filelock import FileLock
from PIL import Image
from safetensors.numpy import load_file

from covr_lightning.cli import main
from covr_lightning.report.groups import group_runs
from covr_lightning.report.reading import read_run
from covr_lightning.report.runs import find_runs
from covr_lightning.saving.lock import LOCK_FILE
from tests.report.pages import report
from tests.short_runs import SMALL, fit

#: A filter that leaves rows out, and the VLM playing alone.
RECORDED = ("--trainer.callbacks.filter", "covr_lightning.finetune.EDDF", "--trainer.callbacks.vlm_episodes", "1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, untrained_vlm: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    short = ("--data.max_env_steps", "4000", "--data.eval_every_env_steps", "2000")
    assert fit(folder, untrained_vlm, *RECORDED, *short, "--data.label_every_agent_steps", "5", "--video", "true") == 0
    return folder / "run"


def curve(run: Path) -> list[dict[str, float]]:
    with (run / "curve.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_the_page_is_whole_and_asks_nobody(run: Path, tmp_path: Path) -> None:
    page = report(run, out=tmp_path)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "://" not in text
    assert "<script" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert all(place.startswith(("data:", "#")) for place in page.fetched)
    assert all(place[1:] in page.ids for place in page.fetched if place.startswith("#"))
    assert sum(place.startswith("data:video/mp4") for place in page.fetched) == len(
        list((run / "videos").glob("*.mp4"))
    )
    assert sum(place.startswith("data:image/png") for place in page.fetched) >= 16
    assert 'name="viewport"' in text
    for name in (
        "learning-return",
        "run-performance",
        "run-vlm-error",
        "run-kept",
        "run-entropy",
        "run-similarity",
        "run-guidance-loss",
    ):
        with Image.open(tmp_path / f"{name}.png") as png:
            assert png.size[0] > 600


def test_numbers_of_the_curve(run: Path, tmp_path: Path) -> None:
    points = curve(run)
    page = report(run, out=tmp_path)
    [row] = [row for row in page.rows if row[:2] == ["run", "0"]]
    best = max(points, key=lambda point: point["return"])
    (s0, r0), (s1, r1), (s2, r2) = [(p["env_steps"], p["return"]) for p in points]
    area = ((s1 - s0) * (r0 + r1) / 2 + (s2 - s1) * (r1 + r2) / 2) / (s2 - s0)
    assert row[2] == "4,000"
    assert row[3] == f"{r0:.1f}"
    assert row[4] == f"{best['return']:.1f}"  # of one episode, which has no spread
    assert row[6] == f"{r2:.1f}"
    assert row[7] == f"{area:.1f}"


def test_numbers_of_the_rounds(run: Path, tmp_path: Path) -> None:
    page = report(run, out=tmp_path)
    rounds = [json.loads(path.read_text()) for path in sorted((run / "rounds").glob("round_*.json"))]
    assert [r["round"] for r in rounds] == [1, 2]
    for r in rounds:
        assert sum(r["histogram"]["all"]) == r["rows"]
        assert sum(r["histogram"]["kept"]) == r["kept"]
        assert r["kept_top95"] == np.ceil(0.95 * r["rows"])
        [row] = [row for row in page.rows if row[:2] == [str(r["round"]), f"{r['env_steps']:,}"]]
        assert row[2:5] == [str(r["rows"]), str(r["kept"]), str(r["kept_top95"])]
        assert row[6] == f"{r['entropy']:.2f}".replace("-", "−")
        assert row[7] == f"{r['tau']:.1f}"
        assert r["held_out_episodes"] >= 1
        assert row[8] == f"{r['held_out']} / {r['held_out_episodes']}"
        assert row[11] == f"{r['error_constant']:.3f}"
        assert row[12] == f"{r['noise']:.3f}"


def test_numbers_of_the_vlm_alone_and_of_the_policy_after_a_round(run: Path, tmp_path: Path) -> None:
    page = report(run, out=tmp_path)
    points = curve(run)
    header = page.rows.index(["after round", "policy return", "VLM alone return"])
    table = page.rows[header + 1 : header + 5]
    alone = [load_file(run / "rounds" / f"round_{n:03d}_vlm.safetensors")["return"] for n in range(3)]
    # Rounds at 1200 and 3600, evaluations at 40, 2000 and 4000; one episode has no spread.
    assert table[0] == ["0", "–", f"{alone[0][0]:.1f}"]
    assert table[1] == ["1", f"{points[1]['return']:.1f}", f"{alone[1][0]:.1f}"]
    assert table[2] == ["2", f"{points[2]['return']:.1f}", f"{alone[2][0]:.1f}"]
    assert table[3][:2] == ["last evaluation, 4,000 steps", table[2][1]]
    summary = json.loads((run / "summary.json").read_text())
    assert [r["vlm_return"] for r in summary["rounds"]] == pytest.approx([alone[1][0], alone[2][0]])


def test_numbers_of_the_similarity(run: Path, tmp_path: Path) -> None:
    page = report(run, out=tmp_path)
    for n in (1, 2):
        columns = load_file(run / "rounds" / f"round_{n:03d}_samples.safetensors")
        for kind, high in (("high", True), ("low", False)):
            [row] = [row for row in page.rows if row[:2] == [str(n), kind] and len(row) == 5]
            chosen = [i for i, is_high in enumerate(columns["high"]) if is_high == high]
            assert row[2] == str(len(chosen))
            for cell, when in ((row[3], "before"), (row[4], "after")):
                known = [i for i in chosen if columns[f"{when}_valid"][i]]
                like = [1 - abs(columns[when][i, 0] - columns["action"][i, 0]) / 2 for i in known]  # actions in [−1, 1]
                assert cell == (f"{sum(like) / len(like):.3f}" if like else "–")


def test_covr_test_with_a_rounds_adapter_writes_what_the_round_wrote(
    run: Path, untrained_vlm: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "rounds" / "round_001_vlm.safetensors"
    of_round = load_file(path)
    path.unlink()
    adapter = tmp_path / "run" / "rounds" / "round_001_adapter"
    arguments = ["--config", str(run / "config.yaml"), "--actor", "vlm", "--vlm.adapter", str(adapter)]
    assert main(["test", *arguments, "--runs_dir", str(tmp_path / "tests")]) == 0
    alone = load_file(path)
    assert alone.keys() == of_round.keys()
    for name, column in alone.items():
        assert np.array_equal(column, of_round[name]), name
    # What another VLM does, or this one otherwise, is not what the run's round has come to.
    path.unlink()
    aside = adapter.rename(adapter.with_name("round_001_adapter.0123456789ab"))
    assert main(["test", *arguments[:-1], str(aside), "--runs_dir", str(tmp_path / "tests")]) == 0
    adapter = aside.rename(adapter)
    for other in (["--vlm.frames", "2"], ["--data.seed", "8"], ["--data.label_every_agent_steps", "3"]):
        assert main(["test", *arguments, *other, "--runs_dir", str(tmp_path / "tests")]) == 0
    assert not path.exists()


def test_a_run_under_way(run: Path, tmp_path: Path) -> None:
    part = tmp_path / "run"
    shutil.copytree(run, part)
    (part / "summary.json").unlink()
    (part / "rounds" / "round_002.json").write_text('{"round": 2, "env_st')  # being written
    for name in ("curve.csv", "logs/csv/metrics.csv"):
        lines = (part / name).read_text().splitlines()
        (part / name).write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:3])
    with FileLock(part / LOCK_FILE):
        page = report(part, out=tmp_path / "out")
        assert "seed 0: running" in " ".join(page.text)
    assert [row[2] for row in page.rows if row[:2] == ["run", "0"]] == ["2,000"]
    assert "seed 0: stopped" in " ".join(report(part, out=tmp_path / "out").text)
    assert "seed 0: finished" in " ".join(report(run, out=tmp_path / "out").text)


def with_seed(run: Path, folder: Path, seed: int, add: float) -> Path:
    """A copy of a run with another seed and higher returns."""
    shutil.copytree(run, folder)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["seed_everything"] = config["data"]["init_args"]["seed"] = config["model"]["init_args"]["seed"] = seed
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with (folder / "curve.csv").open("w") as file:
        rows = [{**point, "return": point["return"] + add} for point in curve(run)]
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_seeds_of_one_configuration_are_one_curve(run: Path, tmp_path: Path) -> None:
    with_seed(run, tmp_path / "sweep" / "mine" / "seed_1", 1, 0.0)
    with_seed(run, tmp_path / "sweep" / "mine" / "seed_2", 2, 10.0)
    folders = find_runs([tmp_path / "sweep"])
    [group] = group_runs([read_run(folder) for folder in folders])
    assert (group.name, [run.seed for run in group.runs]) == ("mine", [1, 2])
    for (steps, measured), point in zip(group.points(), curve(run), strict=True):
        assert steps == point["env_steps"]
        assert measured.mean == pytest.approx(point["return"] + 5)
        assert measured.spread == pytest.approx(50**0.5)  # (5² + 5²) / (2 − 1)
        assert measured.seeds == (1, 2)
    page = report(tmp_path / "sweep", out=tmp_path / "out")
    assert f"{curve(run)[-1]['return'] + 5:.1f} ± 7.1" in " ".join(page.text)
    [first] = [row for row in page.rows if row[:2] == ["mine", "1"]]
    [both] = [row for row in page.rows if row[:2] == ["mine", "all 2"]]
    best = max(point["return"] for point in curve(run))
    assert both[3] == f"{float(first[3]) + 5:.1f}"
    assert both[4] == f"{best + 5:.1f} ± 7.1"
    assert both[7] == f"{float(first[7]) + 5:.1f} ± 7.1"  # seed 2's area is 10 larger


def test_a_run_counts_once_and_a_seed_too(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = with_seed(run, tmp_path / "mine", 1, 0.0)
    (tmp_path / "link").symlink_to(first)
    monkeypatch.chdir(tmp_path)
    assert find_runs([Path("link"), first, Path("mine")]) == [Path("link")]
    with_seed(run, tmp_path / "mine-2", 1, 10.0)
    with_seed(run, tmp_path / "mine-3", 2, 20.0)
    groups = group_runs(
        [read_run(folder) for folder in find_runs([Path(name) for name in ("mine", "mine-2", "mine-3")])]
    )
    assert [(group.name, [one.folder.name for one in group.runs]) for group in groups] == [
        ("mine", ["mine", "mine-3"]), ("mine-2", ["mine-2"]),
    ]  # fmt: skip


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00", b"- a\n- b\n", b"text"])
def test_files_that_cannot_be_read(run: Path, tmp_path: Path, damage: bytes) -> None:
    copied = with_seed(run, tmp_path / "mine", 1, 0.0)
    for name in ("curve.csv", "logs/csv/metrics.csv", "summary.json", "profile.json"):
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_bytes(damage)
    damaged = read_run(copied)
    assert (damaged.curve, damaged.profile, damaged.state) == ([], None, "stopped")
    (copied / "config.yaml").write_bytes(damage)
    assert read_run(copied).configuration == {}
    (copied / "summary.json").write_text('{"env_steps": null}')
    assert read_run(copied).state == "stopped"


def test_seeds_that_were_named_one_by_one_have_one_name(run: Path, tmp_path: Path) -> None:
    for names, together in (
        (["rad_s9", "rad_s10"], "rad"), (["b", "b-2"], "b"), (["apple", "pear"], "apple, pear"), (["1", "2"], "1, 2"),
        (["covr_night_a", "covr_night_b"], "covr_night"), (["rad_s1_old", "rad_s12_new"], "rad"),
        (["apple", "apply"], "apple, apply"), (list("abcd"), "a and 3 more"),
    ):  # fmt: skip
        runs = [read_run(with_seed(run, tmp_path / together / name, i, 0.0)) for i, name in enumerate(names)]
        assert [group.name for group in group_runs(runs)] == [together]


def test_configurations_that_differ_are_told_apart(run: Path, tmp_path: Path) -> None:
    other = with_seed(run, tmp_path / "other", 0, 1.0)
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["data"]["init_args"]["batch_size"] = 16
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    page = report(run, other, out=tmp_path / "out")
    header = page.rows.index(["key", "run", "other"])
    assert page.rows[header + 1] == ["data.batch_size", "8", "16"]
    assert not any(row[0] in ("data.seed", "name", "runs_dir") for row in page.rows)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    plain = tmp_path / "plain.yaml"
    plain.write_text(
        "model: {class_path: covr_lightning.agent.SACModule, init_args: "
        "{prior: {class_path: covr_lightning.agent.NoPrior}}}\ntrainer: {callbacks: null}\n"
    )
    arguments = [*SMALL, "--config", str(plain), "--data.max_env_steps", "1200"]
    assert main(["fit", *arguments, "--vlm.path", "nowhere", "--runs_dir", str(tmp_path), "--name", "base"]) == 0
    text = " ".join(report(tmp_path / "base", out=tmp_path / "out").text)
    assert "This configuration fine-tunes no VLM" in text
    assert "--video true" in text
    (tmp_path / "base" / "curve.csv").unlink()
    (tmp_path / "base" / "summary.json").unlink()
    assert "There is no evaluation yet" in " ".join(report(tmp_path / "base", out=tmp_path / "out").text)


def test_files_of_rounds_that_are_missing(run: Path, tmp_path: Path) -> None:
    part = tmp_path / "run"
    shutil.copytree(run, part)
    for path in part.glob("rounds/*.safetensors"):
        path.unlink()
    for path in part.glob("rounds/*.json"):
        figures = json.loads(path.read_text())
        assert figures["action_dim"] == 1
        del figures["histogram"], figures["action_dim"]
        path.write_text(json.dumps(figures))
    (part / "profile.json").unlink()
    text = " ".join(report(part, out=tmp_path / "out").text)
    assert "--trainer.callbacks.samples 64" in text
    assert "--trainer.callbacks.vlm_episodes 10" in text
    assert "The distribution of returns is not in these rounds' files" in text
    assert "ε over training is not drawn" in text
    assert "profile.json" in text


def test_where_the_time_went(run: Path, tmp_path: Path) -> None:
    part = tmp_path / "run"
    shutil.copytree(run, part)
    profile = {"seconds": {"critic": 30.0, "label": 10.0}, "counts": {"critic": 131}, "total_seconds": 50.0}
    (part / "profile.json").write_text(json.dumps(profile))
    page = report(part, out=tmp_path / "out")
    assert ["critic", "30.0", "60 %", "131", ""] in page.rows
    assert ["label", "10.0", "20 %", "–", ""] in page.rows


def test_runs_that_trained_no_agent_are_left_out(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.yaml").write_text("data: {class_path: covr_lightning.finetune.SavedRows}\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("data: [\n")
    capsys.readouterr()
    page = report(run, tmp_path / "alone", tmp_path / "broken", out=tmp_path / "out")
    assert "1 run" not in "".join(page.text)
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'alone'} fine-tuned a VLM alone" in printed
    assert f"{tmp_path / 'broken' / 'config.yaml'} cannot be read" in printed
    assert main(["report", str(tmp_path / "alone")]) == 2
    assert "a report is about runs that train an agent" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "sentence"), [("nowhere", "nowhere is no folder"), (".", "holds no run"), ("--colour", "unrecognized")]
)
def test_a_wrong_path_is_one_sentence(
    path: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", path, "x"] if path.startswith("--") else ["report", path]) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert "\n" not in said


def test_the_published_numbers_are_those_of_the_task(run: Path, tmp_path: Path) -> None:
    page = report(run, out=tmp_path)
    [covr] = [row for row in page.rows if row[0] == "COVR (Ours)"]
    assert covr[1] == "872 ± 2"  # Table 4, cartpole-swingup
    assert any(row[0].startswith("run, seed 0, 4,000 steps") for row in page.rows)
