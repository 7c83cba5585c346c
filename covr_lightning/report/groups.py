"""Runs of one configuration, taken together as its seeds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from covr_lightning.report.runs import Run
from covr_lightning.sweep.differences import SEEDS, result_settings


class OfRun(NamedTuple):
    """What one run's episodes come to: their mean, and their standard deviation (n)."""

    seed: int
    mean: float
    spread: float


class Measured(NamedTuple):
    """What a group's runs come to.

    Attributes:
        mean: Mean over the seeds that have it; NaN if none has.
        spread: Standard deviation over these seeds (n − 1). In a group of one run it is that over the run's episodes;
            where only one of several runs has the measure, it is NaN.
        seeds: The seeds behind it.
    """

    mean: float
    spread: float
    seeds: tuple[int, ...]


@dataclass
class Group:
    """Runs of one configuration with different seeds.

    Attributes:
        name: Its name in the report.
        runs: Its runs, by seed.
    """

    name: str
    runs: list[Run]

    @property
    def names(self) -> set[str]:
        """Its runs' own names: a sweep's configurations, of which two may be one, each with seeds of its own."""
        return {_name(run) for run in self.runs}

    @property
    def first(self) -> Run:
        """The run of which details are shown: the first of those with the most rounds."""
        return max(self.runs, key=lambda run: len(run.rounds))

    @property
    def drives(self) -> bool:
        """Whether distances are measured, so that returns are called ER."""
        measured = any("distance" in point for run in self.runs for point in run.curve[:1])
        return measured or self.runs[0].env in ("Carla", "Road")

    @property
    def label(self) -> str:
        """What its returns are called."""
        return "ER" if self.drives else "return"

    @property
    def round_numbers(self) -> list[int]:
        """Rounds that any of its runs knows something of; 0 where a VLM was measured before the first."""
        return sorted({r["round"] for run in self.runs for r in run.rounds} | {n for run in self.runs for n in run.vlm})

    def points(self, name: str = "return") -> list[tuple[int, Measured]]:
        """The learning curve: environment steps, and what the seeds come to there.

        Evaluations that all seeds have; of runs under way, that all have so far. A run without any, as one that has
        only just begun, is left out of them.
        """
        curves = {
            i: {int(point["env_steps"]): point for point in run.curve if name in point}
            for i, run in enumerate(self.runs)
        }
        curves = {i: curve for i, curve in curves.items() if curve}
        steps = sorted(set.intersection(*map(set, curves.values()))) if curves else []
        return [
            (
                step,
                self._over_seeds(
                    [
                        OfRun(self.runs[i].seed, curve[step][name], curve[step].get(f"{name}_std", math.nan))
                        for i, curve in curves.items()
                    ]
                ),
            )
            for step in steps
        ]

    def policy_after(self, round_: int, name: str = "return") -> Measured:
        """The seeds' first evaluations after a round, of those whose next round was not before it.

        One at the round's own step is left out: it comes behind the round, but its policy has nothing from it yet.
        """
        values = []
        for run in self.runs:
            at = {r["round"]: r["env_steps"] for r in run.rounds}
            later = at.get(round_ + 1, math.inf)
            point = next((p for p in run.curve if p["env_steps"] > at.get(round_, math.inf)), {})
            if name in point and point["env_steps"] <= later:
                values.append(OfRun(run.seed, point[name], point.get(f"{name}_std", math.nan)))
        return self._over_seeds(values)

    def vlm_after(self, round_: int, name: str = "return") -> Measured:
        """The seeds' episodes of the VLM alone after a round."""
        played = [(run.seed, run.vlm[round_].columns) for run in self.runs if round_ in run.vlm]
        return self._over_seeds(
            [OfRun(seed, float(c[name].mean()), _spread(c[name])) for seed, c in played if name in c]
        )

    def who(self, measured: Measured) -> str:
        """Which seeds are behind a mean, in words: ``3 seeds``, ``2 of 3 seeds``, ``seed 1``."""
        n, of = len(measured.seeds), len(self.runs)
        if n == 1:
            return f"seed {measured.seeds[0]}"
        return f"{n} seeds" if n == of else f"{n} of {of} seeds"

    def spread_is(self, measured: Measured) -> str:
        """What follows ±, and over whom a mean is: ``± over 3 seeds``, ``± over episodes``, ``seed 1 alone``."""
        if len(self.runs) == 1:
            return "± over episodes"
        return f"{self.who(measured)} alone" if len(measured.seeds) == 1 else f"± over {self.who(measured)}"

    def _over_seeds(self, values: Sequence[OfRun]) -> Measured:
        mean, spread = mean_and_spread([one.mean for one in values])
        if len(self.runs) == 1 and values:
            spread = values[0].spread
        return Measured(mean, spread, tuple(one.seed for one in values))


def _spread(episodes: np.ndarray) -> float:
    """Standard deviation over episodes; NaN of one."""
    return float(episodes.std()) if len(episodes) > 1 else math.nan


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n − 1); NaN where there are too few."""
    mean = float(np.mean(values)) if len(values) else math.nan
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs whose configurations differ in nothing but the seed, in the order given.

    Of two runs with one seed the second is no further seed; it is in a group of its own.
    """
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in result_settings(run.configuration).items() if key not in SEEDS}
        same, n = json.dumps(settings, sort_keys=True, default=str), 0
        while any(other.seed == run.seed for other in groups.get((same, n), [])):
            n += 1
        groups.setdefault((same, n), []).append(run)
    named: list[Group] = []
    for members in groups.values():
        members.sort(key=lambda run: run.seed)
        name = _common([_name(run) for run in members])
        others = [group.name for group in named]
        n = 2
        while (name if n == 2 else f"{name} ({n - 1})") in others:
            n += 1
        named.append(Group(name if n == 2 else f"{name} ({n - 1})", members))
    return named


def _common(names: Sequence[str]) -> str:
    """The runs' name without what numbers them (``rad_s1``, ``rad-2``), if they have one; otherwise all names."""
    if len(set(names)) == 1:
        return names[0]
    without = {re.sub(r"[-_ .]?(s|seed)?[-_ .]?\d*$", "", name) for name in names}
    return without.pop() if len(without) == 1 and "" not in without else ", ".join(names)


def _name(run: Run) -> str:
    """A run's name; that of a sweep's config, whose runs are ``NAME/seed_N``. What is no UTF-8 in it is a ``?``."""
    folder = run.folder.resolve()
    name = folder.parent.name if re.fullmatch(r"seed_\d+", folder.name) else folder.name
    return name.encode(errors="replace").decode()
