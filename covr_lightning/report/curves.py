"""Curves of several configurations over environment steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from covr_lightning.report.drawing import COLORS, HEIGHT, WIDTH, new_figure
from covr_lightning.report.figures import legend, looks, steps_axis
from covr_lightning.report.groups import Group

#: Rows of names that a figure has room for; inches for each row more.
_ROWS, _ROW = 3, 0.26

#: Length of each colour's part of a line that several share, in widths of the line.
_TURN = 4.0

#: A point of a line.
Point = tuple[float, float]


def learning_curves(groups: Sequence[Group], name: str, label: str) -> Figure:
    """Fig. 3: mean over seeds with a band of one standard deviation, each seed as a thin line.

    Of one group alone the rounds are vertical lines.
    Where several are one line, to the last digit, their colours take turns on it.

    Args:
        groups: One line each.
        name: Column of the curve.
        label: What it is called.
    """
    figure, axes = new_figure()
    of_groups = [group.points(name) for group in groups]
    stretches = shared_stretches([[(step, mean) for step, (mean, *_) in points] for points in of_groups])
    for group, points, own_stretches, (color, dashes, marker) in zip(
        groups, of_groups, stretches, looks(len(groups)), strict=True
    ):
        if len(group.runs) > 1:
            for run in group.runs:
                own = [(p["env_steps"], p[name]) for p in run.curve if name in p]
                axes.plot(*zip(*own, strict=True), color=color, linewidth=0.8, alpha=0.45) if own else None
        if not points:
            continue
        steps = np.array([step for step, _ in points])
        mean, spread = (np.array([one[i] for _, one in points], dtype=float) for i in (0, 1))
        axes.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.18, linewidth=0)
        mark = marker if len(steps) < 40 else ""
        name_ = f"{group.name}, {group.who(points[-1][1])}" if len(group.runs) > 1 else group.name
        name_ = f"\u200b{name_}" if name_.startswith("_") else name_  # Matplotlib hides such a label
        axes.plot(steps, mean, color=color, linestyle="", marker=mark, markersize=3.5)
        for stretch, turn, of in own_stretches:
            line = dashes if of == 1 else (-_TURN * turn, (_TURN, _TURN * (of - 1)))
            axes.plot(*zip(*stretch, strict=True), color=color, linewidth=2, linestyle=line)
        axes.plot([], [], color=color, linewidth=2, linestyle=dashes, label=name_, marker=mark, markersize=3.5)
        if len(groups) == 1:
            for i, round_ in enumerate(group.first.rounds):
                text = "fine-tune round" if i == 0 else None
                axes.axvline(round_["env_steps"], color=COLORS[1], linewidth=1.2, linestyle=(0, (4, 3)), label=text)
    axes.set(xlabel="environment steps", ylabel=label)
    steps_axis(axes)
    figure.set_size_inches(WIDTH, HEIGHT + _ROW * max(0, legend(axes) - _ROWS))
    return figure


def shared_stretches(lines: Sequence[Sequence[Point]]) -> list[list[tuple[list[Point], int, int]]]:
    """Each line in stretches between which it is shared by others, or by no others any more.

    Args:
        lines: Points of each, in the order of their first coordinate.

    Returns:
        Of each line its stretches: the points, its number among the lines that have all of them, and how many have.
    """
    owners: dict[tuple[Point, Point], list[int]] = {}
    for number, line in enumerate(lines):
        for segment in itertools.pairwise(line):
            owners.setdefault(segment, []).append(number)
    stretches = []
    for number, line in enumerate(lines):
        own = []
        for sharers, segments in itertools.groupby(itertools.pairwise(line), key=owners.__getitem__):
            first, *rest = segments
            own.append(([*first, *(end for _, end in rest)], sharers.index(number), len(sharers)))
        stretches.append(own)
    return stretches
