"""Which of the paper's numbers belong beside a run's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from covr_lightning.published.results import PublishedResult, published_results
from covr_lightning.report.runs import Run

#: Scenario → table and setting.
_DRIVING = {
    "highway": (1, "CARLA HW"), "ghost_pedestrian": (2, "CARLA GP"), "highway_a": (18, "CARLA HW scenario A"),
    "highway_b": (18, "CARLA HW scenario B"),
}  # fmt: skip

#: The configurations of the package's sweeps on CARLA's #HW, by the names of their YAMLs, and the rows of the paper's
#: tables that they are. M1 to M11 in Table 5.
_SWEPT = {
    **{f"m{n}": (5, f"M{n}") for n in range(1, 12)},
    **{f"lambda_{n}": (12, f"lambda={n}") for n in (1, 2, 3)},
    **{f"psi0_{n}": (13, f"psi0={n}") for n in (2500, 5000, 7500, 10000)},
    "qwen2_vl_2b": (16, "Qwen2-VL-2B"), "qwen2_5_vl_3b": (16, "Qwen2.5-VL-3B"), "llava_1_5_7b": (16, "LLava-1.5-7B"),
}  # fmt: skip

#: What is swept in these tables, and their title.
SWEEP_TABLES = {5: "Ablations", 12: "λ", 13: "ψ₀", 16: "VLMs"}


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


def swept(names: Sequence[str]) -> dict[int, dict[str, str]]:
    """Tables of the paper (5, 12, 13, 16) that configurations are rows of: table → its row → the configuration's name.

    Args:
        names: The configurations' names, as a sweep of the package's folders gives them. ``covr`` is Table 5's last row
            beside any other of its rows.
    """
    found: dict[int, dict[str, str]] = {}
    for name in names:
        if name in _SWEPT:
            number, row = _SWEPT[name]
            found.setdefault(number, {})[row] = name
    if 5 in found and "covr" in names:
        found[5]["COVR"] = "covr"
    return dict(sorted(found.items()))


def as_printed(result: PublishedResult | None) -> str:
    """A result as the paper prints it, with a minus for a hyphen; a dash for none."""
    return "–" if result is None else str(result).replace("-", "−")


def _of(table: int, setting: str, metric: str) -> list[PublishedResult]:
    return [row for row in published_results(table) if row.setting == setting and row.metric == metric]
