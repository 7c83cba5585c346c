"""What the runs' configurations are: a line for each, and the settings in which they differ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from covr_lightning.report.groups import Group
from covr_lightning.report.guidance import guides
from covr_lightning.report.page import Page, table, text_cell
from covr_lightning.report.runs import Run, class_name, init_args
from covr_lightning.sweep.differences import SEEDS, result_settings, shown

#: Value of a key that a configuration does not have.
MISSING = "–"

#: ProgressiveFineTune's parts where its configuration has null.
_DEFAULTS = {
    name: f"covr_lightning.finetune.{part}"
    for name, part in (
        ("schedule", "LinearSchedule"), ("filter", "EDDF"), ("weight", "RALW"), ("score", "ReturnScore")
    )
}  # fmt: skip

#: A class and its module.
_CLASS_PATH = re.compile(r"([A-Za-z_]\w*\.)+[A-Z]\w*")


def method(run: Run) -> str:
    """A run's method in a line: its parts that are not the plain agent's, its prior with λ, its rounds.

    For instance ``RandomCrop, DelayedPrior λ = 1 from round 4, LinearSchedule ψ₀ = 5,000, EDDF, RALW``.
    """
    model = {name: run.setting("model", name) for name in ("augmentation", "views", "encoder", "actor_head", "prior")}
    augmentation = class_name(model["augmentation"])
    parts = ["no augmentation" if augmentation in ("", "NoAugmentation") else augmentation]
    parts += [class_name(model[name]) for name in ("views", "encoder", "actor_head") if model[name]]
    parts += [class_name(objective) for objective in run.setting("model", "objectives", default=[])]
    sampler = run.setting("data", "sampler")
    parts += [class_name(sampler)] if sampler else []
    return ", ".join([*parts, _prior(model["prior"]), *_rounds(run)])


def _prior(part: Any) -> str:
    name = class_name(part)
    if name in ("", "NoPrior"):
        return "no prior"
    settings = (part.get("init_args") or {}) if isinstance(part, dict) else {}
    if "lam" in settings:
        name += f" λ = {_short(settings['lam'])}"
    elif {"start", "floor"} <= settings.keys():
        name += f" λ = {_short(settings['start'])} to {_short(settings['floor'])}"
    name += f" from round {settings['after_rounds']}" if "after_rounds" in settings else ""
    return name + " with a Q filter" * bool(settings.get("q_filter"))


def _rounds(run: Run) -> list[str]:
    """Schedule, filter and weight; what is null there is the paper's."""
    settings = run.fine_tuning()
    schedule = (settings or {}).get("schedule")
    if settings is None or class_name(schedule) == "NeverSchedule":
        return ["no rounds"]
    when = class_name(schedule) or "LinearSchedule"
    given = init_args(schedule)
    if "psi0_env_steps" in given:
        when += f" ψ₀ = {_short(given['psi0_env_steps'])}"
    elif "at_env_steps" in given:
        at = given["at_env_steps"]
        when += f" {', '.join(map(_short, at if isinstance(at, list) else [at]))}"
    names = [class_name(settings.get("filter")) or "EDDF", class_name(settings.get("weight")) or "RALW"]
    return [when, *names, *filter(None, [class_name(settings.get("score"))])]


def _short(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def differences(page: Page, groups: Sequence[Group]) -> None:
    """Settings in which the configurations differ."""
    page.section("Configurations")
    if len(groups) == 1:
        page.add(f"<p>All runs have one configuration: {escape(_settings(groups[0].runs[0]))}.</p>")
        return
    rows = differing(groups)
    if not rows:
        page.add("<p>What they differ in looks the same.</p>")
        return
    # Where some lack a part, the row of its class says so; the settings that they lack with it are folded.
    settings = [_settings_and_parts(group.runs[0]) for group in groups]
    folded = [key for key, row in rows.items() if len({*row} - {MISSING}) == 1 and _with_its_part(key, settings)]
    cells = {key: [text_cell(text) for text in (key, *row)] for key, row in rows.items()}
    head = ["key", *(group.name for group in groups)]
    shown_ = [row for key, row in cells.items() if key not in folded]
    if shown_:
        page.add(table(head, shown_, f"Keys that differ ({MISSING}: not there); seeds and places left out."))
    if folded:
        more = "1 key that only some have" if len(folded) == 1 else f"{len(folded)} keys that only some have"
        inside = table(head, [cells[key] for key in folded])
        page.add(f"<details><summary>{more}, with one value</summary>{inside}</details>")


def _with_its_part(key: str, settings: Sequence[tuple[dict[str, Any], set[str]]]) -> bool:
    """Whether all that lack a key lack the part that it is a setting of, or have one of another class there.

    False where the part is there without the key, as a version has it that did not know the key yet: nobody can tell
    then from the part's class that this differs. False for a part's own key, too.
    """
    if any(key in parts for _, parts in settings):
        return False
    part = max((part for _, parts in settings for part in parts if key.startswith(f"{part}.")), key=len, default="")
    classes = {one.get(part) for one, _ in settings if key in one}
    return bool(part) and all(one.get(part) not in classes for one, _ in settings if key not in one)


def differing(groups: Sequence[Group]) -> dict[str, list[str]]:
    """The keys in which the groups' configurations differ, each with the value of every group as it is shown.

    A part's class stands at the part's own key, by its name where that tells the classes apart, and so does the default
    of a round's part where one has null. Keys in which nothing
    looks different are left out, and so are those that hold nothing where they are at all (null, or an empty list).
    """
    settings = [_settings_and_parts(group.runs[0])[0] for group in groups]
    rows = {}
    for key in dict.fromkeys(key for one in settings for key in one):
        if key in SEEDS or not any(one.get(key) not in (None, [], {}) for one in settings):
            continue
        default = _DEFAULTS.get(key.rpartition(".")[2]) if key.startswith("trainer.callbacks.") else None
        full = [shown(default if one[key] is None else one[key]) if key in one else MISSING for one in settings]
        row = [text.rsplit(".", 1)[-1] if _CLASS_PATH.fullmatch(text) else text for text in full]
        row = row if len(set(row)) == len(set(full)) else full
        if len(set(row)) > 1:
            rows[key] = row
    return rows


def _settings_and_parts(run: Run) -> tuple[dict[str, Any], set[str]]:
    """A run's settings with each part's class at the part's own key, and these keys."""
    end, settings = ".class_path", result_settings(run.configuration)
    parts = {key.removesuffix(end) for key in settings if key.endswith(end)}
    return {key.removesuffix(end): value for key, value in settings.items()}, parts


def _settings(run: Run) -> str:
    parts = {
        "task": run.task or run.env, "environment steps": f"{run.length:,}",
        "batch": run.setting("data", "batch_size", default="?"),
    }  # fmt: skip
    if guides(run) or run.rounds:
        parts["λ"] = run.setting("model", "prior", "lam", default=MISSING)
        parts["VLM"] = run.setting("vlm", "path", default=MISSING)
    return ", ".join(f"{name} {value}" for name, value in parts.items())
