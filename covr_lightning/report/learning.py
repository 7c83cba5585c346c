"""The report's learning curves, and what they come to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape

from covr_lightning.report import curves
from covr_lightning.report.groups import Group, mean_and_spread
from covr_lightning.report.page import Page, number, plus_minus, table
from covr_lightning.report.runs import Run

#: What else a driving run's evaluation counts, by its name in the curve.
CONTACTS = {"collision": "collisions (N·s)", "lane_invasions": "lane invasions"}

#: A learning curve: environment steps, mean return, spread.
Curve = Sequence[tuple[float, float, float]]


def learning(page: Page, groups: Sequence[Group]) -> None:
    """Fig. 3 and the last evaluations, task by task."""
    page.section(
        "Learning curves",
        "Mean of the evaluation's episodes, deterministic policy. The band is one standard deviation: over seeds where "
        "a configuration has several (each a thin line; the thick one is their mean and ends where the slowest is), "
        "over episodes with one. Where colours take turns, the configurations' means are the same, to the last digit "
        "written.",
    )
    tasks: dict[str, list[Group]] = {}
    for group in groups:
        tasks.setdefault(" ".join(filter(None, [group.runs[0].env, group.runs[0].task])), []).append(group)
    for task, members in tasks.items():
        if len(tasks) > 1:
            page.add(f"<h3>{escape(task)}</h3>")
        _task(page, members)


def _task(page: Page, groups: Sequence[Group]) -> None:
    if not any(run.curve for group in groups for run in group.runs):
        page.missing("There is no evaluation yet: the first is written to curve.csv when the warm-up begins.")
        return
    drives, label = groups[0].drives, groups[0].label
    if drives:
        page.add("<p>ER: the sum of an episode's rewards. DD: the distance driven in an episode, in metres.</p>")
    drawn = [
        page.figure(curves.learning_curves(groups, name, title), f"learning {name}", f"{title} over environment steps")
        for name, title in [("return", label), ("distance", "DD (m)")][: 1 + drives]
    ]
    page.figures(drawn, wide=len(drawn) == 1)
    rows = []
    for group in groups:
        for run in group.runs:
            curve = [(p["env_steps"], p["return"], p.get("return_std", math.nan)) for p in run.curve]
            distances = [
                plus_minus(p["distance"], p.get("distance_std", math.nan)) for p in run.curve if "distance" in p
            ]
            ends = [*(distances[-1:] or ["–"]), *_contacts(run)] if drives else []
            rows.append(_row([group.name, str(run.seed)], curve, number(area(curve)), ends))
        rows += _all_seeds(group)
    head = ["configuration", "seed", "steps", f"first {label}", f"best {label}", "at steps", f"last {label}"]
    head += ["last DD (m)", *CONTACTS.values()] if drives else []
    several = (
        "; in a row of several seeds over seeds, up to the last evaluation that all of them have. Best: the highest "
        "point of a row's curve, for several seeds of their mean curve"
    )
    n = {run.eval_episodes for group in groups for run in group.runs}
    episodes = f"an evaluation's {n.pop()} episodes" if len(n) == 1 and n.isdisjoint({None, 1}) else "episodes"
    over = f"± standard deviation over {episodes}" + several * any(len(group.runs) > 1 for group in groups)
    note = (
        f"{over}. The area is divided by its steps: a mean {label}. Each is over a row's own steps, so those of "
        "rows that end at others do not compare."
    )
    page.add(table([*head, "area under curve"], rows, note, dense=drives))


def _contacts(run: Run) -> list[str]:
    """What a driving run's last evaluation has of :data:`CONTACTS`."""
    last = run.curve[-1] if run.curve else {}
    return [plus_minus(last.get(name, math.nan), last.get(f"{name}_std", math.nan)) for name in CONTACTS]


def _row(names: list[str], curve: Curve, area_: str, ends: list[str]) -> list[str]:
    """A row of the table of curves; dashes for a run that has no evaluation yet. `ends` stand before the area."""
    end = [*ends, area_]
    if not curve:
        return [*names, "0", *["–"] * 4, *end]
    best = max(curve, key=lambda point: point[1])
    last = curve[-1]
    return [
        *names, f"{int(last[0]):,}", number(curve[0][1]), plus_minus(*best[1:]), f"{int(best[0]):,}",
        plus_minus(*last[1:]), *end,
    ]  # fmt: skip


def _all_seeds(group: Group) -> list[list[str]]:
    """One row: the mean curve of a configuration's seeds, as far as all have come, and the mean area under theirs."""
    points = group.points()
    if not points or len(points[0][1].seeds) < 2:
        return []
    end = points[-1][0]
    curves = [
        [(p["env_steps"], p["return"], math.nan) for p in run.curve if p["env_steps"] <= end]
        for run in group.runs
        if run.seed in points[0][1].seeds
    ]
    areas = mean_and_spread([area(curve) for curve in curves])
    ends = []
    for name in ("distance", *CONTACTS) if group.drives else ():
        of_seeds = [plus_minus(*one[:2]) for _, one in group.points(name)]
        ends.append(of_seeds[-1] if of_seeds else "–")
    n, of = len(points[0][1].seeds), len(group.runs)
    who = f"all {n}" if n == of else f"{n} of {of}"
    mean = [(step, one.mean, one.spread) for step, one in points]
    return [_row([group.name, who], mean, plus_minus(*areas), ends)]


def area(curve: Curve) -> float:
    """Area under a learning curve by the trapezoid rule, divided by the steps that it spans."""
    if len(curve) < 2:
        return math.nan
    parts = ((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(curve))
    return sum(parts) / (curve[-1][0] - curve[0][0])
