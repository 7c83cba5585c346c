"""What the report shows, section by section, each from what the runs' folders hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from covr_lightning.report import figures
from covr_lightning.report.configurations import method
from covr_lightning.report.page import Page, bar, number, percent, plus_minus, table, text_cell
from covr_lightning.report.published import comparison, per_round
from covr_lightning.report.runs import Group, Run, class_name, over_seeds

#: What settings are called on the command line.
CALLBACK = "--trainer.callbacks"

_NO_PROFILE = "the run's folder has no <code>profile.json</code>, which a run writes from its first evaluation on"


def overview(page: Page, groups: Sequence[Group]) -> None:
    """What each group is, a few numbers of it, and how far its runs are."""
    page.section("At a glance")
    for group in groups:
        page.add(f"<h3>{escape(group.name)} {_states(group)}</h3>")
        page.add(f'<p class="small">{escape(method(group.runs[0]))}</p>')
        tiles = [*_return_tiles(group), *_round_tiles(group)]
        page.add(f'<div class="tiles">{"".join(tiles)}</div>')
        for run in group.runs:
            notes = [f"round {r['round']}: {r['note']}" for r in run.rounds if r.get("note")]
            if notes:
                seed = f"Seed {run.seed}, " if len(group.runs) > 1 else ""
                page.add(f'<p class="small">{escape(seed + "; ".join(notes))}.</p>')


def _states(group: Group) -> str:
    """One label per state of the group's runs."""
    labels = []
    for state in ("finished", "running", "stopped"):
        runs = [run for run in group.runs if run.state == state]
        if not runs:
            continue
        seeds = f"seed {', '.join(str(run.seed) for run in runs)}" if len(runs) < 6 else f"{len(runs)} seeds"
        far = f" at {min(run.env_steps for run in runs):,} of {runs[0].length:,} steps" if state != "finished" else ""
        labels.append(f'<span class="state {state}">{seeds}: {state}{far}</span>')
    return " ".join(labels)


def _tile(name: str, value: str, more: str) -> str:
    inside = f'<span class="name">{escape(name)}</span><b>{escape(value)}</b><span>{escape(more)}</span>'
    return f'<div class="tile">{inside}</div>'


def _return_tiles(group: Group) -> list[str]:
    points = group.points()
    if not points:
        return [_tile("return", "–", "no evaluation yet that all seeds have")]
    over = f"over {len(group.runs)} seeds" if len(group.runs) > 1 else "over episodes"
    first, last, best = points[0], points[-1], max(points, key=lambda point: point[1])
    label = "ER" if group.drives else "return"
    tiles = [
        _tile(f"last {label}", plus_minus(*last[1:]), f"± {over}, at {last[0]:,} steps; {number(first[1])} at first"),
        _tile(f"best {label}", plus_minus(*best[1:]), f"at {best[0]:,} steps"),
    ]
    if group.drives:
        end = group.points("distance")[-1]
        tiles.append(_tile("last DD", f"{plus_minus(*end[1:])} m", f"± {over}"))
    return tiles


def _round_tiles(group: Group) -> list[str]:
    run = group.first
    if not run.rounds:
        return []
    r = run.rounds[-1]
    seed = f", seed {run.seed}" if len(group.runs) > 1 else ""
    kept = f"{r['kept']:,} of {r['rows']:,} in round {r['round']}{seed}"
    tiles = [_tile("rows kept", percent(r["kept"] / max(1, r["rows"])), kept)]
    before, after, constant = (_value(r, f"error_{name}") for name in ("before", "after", "constant"))
    if not math.isnan(after):
        verdict = f"{'beats' if after < constant else 'does not beat'} the constant predictor's {number(constant, 3)}"
        errors = f"{number(before, 3)} → {number(after, 3)}"
        tiles.append(_tile("VLM error, held out", errors, f"in round {r['round']}{seed}; {verdict}"))
        unparsable = percent(_value(r, "unparsable_after"))
        tiles.append(_tile("unparsable answers", unparsable, f"of held-out rows after round {r['round']}"))
    return tiles


def published(page: Page, groups: Sequence[Group]) -> None:
    """The paper's numbers beside the measured ones, per task."""
    page.section("Beside the paper")
    by_setting: dict[str, list[Group]] = {}
    for group in groups:
        found = comparison(group.runs[0])
        by_setting.setdefault(found.setting if found else "", []).append(group)
    for setting, members in by_setting.items():
        found = comparison(members[0].runs[0])
        names = ", ".join(group.name for group in members)
        if found is None:
            page.missing(f"The paper has no results on the task of {escape(names)}.")
            continue
        entries = [(row.method, row.mean, str(row), False) for row in found.results]
        for group in members:
            mean, spread = over_seeds(group.policy_at_end())
            if not math.isnan(mean):
                n = len(group.runs)
                seeds = f"{n} seeds" if n > 1 else f"seed {group.runs[0].seed}"
                steps = int(min(run.curve[-1]["env_steps"] for run in group.runs if run.curve))
                entries.append((f"{group.name}, {seeds}, {steps:,} steps", mean, plus_minus(mean, spread, 0), True))
        entries.sort(key=lambda entry: -entry[1])
        most = max(entry[1] for entry in entries)
        rows = [[text_cell(name), value.replace("-", "−"), bar(mean / most)] for name, mean, value, _ in entries]
        label = "ER" if found.setting.startswith("CARLA") else "return"
        ours = [i for i, entry in enumerate(entries) if entry[3]]
        caption = f"{setting}, as the paper prints it; measured here: the last evaluation, coloured."
        if found.caution:
            page.missing(escape(found.caution))
        page.add(table(["method", label, ""], rows, caption, ours))
        size = members[0].runs[0].setting("model", "augmentation", "size", default=None)
        page.add(
            '<p class="small">The paper\'s numbers are of its own sizes, lengths and VLM (three seeds)'
            + (f"; these runs see {size}×{size} pixels" if size else "")
            + f", batch {members[0].runs[0].setting('data', 'batch_size', default='–')}, hidden "
            f"{members[0].runs[0].setting('model', 'hidden', default='–')}.</p>"
        )


def rounds(page: Page, groups: Sequence[Group]) -> None:
    """Tables 14 and 15, and each round's figures."""
    page.section(
        "Round by round",
        "Left: how well the policy does at its first evaluation after each round, and the VLM when it acts alone "
        "(Tables 14, 15). Right: the VLM's error against executed actions of kept rows that it was not trained on; it "
        "has learnt something when the filled dot is under the black line.",
    )
    for group in named(page, groups):
        if not _has_rounds(page, group):
            continue
        label = "ER" if group.drives else "return"
        page.figures(
            [
                page.figure(
                    figures.performance_per_round(group, "return", label), f"{group.name} performance",
                    f"{label} of policy and VLM after each round",
                ),
                page.figure(
                    figures.vlm_error(group.first), f"{group.name} vlm error",
                    f"VLM error on held-out rows{of_seed(group)}",
                ),
            ]
        )  # fmt: skip
        page.add(_performance_table(group, "return", label))
        if group.drives:
            page.add(_performance_table(group, "distance", "DD (m)"))
        if not any(run.vlm for run in group.runs):
            folder = group.first.folder
            page.missing(
                "How the VLM does alone is not recorded: "
                f"<code>{CALLBACK}.vlm_episodes 10</code> plays it in each round, and <code>covr test --config "
                f"{escape(str(folder / 'config.yaml'))} --actor vlm --vlm.adapter "
                f"{escape(str(folder / 'rounds' / 'round_001_adapter'))}</code> adds a round of this run."
            )
        for run in group.runs:
            page.add(_figures_table(run, f"Seed {run.seed}" if len(group.runs) > 1 else ""))


def _performance_table(group: Group, name: str, label: str) -> str:
    paper = per_round(group.runs[0], "DD" if name == "distance" else "ER")
    numbers = sorted(
        {r["round"] for run in group.runs for r in run.rounds} | {n for run in group.runs for n in run.vlm}
    )
    head = ["after round", f"policy {label}", f"VLM alone {label}"]
    head += ["paper: policy", "paper: VLM"] if paper else []
    rows = []
    for n in [0, *(n for n in numbers if n)]:
        policy = [] if n == 0 else group.policy_after(n, name)
        cells = [str(n), plus_minus(*over_seeds(policy)), plus_minus(*over_seeds(group.vlm_after(n, name)))]
        if paper:
            cells += [str(paper.get(f"{who} after round {n}", "–")) for who in ("policy", "VLM")]
        rows.append(cells)
    end = ["last evaluation", plus_minus(*over_seeds(group.policy_at_end(name))), "–"]
    rows.append([*end, f"{paper['policy at the end']} (end)", "–"] if paper else end)
    spread = "over seeds" if len(group.runs) > 1 else "over episodes"
    return table(head, rows, f"{label}, ± standard deviation {spread}" + (" (paper: #HW on CARLA)" if paper else ""))


def _figures_table(run: Run, caption: str) -> str:
    head = ["round", "steps", "rows", "kept", "top 95 %", "w > 0", "ε", "τ", "VLM error", "after", "constant",
            "unparsable", "s", "MB"]  # fmt: skip
    rows = [
        [
            str(r["round"]), f"{r['env_steps']:,}", f"{r['rows']:,}", f"{r.get('kept', 0):,}",
            f"{r['kept_top95']:,}" if "kept_top95" in r else "–", f"{r.get('trained', 0):,}",
            number(_value(r, "entropy"), 2), number(_value(r, "tau")),
            number(_value(r, "error_before"), 3), number(_value(r, "error_after"), 3),
            number(_value(r, "error_constant"), 3),
            f"{percent(_value(r, 'unparsable_before'))} → {percent(_value(r, 'unparsable_after'))}",
            number(_value(r, "seconds"), 0), number(_value(r, "peak_memory_mb"), 0),
        ]
        for r in run.rounds
    ]  # fmt: skip
    return table(head, rows, caption)


def buffer(page: Page, groups: Sequence[Group]) -> None:
    """Fig. 8."""
    page.section(
        "What each round trained on",
        "Returns of the rows in D_f when the round came: grey all rows, blue those that the filter kept, orange its "
        "threshold τ, dashed the lowest row that a fixed filter of the best 95 % would keep (Fig. 8).",
    )
    for group in named(page, groups, with_rounds=True):
        run = group.first
        drawn = [
            page.figure(
                figures.returns_in_buffer(r), f"{group.name} returns round {r['round']}",
                f"Returns in D_f, round {r['round']}{of_seed(group)}",
            )
            for r in run.rounds
        ]  # fmt: skip
        kept = page.figure(
            figures.kept_per_round(run), f"{group.name} kept", f"Rows kept in each round{of_seed(group)}"
        )
        page.figures([kept, *drawn])
        if not any(drawn):
            page.missing(
                "The distribution of returns is not in these rounds' files: an earlier version of the package wrote "
                "them; new rounds record it without a setting."
            )


def entropy(page: Page, groups: Sequence[Group]) -> None:
    """Fig. 7."""
    page.section(
        "Exploration: ε and the threshold",
        "τ = median + σ(ε)·IQR of the returns. The more the policy still explores, the higher ε. Left over training, "
        "right where each round was on the sigmoid, its number below; of several seeds each in its colour (Fig. 7).",
    )
    for group in named(page, groups, with_rounds=True):
        filter_ = (group.first.fine_tuning() or {}).get("filter") or {}
        sign = -1.0 if (filter_.get("init_args") or {}).get("sign") == "prose" else 1.0
        page.figures(
            [
                page.figure(figures.entropy(group), f"{group.name} entropy", "ε over training"),
                page.figure(
                    figures.sigmoid_of_entropy(group, sign), f"{group.name} sigmoid",
                    "σ(ε) of each round" if sign > 0 else "σ(−ε) of each round (sign: prose)",
                ),
            ]
        )  # fmt: skip
        other = class_name(filter_)
        if other not in ("", "EDDF"):
            page.add(f'<p class="small">This run\'s filter is {escape(other)}, which ε does not move.</p>')


def times(page: Page, groups: Sequence[Group]) -> None:
    """Where the time went."""
    page.section("Where the time went")
    for group in named(page, groups):
        for run in group.runs:
            seed = f"Seed {run.seed}: " if len(group.runs) > 1 else ""
            seconds: dict[str, float] = (run.profile or {}).get("seconds") or {}
            if seconds:
                total = float((run.profile or {}).get("total_seconds") or sum(seconds.values()))
                counts = (run.profile or {}).get("counts") or {}
                parts = sorted(seconds.items(), key=lambda part: -part[1])
                most = max(parts[0][1], 1e-9)
                rows = [
                    [
                        name,
                        number(s, 1),
                        percent(s / total) if total else "–",
                        f"{counts[name]:,}" if name in counts else "–",
                        bar(s / most),
                    ]
                    for name, s in parts
                ]
                page.add(table(["part", "seconds", "share", "times", ""], rows, f"{seed}{_duration(total)} in all"))
            elif run.rounds:
                spent = sum(_value(r, "seconds") for r in run.rounds)
                renewing = sum(_value(r, "seconds_renewing") for r in run.rounds)
                page.missing(
                    f"{escape(seed)}Fine-tune rounds took {_duration(spent)} and renewing answers "
                    f"{_duration(renewing)}; the rest is not known: {_NO_PROFILE}."
                )
            else:
                page.missing(f"{escape(seed)}{_NO_PROFILE.capitalize()}.")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _value(round_: dict[str, Any], name: str) -> float:
    value = round_.get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def of_seed(group: Group) -> str:
    """Which seed's details are shown, where there are several."""
    return f", seed {group.first.seed}" if len(group.runs) > 1 else ""


def named(page: Page, groups: Sequence[Group], with_rounds: bool = False) -> Iterator[Group]:
    """The groups, or those that have rounds, each under its name if there are several."""
    for group in groups:
        if with_rounds and not group.round_numbers:
            continue
        if len(groups) > 1:
            page.add(f"<h3>{escape(group.name)}</h3>")
        yield group


def _has_rounds(page: Page, group: Group) -> bool:
    """Whether there is any round; says why not otherwise."""
    if any(run.rounds for run in group.runs):
        return True
    settings = group.first.fine_tuning()
    if settings is None:
        page.missing(
            "This configuration fine-tunes no VLM: rounds come with the callback "
            "<code>covr_lightning.callbacks.ProgressiveFineTune</code> at <code>trainer.callbacks</code>."
        )
    elif class_name(settings.get("schedule")) == "NeverSchedule":
        page.missing("This configuration has no rounds: its <code>schedule</code> is <code>NeverSchedule</code>.")
    else:
        psi = ((settings.get("schedule") or {}).get("init_args") or {}).get("psi0_env_steps", 5000)
        page.missing(f"No round has been run yet: the first is due at {psi:,} environment steps (ψ₀).")
    return False
