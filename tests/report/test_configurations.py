"""What the report says of configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from covr_lightning.report.configurations import differing, method
from covr_lightning.report.groups import Group
from covr_lightning.report.page import table, text_cell
from covr_lightning.report.runs import Run
from tests.report.pages import report


def part(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": settings}


def fine_tuning(**settings: Any) -> list[dict[str, Any]]:
    return [part("covr_lightning.callbacks.ProgressiveFineTune", **settings)]


def run_of(model: dict[str, Any], callbacks: list[dict[str, Any]] | None = None, **data: Any) -> Run:
    return Run(
        Path("x"),
        {
            "trainer": {"callbacks": callbacks},
            "model": part("covr_lightning.agent.SACModule", **model),
            "data": part("covr_lightning.data.ExperienceData", **data),
        },
    )


CROP = part("covr_lightning.agent.RandomCrop", size=64)
NEVER = part("covr_lightning.finetune.NeverSchedule")
LINEAR = part("covr_lightning.finetune.LinearSchedule", psi0_env_steps=5000)
SAC = run_of({"augmentation": None, "objectives": [], "prior": None})
DPL = run_of(
    {"augmentation": CROP, "objectives": [], "prior": part("covr_lightning.agent.ConstantPrior", lam=1.0)},
    fine_tuning(schedule=NEVER, filter=None, weight=None, settings={"epochs": 2}),
)
COVR = run_of(
    {
        "augmentation": CROP, "objectives": [],
        "prior": part("covr_lightning.agent.DelayedPrior", lam=0.5, after_rounds=4),
    },
    fine_tuning(schedule=LINEAR, filter=None, weight=part("covr_lightning.finetune.UniformWeight"),
                settings={"epochs": 2}),
)  # fmt: skip


@pytest.mark.parametrize(
    ("run", "line"),
    [
        (SAC, "no augmentation, no prior, no rounds"),
        (DPL, "RandomCrop, ConstantPrior λ = 1, no rounds"),
        (COVR, "RandomCrop, DelayedPrior λ = 0.5 from round 4, LinearSchedule ψ₀ = 5,000, EDDF, UniformWeight"),
        (
            run_of(
                {
                    "augmentation": part("covr_lightning.agent.RandomShift"),
                    "views": part("covr_lightning.agent.DrQViews"), "encoder": "covr_lightning.agent.Flare",
                    "objectives": [part("covr_lightning.agent.CURL"), part("covr_lightning.agent.DeepMDP")],
                    "prior": part("covr_lightning.agent.AnnealedPrior", start=2.0, floor=0.1, q_filter=True),
                },
                sampler=part("covr_lightning.data.ProportionalSampler"),
            ),
            "RandomShift, DrQViews, Flare, CURL, DeepMDP, ProportionalSampler, AnnealedPrior λ = 2 to 0.1 with a Q "
            "filter, no rounds",
        ),
        (
            run_of({}, fine_tuning(schedule=part("covr_lightning.finetune.GivenSchedule", at_env_steps=[900, 50_000]))),
            "no augmentation, no prior, GivenSchedule 900, 50,000, EDDF, RALW",
        ),
        (Run(Path("x"), {}), "no augmentation, no prior, no rounds"),
    ],
)  # fmt: skip
def test_the_method_in_a_line(run: Run, line: str) -> None:
    assert method(run) == line


def test_keys_that_look_different() -> None:
    rows = differing([Group("sac", [SAC]), Group("dpl", [DPL]), Group("covr", [COVR])])
    assert rows == {
        "trainer.callbacks.0": ["–", "ProgressiveFineTune", "ProgressiveFineTune"],
        "trainer.callbacks.0.schedule": ["–", "NeverSchedule", "LinearSchedule"],
        "trainer.callbacks.0.weight": ["–", "RALW", "UniformWeight"],
        "trainer.callbacks.0.settings.epochs": ["–", "2", "2"],
        "trainer.callbacks.0.schedule.psi0_env_steps": ["–", "–", "5000"],
        "model.augmentation": ["null", "RandomCrop", "RandomCrop"],
        "model.augmentation.size": ["–", "64", "64"],
        "model.prior": ["null", "ConstantPrior", "DelayedPrior"],
        "model.prior.lam": ["–", "1.0", "0.5"],
        "model.prior.after_rounds": ["–", "–", "4"],
    }  # neither trainer.callbacks nor its filter, which is null where it is at all


def test_classes_of_one_name_are_told_apart() -> None:
    mine, theirs = (run_of({"augmentation": part(f"{where}.RandomCrop")}) for where in ("mine", "theirs"))
    assert differing([Group("a", [mine]), Group("b", [theirs])]) == {
        "model.augmentation": ["mine.RandomCrop", "theirs.RandomCrop"]
    }


def test_a_default_that_one_names_is_no_difference() -> None:
    named, not_named = (
        run_of({}, fine_tuning(schedule=part("covr_lightning.finetune.LinearSchedule"), filter=filter_))
        for filter_ in (part("covr_lightning.finetune.EDDF"), None)
    )
    assert differing([Group("a", [named]), Group("b", [not_named])]) == {}


def test_what_looks_equal_is_left_out() -> None:
    word, truth = run_of({"tanh": "true"}), run_of({"tanh": True})
    assert differing([Group("a", [word]), Group("b", [truth])]) == {}


def test_settings_of_a_part_that_some_lack_are_folded(tmp_path: Path) -> None:
    for name, run in (("sac", SAC), ("dpl", DPL)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(run.configuration))
    page = report(tmp_path / "sac", tmp_path / "dpl", out=tmp_path / "out")
    start = page.rows.index(["key", "sac", "dpl"])
    keys = [row[0] for row in page.rows[start + 1 :]]
    assert sorted(keys[:4]) == ["model.augmentation", "model.prior", "trainer.callbacks.0",
                                "trainer.callbacks.0.schedule"]  # fmt: skip
    assert keys[4] == "key"
    assert sorted(keys[5:8]) == ["model.augmentation.size", "model.prior.lam", "trainer.callbacks.0.settings.epochs"]
    assert "3 keys that only some have, with one value" in page.text
    assert "RandomCrop, ConstantPrior λ = 1, no rounds" in page.text


def test_a_setting_that_only_a_newer_version_has_is_not_folded(tmp_path: Path) -> None:
    before, after = (yaml.safe_load(yaml.safe_dump(COVR.configuration)) for _ in range(2))
    before["vlm"], after["vlm"] = {"path": "x"}, {"path": "x", "frames": 2}
    after["model"]["init_args"]["prior"]["init_args"]["mean_over"] = "batch"
    other = part("covr_lightning.agent.RandomShift", pad=4)
    after["model"]["init_args"]["augmentation"] = other
    for name, configuration in (("before", before), ("after", after)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(configuration))
    page = report(tmp_path / "before", tmp_path / "after", out=tmp_path / "out")
    start = page.rows.index(["key", "before", "after"])
    end = page.rows.index(["key", "before", "after"], start + 1)
    assert page.rows[start + 1 : end] == [
        ["model.augmentation", "RandomCrop", "RandomShift"],
        ["model.prior.mean_over", "–", "batch"],
        ["vlm.frames", "–", "2"],
    ]
    assert page.rows[end + 1 : end + 3] == [
        ["model.augmentation.size", "64", "–"],
        ["model.augmentation.pad", "–", "4"],
    ]


def test_titles_stand_as_their_cells_do() -> None:
    html = table(["key", "n"], [[text_cell("a"), "1"], [text_cell("b"), "2"]])
    assert '<th scope="col" class="text">key</th><th scope="col">n</th>' in html


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("trainer.callbacks.0.gradient_checkpointing", "trainer.<wbr>callbacks.0.<wbr>gradient_<wbr>checkpointing"),
        ("ProgressiveFineTune", "Progressive<wbr>Fine<wbr>Tune"),
        ("0.05", "0.05"),
        ("a<b", "a&lt;b"),
    ],
)
def test_long_text_breaks_between_words(text: str, html: str) -> None:
    assert text_cell(text) == f'<td class="text">{html}</td>'
