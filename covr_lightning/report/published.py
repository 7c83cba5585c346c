"""Which of the paper's numbers belong beside a run's."""

from __future__ import annotations

from dataclasses import dataclass, field

from covr_lightning.published.results import PublishedResult, published_results
from covr_lightning.report.runs import Run

#: Scenario → table and setting.
_DRIVING = {
    "highway": (1, "CARLA HW"), "ghost_pedestrian": (2, "CARLA GP"), "highway_a": (18, "CARLA HW scenario A"),
    "highway_b": (18, "CARLA HW scenario B"),
}  # fmt: skip


@dataclass
class Comparison:
    """The paper's results on a run's task.

    Attributes:
        setting: The paper's name for it.
        results: One per method, of the return, on CARLA ER.
        distances: Method → the DD of the same table, in metres; empty where nobody drives.
        caution: What keeps the numbers from comparing, if anything is known to.
    """

    setting: str
    results: list[PublishedResult]
    distances: dict[str, PublishedResult] = field(default_factory=dict)
    caution: str = ""


def comparison(run: Run) -> Comparison | None:
    """The paper's results on a run's task; None if it has none."""
    kind = run.env
    if kind in ("Carla", "Road"):
        scenario = str(run.setting("data", "env", "scenario", default="highway"))
        if scenario not in _DRIVING:
            return None
        table, setting = _DRIVING[scenario]
        road = "The paper's runs are on CARLA and these on the built-in road, so ER and DD do not compare."
        distances = {row.method: row for row in _of(table, setting, "DD")}
        return Comparison(setting, _of(table, setting, "ER"), distances, road if kind == "Road" else "")
    if kind == "CarRacing":
        return Comparison("CarRacing", _of(10, "CarRacing", "return"))
    if kind == "DMControl":
        domain, _, task = str(run.setting("data", "env", "task", default="cartpole-swingup")).partition("-")
        wanted = f"{domain.replace('_', ' ')}, {task}"
        for row in published_results((3, 4, 11)):
            if row.setting.split(": ")[-1].lower() == wanted:
                tables = (11,) if row.table == 11 else (3, 4)
                results = [one for table in tables for one in _of(table, row.setting, "return")]
                return Comparison(row.setting, results)
    return None


def per_round(run: Run, metric: str) -> dict[str, PublishedResult]:
    """Tables 14 and 15 by their rows (``VLM after round 1``, ``policy after round 1``); empty but for CARLA's #HW.

    Args:
        run: A run.
        metric: ``"ER"`` or ``"DD"``.
    """
    found = comparison(run)
    if found is None or found.setting != "CARLA HW":
        return {}
    return {row.method: row for row in published_results((14, 15)) if row.metric == metric}


def as_printed(result: PublishedResult | None) -> str:
    """A result as the paper prints it, with a minus for a hyphen; a dash for none."""
    return "–" if result is None else str(result).replace("-", "−")


def _of(table: int, setting: str, metric: str) -> list[PublishedResult]:
    return [row for row in published_results(table) if row.setting == setting and row.metric == metric]
