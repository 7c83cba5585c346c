"""Runs of one configuration, taken together as its seeds."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from covr_lightning.report.runs import ANY_SCORE, Run, Score
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
        task: Its environment and task, where the report is about several.
    """

    name: str
    runs: list[Run]
    task: str = ""

    @property
    def title(self) -> str:
        """Its name as a heading has it, with its task where there are several."""
        return " · ".join(filter(None, [self.name, self.task]))

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
        only just begun, is left out of them, and so is one with only the first, of the untrained policy, beside others.
        """
        curves = {
            i: {int(point["env_steps"]): point for point in run.curve if name in point}
            for i, run in enumerate(self.runs)
        }
        most = max(map(len, curves.values()), default=0)
        curves = {i: curve for i, curve in curves.items() if len(curve) >= min(most, 2) and curve}
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
            point = next((p for p in run.curve if p["env_steps"] > run.round_at(round_)), {})
            if name in point and point["env_steps"] <= run.round_at(round_ + 1):
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
        """What follows ±, and over whom a mean is: ``± over 3 seeds``, ``± over 10 episodes``, ``seed 1 alone``."""
        if len(self.runs) == 1:
            n = self.runs[0].eval_episodes
            return "one episode" if n == 1 else f"± over {n} episodes" if n else "± over episodes"
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
        named.append(Group(_common([_name(run) for run in members]), members))
    _tell_apart(named)
    tasks = [" ".join(filter(None, [group.runs[0].env, group.runs[0].task])) for group in named]
    for group, task in zip(named, tasks, strict=True):
        group.task = task if len(set(tasks)) > 1 else ""
    return named


def score_of(groups: Sequence[Group]) -> Score:
    """What the rounds of all these judge rows by; a score where that is not the same in all."""
    scores = {group.runs[0].score for group in groups if group.round_numbers}
    return scores.pop() if len(scores) == 1 else ANY_SCORE


def _tell_apart(groups: Sequence[Group]) -> None:
    """Put before equal names the nearest folder above that tells them apart; number them where none does."""
    by_name: dict[str, list[Group]] = {}
    for group in groups:
        by_name.setdefault(group.name, []).append(group)
    for same in by_name.values():
        above = [[_folder(run).parents for run in group.runs] for group in same]
        for level in range(min(len(parents) for one in above for parents in one) if len(same) > 1 else 0):
            names = [{_text(parents[level].name) for parents in one} for one in above]
            if all(len(one) == 1 and one != {""} for one in names) and len(set.union(*names)) == len(same):
                for group, (name,) in zip(same, names, strict=True):
                    group.name = f"{name}/{group.name}"
                break
    taken = set[str]()
    for group in groups:
        numbered = (f"{group.name} ({n})" for n in itertools.count(2))
        group.name = group.name if group.name not in taken else next(one for one in numbered if one not in taken)
        taken.add(group.name)


def _common(names: Sequence[str]) -> str:
    """The runs' name without what numbers them (``rad_s1``, ``rad-2``), or the whole words that all begin with.

    Without either all names of a few runs; of more the first.
    """
    names = list(dict.fromkeys(names))
    if len(names) == 1:
        return names[0]
    without = {_without_number(name) for name in names}
    if len(without) == 1 and "" not in without:
        return without.pop()
    words = zip(*(re.findall(r"\d+|[-_ .]+|[^-_ .\d]+", name) for name in names), strict=False)
    prefix = "".join(same[0] for same in itertools.takewhile(lambda same: len(set(same)) == 1, words))
    prefix = re.sub(r"([-_ .]+(s|seed))?[-_ .]*$", "", prefix)
    if len(prefix) > 2:
        return prefix
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"


def _without_number(name: str) -> str:
    return re.sub(r"[-_ .]?(s|seed)?[-_ .]?\d*$", "", name)


def _folder(run: Run) -> Path:
    """The folder that a run has its name from: of a sweep's config, whose runs are ``NAME/seed_N``, that one."""
    folder = run.folder.resolve()
    return folder.parent if re.fullmatch(r"seed_\d+", folder.name) else folder


def _name(run: Run) -> str:
    """A run's name, or a sweep's config's."""
    return _text(_folder(run).name)


def _text(name: str) -> str:
    """A file's name; what is no UTF-8 in it is a ``?``."""
    return name.encode(errors="replace").decode()
