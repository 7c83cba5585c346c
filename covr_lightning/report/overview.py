"""The report's first section: each configuration at a glance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from covr_lightning.report.configurations import method
from covr_lightning.report.groups import Group
from covr_lightning.report.page import Page, number, percent, plus_minus
from covr_lightning.report.runs import Run, figure_of


def overview(page: Page, groups: Sequence[Group]) -> None:
    """What each group is, a few numbers of it, and how far its runs are."""
    page.section("At a glance")
    for group in groups:
        page.add(f"<h3>{escape(group.title)} {_states(group)}</h3>")
        page.add(f'<p class="small">{escape(method(group.runs[0]))}</p>')
        tiles = [*_return_tiles(group), *_round_tiles(group)]
        page.add(f'<div class="tiles">{"".join(tiles)}</div>')
        said = " ".join(filter(None, [_notes(run, len(group.runs) > 1) for run in group.runs]))
        if said:
            page.add(f'<p class="small">{escape(said)}</p>')
        if sum(len(one.runs) for one in groups) > 1:
            folders = "".join(f"<li>seed {run.seed} → {escape(str(run.folder))}</li>" for run in group.runs)
            page.add(f'<details class="small"><summary>Folders</summary><ul>{folders}</ul></details>')


def _notes(run: Run, several: bool) -> str:
    """What the notes of a run's rounds say, in a sentence that has each note once."""
    rounds: dict[str, list[int]] = {}
    for r in run.rounds:
        if r.get("note"):
            rounds.setdefault(str(r["note"]).removesuffix(" on held-out rows"), []).append(int(r["round"]))
    if not rounds:
        return ""
    said = "; ".join(f"{note} in {rounds_said(numbers)}" for note, numbers in rounds.items())
    return f"Seed {run.seed}: {said}." if several else f"{said[0].upper()}{said[1:]}."


def rounds_said(numbers: Sequence[int]) -> str:
    """Rounds, ascending, in words: ``round 2``, ``rounds 1 to 3 and 5``."""
    stretches: list[list[int]] = []
    for n in numbers:
        if stretches and n == stretches[-1][-1] + 1:
            stretches[-1].append(n)
        else:
            stretches.append([n])
    parts: list[str] = []
    for stretch in stretches:
        parts += [f"{stretch[0]} to {stretch[-1]}"] if len(stretch) > 2 else map(str, stretch)
    text = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    return f"rounds {text}" if len(numbers) > 1 else f"round {text}"


def _states(group: Group) -> str:
    """One label per state of the group's runs."""
    labels = []
    for state in ("finished", "running", "stopped"):
        runs = [run for run in group.runs if run.state == state]
        if not runs:
            continue
        seeds = f"seed {', '.join(str(run.seed) for run in runs)}" if len(runs) < 6 else f"{len(runs)} seeds"
        least, most = min(run.env_steps for run in runs), max(run.env_steps for run in runs)
        at = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        far = f" at {at} of {runs[0].length:,} steps" if state != "finished" else ""
        labels.append(f'<span class="state {state}">{seeds}: {state}{far}</span>')
    return " ".join(labels)


def _tile(name: str, value: str, more: str) -> str:
    inside = f'<span class="name">{escape(name)}</span><b>{escape(value)}</b><span>{escape(more)}</span>'
    return f'<div class="tile">{inside}</div>'


def _return_tiles(group: Group) -> list[str]:
    points, label = group.points(), group.label
    if not points:
        none = "no evaluation yet" + " that all seeds have" * any(run.curve for run in group.runs)
        return [_tile(label, "–", none)]
    best_at, best = max(points, key=lambda point: point[1].mean)
    at, last = points[-1]
    over = group.spread_is(last)
    when = f"at {at:,} steps"
    if len({run.curve[-1]["env_steps"] for run in group.runs if run.curve}) > 1:
        when += ", the last that all of them have"
    of_mean = " of the mean curve" if len(last.seeds) > 1 else ""
    tiles = [
        _tile(f"last {label}", plus_minus(*last[:2]), f"{over}, {when}; {number(points[0][1].mean)} at first"),
        _tile(f"best {label}{of_mean}", plus_minus(*best[:2]), f"{over}, at {best_at:,} steps"),
    ]
    for at, end in group.points("distance")[-1:]:
        tiles.append(_tile("last DD (m)", plus_minus(*end[:2]), f"{over}, at {at:,} steps"))
    return tiles


def _round_tiles(group: Group) -> list[str]:
    run = group.first
    if not run.rounds:
        return []
    r = run.rounds[-1]
    seed = f", seed {run.seed}" if len(group.runs) > 1 else ""
    kept = f"{r['kept']:,} of {r['rows']:,} in round {r['round']}{seed}"
    tiles = [_tile("rows kept", percent(r["kept"] / max(1, r["rows"])), kept)]
    before, after, constant = (figure_of(r, f"error_{name}") for name in ("before", "after", "constant"))
    if not math.isnan(after):
        verdict = f"{'beats' if after < constant else 'does not beat'} the constant predictor's {number(constant, 3)}"
        errors = f"{number(before, 3)} → {number(after, 3)}"
        tiles.append(_tile("VLM error, held out", errors, f"in round {r['round']}{seed}; {verdict}"))
    unparsable = figure_of(r, "unparsable_after")
    if not math.isnan(unparsable):
        tiles.append(
            _tile("unparsable answers", percent(unparsable), f"to held-out rows after round {r['round']}{seed}")
        )
    return tiles
