"""The report's figures, each a matplotlib Figure of one size; :mod:`.drawing` turns them into SVG and PNG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from covr_lightning.report.drawing import COLORS, INK, LINE, MUTED, PAPER, new_figure
from covr_lightning.report.groups import Group
from covr_lightning.report.runs import Columns, Run, VLMAlone, figure_of

#: Dimensions of an action that a strip shows.
_SHOWN_DIMENSIONS = 2

#: Height of a row of round numbers below the sigmoid, on its axis, and how many stand in it at most.
_NUMBERS, _MOST_NUMBERS = 0.09, 12

#: Of bars in the colour of the grid's lines.
_OUTLINE: dict[str, Any] = {"edgecolor": MUTED, "linewidth": 0.8}

#: How lines are drawn, and their points, so that no two differ by their colour alone.
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P")

#: Letters that a name in a legend has at most.
_LETTERS = 54

#: Rounds up to which each bar has its number above it, and up to which those of kept rows do.
_ALL_BARS, _KEPT_BARS = 3, 10


class Look(NamedTuple):
    """How one line of several is drawn."""

    color: str
    dashes: Any
    marker: str


class SeedLook(NamedTuple):
    """How a run of a group is drawn.

    Attributes:
        run: The run.
        line: Colour of its line.
        dot: Colour of its rounds.
        dashes: How its line is drawn.
        marker: How its points are.
    """

    run: Run
    line: str
    dot: str
    dashes: Any
    marker: str


def performance_per_round(group: Group, name: str, label: str) -> Figure | None:
    """Tables 14 and 15: the VLM alone and the policy after each round. None if neither is known.

    A line joins rounds that the same seeds are behind; a round that some of the group's seeds lack is hollow.
    """
    rounds = group.round_numbers
    lines = [
        ("policy", COLORS[0], "o", [(n, group.policy_after(n, name)) for n in rounds if n]),
        ("VLM alone", COLORS[1], "s", [(n, group.vlm_after(n, name)) for n in rounds]),
    ]
    lines = [(title, color, mark, [(n, one) for n, one in line if one.seeds]) for title, color, mark, line in lines]
    if not any(line for *_, line in lines):
        return None
    figure, axes = new_figure()
    for title, color, marker, line in lines:
        for seeds, part in itertools.groupby(line, key=lambda item: item[1].seeds):
            stretch = list(part)
            mean, spread = (np.array([one[i] for _, one in stretch], dtype=float) for i in (0, 1))
            whole = len(seeds) == len(group.runs)
            axes.errorbar(
                [n for n, _ in stretch], mean, None if np.isnan(spread).all() else spread, color=color, marker=marker,
                linewidth=2, capsize=4, linestyle="-" if whole else (0, (4, 3)),
                markerfacecolor=color if whole else PAPER,
            )  # fmt: skip
        if line:
            axes.plot([], [], color=color, marker=marker, linewidth=2, label=title)
    if any(len(one.seeds) < len(group.runs) for *_, line in lines for _, one in line):
        axes.plot([], [], color=MUTED, marker="o", markerfacecolor=PAPER, linestyle=(0, (4, 3)), label="fewer seeds")
    axes.set(xlabel="after fine-tune round", ylabel=label)
    _whole_numbers(axes, rounds)
    legend(axes, columns=3)
    return figure


def vlm_error(run: Run) -> Figure | None:
    """The VLM's error on held-out rows before and after each round, beside the constant predictor's and π's noise."""
    rounds = [r for r in run.rounds if _known(r, "error_constant")]
    if not rounds:
        return None
    figure, axes = new_figure()
    x = np.array([r["round"] for r in rounds], dtype=float)
    before, after, constant, noise = (
        np.array([figure_of(r, name) for r in rounds])
        for name in ("error_before", "error_after", "error_constant", "noise")
    )
    for place, one, other in zip(x, before, after, strict=True):
        axes.plot([place, place], [one, other], color=MUTED, linewidth=1.5, zorder=1)
    axes.scatter(x, before, s=52, facecolors="none", edgecolors=COLORS[1], linewidths=2, label="VLM before", zorder=2)
    axes.scatter(x, after, s=58, color=COLORS[1], label="VLM after", zorder=2)
    axes.hlines(constant, x - 0.28, x + 0.28, color=INK, linewidth=2, label="constant predictor")
    if np.isfinite(noise).any():
        axes.hlines(noise, x - 0.28, x + 0.28, color=MUTED, linewidth=2, linestyle=":", label="noise of the policy")
    axes.set(xlabel="fine-tune round", ylabel="mean |a_v − a|")
    axes.set_ylim(0, 1.15 * float(np.nanmax([before, after, constant, noise])))
    _whole_numbers(axes, x.tolist())
    legend(axes)
    return figure


def scores_in_buffer(round_: dict, score: str) -> Figure | None:
    """Fig. 8: the distribution of scores in D_f, what was kept of it, τ, and the bound of a top-95 % filter.

    Args:
        round_: The round's figures.
        score: What the scores are.
    """
    histogram = round_.get("histogram")
    if not histogram:
        return None
    figure, axes = new_figure()
    edges, everything, kept = (np.array(histogram[name]) for name in ("edges", "all", "kept"))
    width = np.diff(edges)
    axes.bar(edges[:-1], everything, width, align="edge", color=LINE, **_OUTLINE, label=f"D_f: {round_['rows']:,} rows")
    axes.bar(edges[:-1], kept, width, align="edge", color=COLORS[0], label=f"kept: {round_['kept']:,}")
    if _known(round_, "tau"):
        axes.axvline(round_["tau"], color=COLORS[1], linewidth=2, label=f"τ = {round_['tau']:.1f}")
    if _known(round_, "tau_top95"):
        text = f"top 95 %: {round_['kept_top95']:,}"
        axes.axvline(round_["tau_top95"], color=INK, linewidth=1.5, linestyle=(0, (4, 3)), label=text)
    axes.set(xlabel=score, ylabel="rows")
    axes.set_title(f"round {round_['round']}, {round_['env_steps']:,} environment steps")
    legend(axes)
    return figure


def kept_per_round(run: Run) -> Figure | None:
    """Fig. 8: rows kept by the run's filter and by a fixed top-95 % filter, of how many."""
    if not run.rounds:
        return None
    figure, axes = new_figure()
    x = np.array([r["round"] for r in run.rounds], dtype=float)
    names = [
        ("rows", "all rows of D_f", LINE),
        ("kept_top95", "top 95 %", MUTED),
        ("kept", "this run's filter", COLORS[0]),
    ]
    names = [name for name in names if any(r.get(name[0]) for r in run.rounds)]
    for i, (name, text, color) in enumerate(names):
        place = x + (i - (len(names) - 1) / 2) * 0.27
        outline = _OUTLINE if color == LINE else {}
        bars = axes.bar(place, [r.get(name, 0) for r in run.rounds], 0.25, color=color, label=text, **outline)
        if len(run.rounds) <= (_KEPT_BARS if name == "kept" else _ALL_BARS):
            upright = 90 if len(run.rounds) > _ALL_BARS else 0
            axes.bar_label(bars, fontsize=9, color=INK, padding=2, rotation=upright)
    axes.set(xlabel="fine-tune round", ylabel="rows")
    axes.margins(y=0.16)
    _whole_numbers(axes, x.tolist())
    legend(axes, columns=3)
    return figure


def entropy(group: Group) -> Figure | None:
    """Fig. 7: the policy's entropy ε per action dimension over training, as logged and as the rounds took it."""
    figure, axes = new_figure()
    drawn = of_rounds = False
    for run, line, dot, dashes, marker in looks_of_seeds(group):
        size = run.action_size
        logged = [(row["step"], row["train/entropy"]) for row in run.metrics if "train/entropy" in row]
        if logged and size:
            steps, values = zip(*logged, strict=True)
            name = f"seed {run.seed}" if len(group.runs) > 1 else "one update's batch"
            axes.plot(steps, np.array(values) / size, color=line, linewidth=1.2, linestyle=dashes, label=name)
            drawn = True
        at = [(r["env_steps"], r["entropy"]) for r in run.rounds if _known(r, "entropy")]
        if at:
            steps, values = zip(*at, strict=True)
            axes.scatter(steps, values, s=52, color=dot, marker=marker, edgecolors=INK, linewidths=1.2, zorder=3)
            drawn = of_rounds = True
    if of_rounds:
        face = "none" if len(group.runs) > 1 else COLORS[1]
        axes.scatter([], [], s=52, facecolors=face, edgecolors=INK, linewidths=1.2, label="ε of a round")
    axes.set(xlabel="environment steps", ylabel="ε (nats per action dimension)")
    steps_axis(axes)
    legend(axes, columns=4)
    return figure if drawn else None


def sigmoid_of_entropy(group: Group, sign: float) -> Figure | None:
    """Fig. 7: the weight of the interquartile range in τ, Sigmoid(±ε), where the rounds were.

    The rounds' numbers stand below, a row for each seed.
    """
    rows = [one for one in looks_of_seeds(group) if any(_known(r, "entropy") for r in one.run.rounds)]
    if not rows:
        return None
    figure, axes = new_figure()
    at = [r["entropy"] for one in rows for r in one.run.rounds if _known(r, "entropy")]
    low, high = min([-3.0, *at]) - 0.3, max([1.5, *at]) + 0.3
    x = np.linspace(low, high, 200)
    axes.plot(x, sigmoid(sign * x), color=MUTED, linewidth=1.5)
    heights = [-_NUMBERS * (row + 1) for row in range(len(rows))]
    for y, (run, _, color, _, marker) in zip(heights, rows, strict=True):
        own = sorted((r["entropy"], r["round"]) for r in run.rounds if _known(r, "entropy"))
        values = np.array([value for value, _ in own])
        outline: dict[str, Any] = {"edgecolors": INK, "linewidths": 1.2}
        axes.scatter(values, sigmoid(sign * values), s=52, color=color, marker=marker, **outline, zorder=3)
        # As many numbers as have room: all, or the first and every n-th.
        every = math.ceil(len(own) / _MOST_NUMBERS)
        told = [(value, round_) for value, round_ in own if (round_ - 1) % every == 0]
        gap = 0.025 * len(str(max(round_ for _, round_ in told))) + 0.01
        for (_, round_), place in zip(told, spaced([v for v, _ in told], gap * (high - low)), strict=True):
            axes.text(place, y, str(round_), color=color, ha="center", va="center", fontsize=10, fontweight="bold")
    axes.set(xlabel="ε (nats per action dimension)", ylabel="σ(ε)" if sign > 0 else "σ(−ε)", xlim=(low, high))
    axes.set_ylim(heights[-1] - _NUMBERS, 1.05)
    names = [f"seed {one.run.seed}" if len(group.runs) > 1 else "round" for one in rows]
    shares = [0, 0.2, 0.4, 0.6, 0.8, 1]
    axes.set_yticks([*shares, *heights], [*map(str, shares), *names])
    return figure


def spaced(values: Sequence[float] | np.ndarray, gap: float) -> list[float]:
    """Places no closer than a gap, in the order of ascending values, and together as near to them as can be (squares).

    Neighbours that are too close become a block around the mean of their values, and so do blocks.
    """
    blocks: list[tuple[float, int]] = []  # mean of the values, each less the gaps below it; how many
    for i, value in enumerate(values):
        mean, n = float(value) - i * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, m = blocks.pop()
            mean, n = (before * m + mean * n) / (m + n), m + n
        blocks.append((mean, n))
    return [mean + i * gap for i, mean in enumerate(mean for mean, n in blocks for _ in range(n))]


def similarity(run: Run) -> Figure | None:
    """Fig. 6: how like the executed actions the VLM's are, on rows of high and of low score, before and after."""
    rounds = sorted(run.samples)
    if not rounds:
        return None
    figure, axes = new_figure()
    kinds = [("high", True, COLORS[0], "o"), ("low", False, COLORS[4], "s")]
    for kind, high, color, marker in kinds:
        for when, filled in (("before", False), ("after", True)):
            place = [n + (-0.27 if high else 0.09) + (0.18 if filled else 0) for n in rounds]
            values = [similarities(run.samples[n], high, when) for n in rounds]
            if not any(map(len, values)):
                continue
            look: dict[str, Any] = {
                "s": 56,
                "marker": marker,
                "facecolors": color if filled else "none",
                "edgecolors": color,
                "linewidths": 2,
            }
            for n, at, value in zip(rounds, place, values, strict=True):
                if not len(value):
                    continue
                axes.plot([at, at], np.quantile(value, [0.25, 0.75]), color=color, linewidth=6, alpha=0.25, zorder=1)
                alpha = (
                    1.0 if 2 * len(value) >= rows_of(run.samples[n], high) else 0.3
                )  # few of the answers were parsed
                axes.scatter(at, float(np.mean(value)), alpha=alpha, zorder=2, **look)
            axes.scatter([], [], label=f"{kind}, {when}", **look)
    axes.set(xlabel="fine-tune round", ylabel="similarity")
    low, high_ = axes.get_ylim()
    axes.set_ylim(low, min(high_, 1.02))
    _whole_numbers(axes, rounds)
    legend(axes, columns=2)
    return figure


def rows_of(columns: Columns, high: bool) -> int:
    """How many rows of high score, or of low, a round's samples have."""
    return int((columns["high"] == high).sum())


def similarities(columns: Columns, high: bool, when: str) -> np.ndarray:
    """1 − |a_v − a| / (a_high − a_low), mean over dimensions, of each row whose answer could be parsed.

    Args:
        columns: Of :class:`~covr_lightning.finetune.samples.RoundSamples`.
        high: Of the rows of high score, or of low.
        when: ``"before"`` or ``"after"`` the round.

    Returns:
        (n,), 1 for the same action and 0 for the opposite ends of the range.
    """
    if when not in columns:
        return np.zeros(0)
    rows = (columns["high"] == high) & columns[f"{when}_valid"]
    span = columns["action_high"] - columns["action_low"]
    return 1 - (np.abs(columns[when] - columns["action"])[rows] / span).mean(-1)


def alone_traces(before: VLMAlone | None, after: VLMAlone | None, what: str, last_round: int) -> Figure | None:
    """Fig. 9: actions or rewards of the VLM alone over an episode of the same seed, before the first round and after.

    Args:
        before: What it did before the first round.
        after: What it did after the last one.
        what: ``"actions"`` or ``"rewards"``.
        last_round: The last round.
    """
    shown = [(before, COLORS[4], "before round 1"), (after, COLORS[0], f"after round {last_round}")]
    shown = [(one, color, text) for one, color, text in shown if one is not None and what in one.columns]
    if not shown:
        return None
    figure, axes = new_figure(height=2.6)
    for one, color, text in shown:
        assert one is not None, "left out"
        values = one.columns[what]
        for dimension in range(min(values.shape[1], _SHOWN_DIMENSIONS) if values.ndim > 1 else 1):
            line = values[:, dimension] if values.ndim > 1 else values
            style = "-" if dimension == 0 else (0, (2, 2))
            name = text if values.ndim == 1 or values.shape[1] == 1 else f"{text}, a{dimension}"
            axes.plot(line, color=color, linewidth=1.6, linestyle=style, label=name, drawstyle="steps-post")
    axes.set(xlabel="agent step", ylabel="action" if what == "actions" else "reward")
    legend(axes, columns=2)
    return figure


def sigmoid(x: float | np.ndarray) -> np.ndarray:
    """1 / (1 + e⁻ˣ)."""
    return 1 / (1 + np.exp(-np.asarray(x, dtype=float)))


def _known(round_: dict, name: str) -> bool:
    value = round_.get(name)
    return isinstance(value, int | float) and not math.isnan(value)


def looks(n: int) -> list[Look]:
    """Looks of n lines, all different up to 24."""
    # After 12 lines colours and dashes would come together again.
    dashes = [_DASHES[(i + i // 12) % len(_DASHES)] for i in range(n)]
    return [Look(COLORS[i % len(COLORS)], dashes[i], _MARKERS[i % len(_MARKERS)]) for i in range(n)]


def looks_of_seeds(group: Group) -> list[SeedLook]:
    """The looks of its runs: one colour for a seed, two where there is but one."""
    if len(group.runs) == 1:
        return [SeedLook(group.runs[0], COLORS[0], COLORS[1], _DASHES[0], _MARKERS[0])]
    found = zip(group.runs, looks(len(group.runs)), strict=True)
    return [SeedLook(run, look.color, look.color, look.dashes, look.marker) for run, look in found]


def _whole_numbers(axes: Axes, numbers: Sequence[float]) -> None:
    ticks = sorted({int(n) for n in numbers})
    axes.set_xticks(ticks[:: max(1, len(ticks) // 10)])
    if ticks:
        axes.set_xlim(ticks[0] - 0.6, ticks[-1] + 0.6)


def steps_axis(axes: Axes) -> None:
    """Environment steps, from 0 on, thousands as k."""
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}")
    axes.set_xlim(left=0)


def legend(axes: Axes, columns: int = 2) -> int:
    """A legend above the axes, if there is anything to tell apart, in as many columns as the figure is wide for.

    Returns:
        Its rows.
    """
    handles, labels = axes.get_legend_handles_labels()
    names = [shortened(label, _LETTERS) for label in labels]
    for n in range(min(columns, len(handles)), 0, -1):
        drawn = axes.figure.legend(handles, names, loc="outside upper left", ncols=n)
        if n == 1 or drawn.get_window_extent().width <= axes.figure.bbox.width:
            return math.ceil(len(handles) / n)
        drawn.remove()
    return 0


def shortened(text: str, letters: int) -> str:
    """A text of at most so many letters: of a longer one beginning and end."""
    end = (letters - 1) // 2
    return text if len(text) <= letters else f"{text[: letters - 1 - end]}…{text[-end:]}"
