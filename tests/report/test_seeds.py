"""Seeds of one configuration taken together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from covr_lightning.report import figures
from covr_lightning.report.runs import Group, find_runs, group_runs, read_run

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
        entropy = {1: -1.0, 2: 0.5, 3: 0.51}[n] + 0.1 * seed
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


def test_each_seeds_rounds_have_its_colour_and_their_numbers(unequal: Path) -> None:
    group = group_of(unequal)
    figure = figures.sigmoid_of_entropy(group, 1.0)
    assert figure is not None
    [axes] = figure.axes
    blue, orange = figures.COLORS[:2]
    assert [(text.get_text(), text.get_color()) for text in axes.texts] == [
        ("1", blue), ("2", blue), ("3", blue), ("1", orange), ("2", orange),
    ]  # fmt: skip
    assert [text.get_position()[0] for text in axes.texts[:2]] == pytest.approx([-0.9, 0.6])
    assert axes.texts[2].get_position()[0] > 0.7  # at 0.61, were its number not to lie on round 2's
    assert [tick.get_text() for tick in axes.get_yticklabels()][-2:] == ["seed 1", "seed 2"]
    curve_over_training = figures.entropy(group)
    assert curve_over_training is not None
    dots = [dots for dots in curve_over_training.axes[0].collections if len(dots.get_offsets())]
    assert [tuple(dot.get_facecolor()[0]) for dot in dots] == [
        tuple(dot.get_facecolor()[0]) for dot in axes.collections
    ]


def test_places_keep_their_distance() -> None:
    assert figures.spaced([0.0, 0.25, 2.0], 0.5) == [0.0, 0.5, 2.0]
