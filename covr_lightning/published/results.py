"""Reading ``paper_results.csv``."""

from __future__ import annotations

import csv
import importlib.resources
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

#: What the paper reports. ER and DD are a driving episode's reward and driven distance in metres.
Metric = Literal["return", "ER", "DD", "inference seconds", "memory MB"]

#: Table 3 has the base agents with and without COVR, Table 4 everything else on the same six tasks.
_DMCONTROL_TABLES = (3, 4)


@dataclass(frozen=True)
class PublishedResult:
    """One number of the paper.

    Attributes:
        table: Number of its table.
        setting: Task or scenario.
        method: The row, as the paper has it.
        metric: What was measured.
        mean: Its mean.
        std: Its standard deviation; None where the paper gives none.
    """

    table: int
    setting: str
    method: str
    metric: str
    mean: float
    std: float | None

    def __str__(self) -> str:
        """Mean ± std, as a table has it."""
        return f"{self.mean:g}" if self.std is None else f"{self.mean:g} ± {self.std:g}"


def published_results(
    table: int | Collection[int] | None = None,
    setting: str | None = None,
    method: str | None = None,
    metric: Metric | None = None,
) -> list[PublishedResult]:
    """The paper's results, in the order of its tables.

    Args:
        table: Number of a table, or several.
        setting: Part of the setting's name, e.g. ``"Cartpole"``.
        method: The method's name.
        metric: The metric.

    Raises:
        ValueError: There is no such table or metric.
    """
    rows = _read()
    tables = {row.table for row in rows} if table is None else {table} if isinstance(table, int) else set(table)
    if unknown := tables - {row.table for row in rows}:
        raise ValueError(f"Table {min(unknown)} is none of {', '.join(map(str, sorted({row.table for row in rows})))}.")
    if metric is not None and metric not in get_args(Metric):
        raise ValueError(f"metric is {metric!r}; it can be {', '.join(map(repr, get_args(Metric)))}.")
    return [
        row
        for row in rows
        if row.table in tables
        and (setting is None or setting in row.setting)
        and method in (None, row.method)
        and metric in (None, row.metric)
    ]


def mean_over_tasks(method: str) -> float | None:
    """Mean of a method's returns over the six DMControl tasks of Tables 3 and 4; None if it lacks one of them.

    Args:
        method: The method's name there.
    """
    returns = {row.setting: row.mean for row in published_results(_DMCONTROL_TABLES, method=method)}
    return sum(returns.values()) / 6 if len(returns) == 6 else None


def _read() -> list[PublishedResult]:
    text = importlib.resources.files("covr_lightning.published").joinpath("paper_results.csv").read_text("utf-8")
    return [
        PublishedResult(
            int(row["table"]), row["setting"], row["method"], row["metric"], float(row["mean"]),
            float(row["std"]) if row["std"] else None,
        )
        for row in csv.DictReader(text.splitlines())
    ]  # fmt: skip
