"""The section that shows the paper's numbers beside the measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from covr_lightning.published.results import published_results
from covr_lightning.report.groups import Group
from covr_lightning.report.page import Page, bar, plus_minus, table, text_cell
from covr_lightning.report.published import SWEEP_TABLES, as_printed, comparison, swept
from covr_lightning.report.runs import Run


class _Entry(NamedTuple):
    """A row beside the paper's."""

    name: str
    of: str
    mean: float
    value: str
    distance: str
    ours: bool = False


def _measured_entry(group: Group) -> list[_Entry]:
    """A group's row beside the paper's, of the last evaluation that its seeds have; none without one."""
    distances = dict(group.points("distance"))
    return [
        _Entry(
            group.name, f"{group.who(one)}, {at:,} steps", one.mean, plus_minus(*one[:2], 0),
            plus_minus(*distances[at][:2], 0) if at in distances else "–", True,
        )
        for at, one in group.points()[-1:]
    ]  # fmt: skip


def beside_paper(page: Page, groups: Sequence[Group]) -> None:
    """The paper's numbers beside the measured ones, per task."""
    page.section("Beside the paper")
    by_setting: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        found = comparison(group.runs[0])
        by_setting.setdefault((found.setting, found.caution) if found else ("", ""), []).append(group)
    for (setting, _), members in by_setting.items():
        found = comparison(members[0].runs[0])
        names = ", ".join(group.name for group in members)
        if found is None:
            page.missing(f"The paper has no results on the task of {escape(names)}.")
            continue
        entries = [
            _Entry(row.method, "", row.mean, as_printed(row), as_printed(found.distances.get(row.method)))
            for row in found.results
        ]
        entries += [one for group in members for one in _measured_entry(group)]
        entries.sort(key=lambda entry: -entry.mean)
        most = max(entry.mean for entry in entries)
        drives = bool(found.distances)
        rows = [
            [
                text_cell(", ".join(filter(None, [entry.name, entry.of]))), entry.value,
                *([entry.distance] if drives else []), bar(entry.mean / most if most > 0 else 0.0),
            ]
            for entry in entries
        ]  # fmt: skip
        head = ["method", "ER", "DD (m)", "ER"] if drives else ["method", "return", ""]
        caption = (
            f"{setting}, as the paper prints it; coloured what is measured here: the last evaluation that all seeds "
            "have, ± over them (of one seed over its episodes)."
        )
        if found.caution:
            page.missing(escape(found.caution))
        page.add(table(head, rows, caption, [i for i, entry in enumerate(entries) if entry.ours]))
        if setting == "CARLA HW":
            for swept_table in _sweeps(members):
                page.add(swept_table)
        sizes = " or ".join(dict.fromkeys(_sizes(group.runs[0]) for group in members))
        page.add(
            '<p class="small">The paper\'s numbers are of its own sizes, lengths and VLM (three seeds); those measured '
            f"here of {escape(sizes)}.</p>"
        )


def _sweeps(groups: Sequence[Group]) -> list[str]:
    """The paper's tables whose rows the groups are, with theirs beside them."""
    # Two sweeps may have one configuration with the same seeds, hence two groups; the one with more of them counts.
    by_name = {name: group for group in sorted(groups, key=lambda one: len(one.runs)) for name in group.names}
    tables = []
    for number, names in swept(list(by_name)).items():
        rows, ours = [], []
        printed = {(row.method, row.metric): row for row in published_results(number, setting="CARLA HW")}
        for i, method in enumerate(dict.fromkeys(row for row, _ in printed)):
            cells = [as_printed(printed[method, metric]) for metric in ("ER", "DD")]
            group = by_name.get(names.get(method, ""))
            measured = _measured_entry(group) if group else []
            ours += [i] * bool(measured)
            here = [measured[0].value, measured[0].distance, measured[0].of] if measured else ["–"] * 3
            rows.append([text_cell(_row_name(method)), *cells, *here])
        head = ["", "paper: ER", "paper: DD (m)", "ER", "DD (m)", "of"]
        tables.append(table(head, rows, f"Table {number}: {SWEEP_TABLES[number]}, on CARLA's #HW", ours))
    return tables


def _row_name(method: str) -> str:
    """A row of a sweep's table, as people write it: ``λ = 1`` for the file's ``lambda=1``."""
    return method.replace("lambda=", "λ = ").replace("psi0=", "ψ₀ = ")


def _sizes(run: Run) -> str:
    size = run.setting("model", "augmentation", "size", default=None) or run.setting(
        "data", "env", "size", default=None
    )
    parts = [f"{size}×{size} pixels"] if size else []
    parts.append(f"batch {run.setting('data', 'batch_size', default='–')}")
    return ", ".join([*parts, f"hidden {run.setting('model', 'hidden', default='–')}"])
