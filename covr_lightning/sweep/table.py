"""A sweep's table: mean and standard deviation over seeds, one row per config."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from covr_lightning.saving.files import write_atomically

#: What is measured of a run, in order: its column in the CSV, and its title in a table not all of driving, and in one
#: that is.
_TITLES = {
    "return": ("final return", ""),
    "best_return": ("best return", "best ER"),
    "ER": ("ER", "ER"),
    "DD": ("DD (m)", "DD (m)"),
}

#: An evaluation curve: ``env_steps``, ``return``, for driving ``distance``, and more.
Curve = Sequence[dict[str, float]]


@dataclass
class Row:
    """One config.

    Attributes:
        config: Its name.
        seeds: Seeds whose runs are finished.
        planned: Seeds of the sweep.
        env_steps: Environment steps of the last evaluation.
        values: For each measure, one value per seed.
    """

    config: str
    seeds: list[int]
    planned: int
    env_steps: int
    values: dict[str, list[float]] = field(default_factory=dict)


def measure(curve: Curve) -> dict[str, float]:
    """What the table tells of a run: its last and its best evaluation; for driving ER and DD, both of the last one."""
    last = curve[-1]
    measured = {"return": last["return"], "best_return": max(point["return"] for point in curve)}
    if "distance" in last:
        measured |= {"ER": last["return"], "DD": last["distance"]}
    return measured


def make_row(config: str, curves: Mapping[int, Curve], planned: int) -> Row:
    """Collect a config's runs.

    Args:
        config: Its name.
        curves: Seed → the curve of its finished run.
        planned: Seeds of the sweep.
    """
    measured = [measure(curve) for curve in curves.values()]
    values = {name: [m[name] for m in measured if name in m] for name in _TITLES}
    steps = int(max((curve[-1]["env_steps"] for curve in curves.values()), default=0))
    return Row(config, list(curves), planned, steps, {name: v for name, v in values.items() if v})


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n − 1); None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def as_csv(rows: Sequence[Row]) -> str:
    """The table as CSV: config, seeds, env_steps, then each measure and, as ``…_std``, its standard deviation."""
    names = [name for name in _TITLES if any(name in row.values for row in rows)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["config", "seeds", "env_steps", *(column for name in names for column in (name, f"{name}_std"))])
    for row in rows:
        cells: list[str] = []
        for name in names:
            mean, std = mean_and_std(row.values[name]) if name in row.values else (None, None)
            cells += ["" if value is None else f"{value:.2f}" for value in (mean, std)]
        writer.writerow([row.config, len(row.seeds), row.env_steps, *cells])
    return text.getvalue()


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """Titles and rows as text. Where all rows are of driving, the last return is called ER and told once."""
    filled = [row for row in rows if row.values]
    driving = bool(filled) and all("ER" in row.values for row in filled)
    names = [name for name in _TITLES if any(name in row.values for row in rows) and _TITLES[name][driving]]
    names.sort(key=lambda name: name == "best_return" and driving)  # ER, DD, best ER
    cells = [["config", "seeds", "env steps", *(_TITLES[name][driving] for name in names)]]
    for row in rows:
        measured = [_plus_minus(row.values[name]) if name in row.values else "–" for name in names]
        cells.append([row.config, f"{len(row.seeds)} of {row.planned}", str(row.env_steps), *measured])
    return cells


def _plus_minus(values: Sequence[float]) -> str:
    mean, std = mean_and_std(values)
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


CAPTION = "Mean ± standard deviation (n − 1) over seeds, of the mean of each run's evaluation episodes."


def as_markdown(rows: Sequence[Row], title: str, notes: Sequence[str] = ()) -> str:
    """The table as Markdown, with notes below."""
    head, *body = _cells(rows)
    lines = [f"# {title}", "", CAPTION, "", f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in body]
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    return "\n".join(lines) + "\n"


def print_table(rows: Sequence[Row], title: str) -> None:
    """Print the table."""
    head, *body = _cells(rows)
    table = Table(title=title, caption=CAPTION)
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left", no_wrap=not number)
    for cells in body:
        table.add_row(*cells)
    Console().print(table)


def write_table(rows: Sequence[Row], folder: Path, title: str, notes: Sequence[str] = ()) -> list[Path]:
    """Write ``sweep.csv`` and ``sweep.md``.

    Returns:
        Their paths.
    """
    texts = {folder / "sweep.csv": as_csv(rows), folder / "sweep.md": as_markdown(rows, title, notes)}
    for path, text in texts.items():
        write_atomically(path, [text.encode()])
    return list(texts)
