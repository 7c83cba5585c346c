"""The report's learning curves, and what they come to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from covr_lightning.report import figures
from covr_lightning.report.page import Page, number, plus_minus, table
from covr_lightning.report.runs import Group, Run, over_seeds


def learning(page: Page, groups: Sequence[Group]) -> None:
    """Fig. 3 and the last evaluations."""
    page.section(
        "Learning curves",
        "Mean of the evaluation's episodes, deterministic policy. The band is one standard deviation: over seeds where "
        "a configuration has several (each a thin line; the curve ends where the slowest seed is), over episodes with "
        "one.",
    )
    names = [("return", "ER" if groups[0].drives else "return")]
    if any(group.drives for group in groups):
        names.append(("distance", "DD (m)"))
    if not any(run.curve for group in groups for run in group.runs):
        page.missing("There is no evaluation yet: the first is written to curve.csv when the warm-up begins.")
        return
    drawn = [
        page.figure(figures.learning_curves(groups, name, label), f"learning {name}", f"{label} over environment steps")
        for name, label in names
    ]
    page.figures(drawn, wide=len(drawn) == 1)
    rows = []
    for group in groups:
        for run in group.runs:
            if not run.curve:
                continue
            best = max(run.curve, key=lambda point: point["return"])
            last = run.curve[-1]
            rows.append(
                [
                    group.name, str(run.seed), f"{int(last['env_steps']):,}", number(run.curve[0]["return"]),
                    plus_minus(best["return"], best.get("return_std", math.nan)), f"{int(best['env_steps']):,}",
                    plus_minus(last["return"], last.get("return_std", math.nan)), number(area(run)),
                ]
            )  # fmt: skip
        rows += _all_seeds(group)
    head = ["configuration", "seed", "steps", "first", "best", "at steps", "last", "area under curve"]
    note = (
        "± standard deviation over episodes, of all seeds over seeds. The area is divided by its steps: a mean return."
    )
    page.add(table(head, rows, note))


def _all_seeds(group: Group) -> list[list[str]]:
    """One row: means over the seeds of a configuration and their spread, once all have come equally far."""
    runs = group.runs
    if len(runs) < 2 or len({run.curve[-1]["env_steps"] if run.curve else -1 for run in runs}) > 1 or not runs[0].curve:
        return []
    best, last, areas = (
        plus_minus(*over_seeds([(value(run), math.nan) for run in runs]))
        for value in (
            lambda run: max(point["return"] for point in run.curve), lambda run: run.curve[-1]["return"], area,
        )
    )  # fmt: skip
    first = number(over_seeds([(run.curve[0]["return"], math.nan) for run in runs])[0])
    steps = f"{int(runs[0].curve[-1]['env_steps']):,}"
    return [[group.name, f"all {len(runs)}", steps, first, best, "–", last, areas]]


def area(run: Run) -> float:
    """Area under a run's learning curve by the trapezoid rule, divided by the steps that it spans."""
    points = [(point["env_steps"], point["return"]) for point in run.curve]
    if len(points) < 2:
        return math.nan
    parts = ((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))
    return sum(parts) / (points[-1][0] - points[0][0])
