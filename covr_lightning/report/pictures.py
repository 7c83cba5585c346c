"""The report's sections of frames and videos, and of what the VLM answers to frames."""

from __future__ import annotations

import base64
import itertools
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np

from covr_lightning.report import figures
from covr_lightning.report.groups import Group, score_of
from covr_lightning.report.page import Page, number, picture, table
from covr_lightning.report.runs import Columns, VLMAlone
from covr_lightning.report.sections import CALLBACK, PLAY_ALONE, named, of_seed

#: Videos are put into the page up to this many bytes in all; the others are linked.
_EMBEDDED_BYTES = 6_000_000


def similarity(page: Page, groups: Sequence[Group]) -> None:
    """Fig. 6."""
    score = escape(score_of(groups).one)
    page.section(
        "Whom the VLM resembles",
        "1 − |a_v − a| as a share of the action's range, mean over dimensions: 1 is the executed action, 0 the "
        f"opposite end of the range. Blue are rows of high {score} (kept and held out of training, at "
        f"least the median), red rows of low {score} (not kept, at most the median). A round has worked when blue "
        "rises and red does not follow. Means are over the answers that could be parsed, pale where those are fewer "
        "than half of the rows. Bars: middle half (Fig. 6).",
    )
    for group in named(page, groups, with_rounds=True):
        run = group.first
        if not run.samples and run.rounds and not any(r.get("kept", 0) > 1 for r in run.rounds):
            page.missing("No round has asked the VLM about rows: each kept too few to train on.")
            continue
        if not run.samples:
            page.missing(
                "The VLM's answers are not recorded: "
                f"<code>{CALLBACK}.samples 64</code>, the default, writes them in each round (the paper has 300)."
            )
            continue
        caption = f"Similarity of the VLM's actions to executed ones{of_seed(group)}"
        page.figures([page.figure(figures.similarity(run), f"{group.name} similarity", caption)])
        rows = []
        for n, columns in sorted(run.samples.items()):
            for high in (True, False):
                count = figures.rows_of(columns, high)
                means = [_mean(figures.similarities(columns, high, when), count) for when in ("before", "after")]
                rows.append([str(n), "high" if high else "low", str(count), *means])
        page.add(table(["round", run.score.one, "rows", "before", "after"], rows, "Mean similarity"))


def strips(page: Page, groups: Sequence[Group]) -> None:
    """Fig. 9."""
    page.section(
        "What the VLM does",
        "The same frames put to the VLM before and after a round, beside the executed action; below, an episode that "
        "it played alone, of the same seed before the first round and after the last (Fig. 9).",
    )
    for group in named(page, groups, with_rounds=True):
        run = group.first
        if run.samples:
            last = max(run.samples)
            columns = run.samples[last]
            high = int(columns["high"][columns["frame_rows"]].sum())
            first = "none is" if not high else "the first is" if high == 1 else f"the first {high} are"
            page.add(f"<p>Rows of D_f in round {last}{of_seed(group)}: {first} of high {escape(run.score.one)}.</p>")
            page.add(_answers(columns, last, run.score.one))
        if not run.vlm:
            page.missing(
                f"No episode of the VLM alone is recorded: <code>{PLAY_ALONE}</code> plays some before the first round "
                "and after each."
            )
            continue
        last = max(run.vlm)
        before, after = run.vlm.get(0), run.vlm[last] if last else None
        for one, name in ((before, "before round 1"), (after, f"after round {last}")):
            if one is not None and "frames" in one.columns:
                driven = f", DD {number(float(one.columns['distance'][0]))} m" if "distance" in one.columns else ""
                came_to = f"{group.label} {number(float(one.columns['return'][0]))}{driven}"
                page.add(f"<p>Alone, {name}{of_seed(group)}: {came_to}</p>")
                page.add(_episode(one, f"VLM alone, {name}"))
        page.figures(
            [
                page.figure(
                    figures.alone_traces(before, after, what, last), f"{group.name} vlm {what}",
                    f"{what.capitalize()} of the VLM alone{of_seed(group)}",
                )
                for what in ("actions", "rewards")
            ]
        )  # fmt: skip


def _answers(columns: Columns, round_: int, score: str) -> str:
    """Frames with the VLM's answers before and after, what was done, and the row's score."""
    cells = []
    for frame, row in zip(columns["frames"], columns["frame_rows"], strict=True):
        lines = []
        for when in ("before", "after"):
            if when in columns:
                lines.append(f'<span class="{when}">{when} {_said(columns, when, row)}</span>')
        lines.append(f'<span class="did">done {_action(columns["action"][row])}</span>')
        lines.append(f"{escape(score)} {number(float(columns['score'][row]))}")
        high = "high" if columns["high"][row] else "low"
        cells.append(_cell(frame, f"round {round_}, row {int(row)}, {high} {score}", "<br>".join(lines)))
    return f'<div class="strip">{"".join(cells)}</div>'


def _cell(frame: np.ndarray, alt: str, caption: str) -> str:
    """A frame of a strip, or several side by side as the VLM was shown them, with what is said below it (HTML)."""
    several = max(1, round(frame.shape[2] / frame.shape[1]))
    return f'<figure style="--frames:{several}">{picture(frame, alt)}<figcaption>{caption}</figcaption></figure>'


def _said(columns: Columns, when: str, row: int) -> str:
    """The VLM's answer to a row, or why there is none; older files do not tell an answer that never came apart."""
    if columns[f"{when}_valid"][row]:
        return _action(columns[when][row])
    answered = columns.get(f"{when}_answered")
    return "unparsable" if answered is None or answered[row] else "no answer"


def _episode(one: VLMAlone, whose: str) -> str:
    """Frames of an episode with the actions and rewards there."""
    cells = []
    for frame, step in zip(one.columns["frames"], one.columns["frame_steps"], strict=True):
        action, reward = _action(one.columns["actions"][step]), number(float(one.columns["rewards"][step]), 2)
        text = f"step {int(step)}<br>action {action}<br>reward {reward}"
        cells.append(_cell(frame, f"{whose}, step {int(step)}", text))
    return f'<div class="strip">{"".join(cells)}</div>'


def _action(action: np.ndarray) -> str:
    shown = ", ".join(number(float(value), 2) for value in action[:3])
    return shown + (", …" if len(action) > 3 else "")


def _mean(values: np.ndarray, of: int) -> str:
    """Mean over the answers that could be parsed, and how many of the rows these are if not all."""
    if not len(values):
        return "–"
    return number(float(values.mean()), 3) + (f" ({len(values)} of {of})" if len(values) < of else "")


def videos(page: Page, groups: Sequence[Group]) -> None:
    """The runs' videos: the latest of each run, then the one before of each, and so on."""
    page.section("Videos")
    of_runs = [[(group, run, path) for path in reversed(run.videos)] for group in groups for run in group.runs]
    found = [one for same in itertools.zip_longest(*of_runs) for one in same if one]
    if not found:
        page.missing("There are none: <code>--video true</code> writes one of each evaluation's first episode.")
        return
    room = _EMBEDDED_BYTES
    cells, links = [], []
    for group, run, path in found:
        text = f"{group.name}, seed {run.seed}: {path.stem}"
        content = _content(path, room)
        if content:
            room -= len(content)
            data = base64.b64encode(content).decode()
            source = f'<video controls muted playsinline src="data:video/mp4;base64,{data}"></video>'
            cells.append(f"<figure>{source}<figcaption>{escape(text)}</figcaption></figure>")
        else:
            place = escape(quote(os.path.relpath(path.resolve(), page.folder.resolve())))
            links.append(f'<li><a href="{place}">{escape(text)}</a></li>')
    page.figures(cells)
    if links:
        page.add(f"<p>Others, beside this page in the runs' folders:</p><ul>{''.join(links)}</ul>")


def _content(path: Path, most: int) -> bytes:
    """What is in a file; nothing if that is more than so many bytes, or cannot be read (any more)."""
    try:
        return path.read_bytes() if path.stat().st_size <= most else b""
    except OSError:
        return b""
