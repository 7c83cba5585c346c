"""The report's section on Eq. 4's term: how hard the VLM pulls the policy, and by how many answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from matplotlib.figure import Figure

from covr_lightning.report import figures
from covr_lightning.report.drawing import new_figure
from covr_lightning.report.groups import Group, mean_and_spread
from covr_lightning.report.page import Page, percent, plus_minus, table
from covr_lightning.report.runs import Run, class_name
from covr_lightning.report.sections import named

#: What an update of the actor logs of its prior.
LOSS, LAMBDA, LABELLED = "train/prior_loss", "train/lambda", "train/labelled"
#: And with a `q_filter`.
PREFERRED = "train/preferred"

#: Logged updates that a point of the figure is the mean of: batches have few answers, so single ones jump.
_MEAN_OF = 8


class Stretch(NamedTuple):
    """Means over the updates that a run logged between two of its rounds.

    Attributes:
        round: The round before it; 0 before the first.
        begins: Environment steps of the round.
        loss: Eq. 4's term, with λ.
        lam: λ.
        labelled: Share of a batch's rows that had an answer.
        preferred: Share of all these whose answer the critics preferred to the policy's action; NaN without a
            `q_filter`, and where no row had an answer.
    """

    round: int
    begins: int
    loss: float
    lam: float
    labelled: float
    preferred: float = math.nan


def stretches(run: Run) -> list[Stretch]:
    """What each stretch between rounds comes to; none where nothing was logged, or where it ends is not known.

    An update at a round is before it.
    """
    rows = logged(run)
    found = []
    for round_, begins in [(0, 0), *((int(r["round"]), int(r["env_steps"])) for r in run.rounds)]:
        ends = run.round_at(round_ + 1)
        own = [row for row in rows if begins < row["step"] <= ends]
        if own:
            loss, lam, labelled = (fmean(row[name] for row in own) for name in (LOSS, LAMBDA, LABELLED))
            found.append(Stretch(round_, begins, loss, lam, labelled, _preferred(own)))
    return found


def _preferred(rows: Sequence[dict[str, float]]) -> float:
    """Mean over rows that had an answer: a batch without any counts for nothing, whatever was logged of it."""
    both = [(row[PREFERRED], row[LABELLED]) for row in rows if PREFERRED in row]
    answered = sum(labelled for _, labelled in both)
    return sum(share * labelled for share, labelled in both) / answered if answered else math.nan


def logged(run: Run) -> list[dict[str, float]]:
    """The rows of ``metrics.csv`` that tell of the prior."""
    return [row for row in run.metrics if {"step", LOSS, LAMBDA, LABELLED} <= row.keys()]


def guides(run: Run) -> bool:
    """Whether its configuration has a prior."""
    return class_name(run.setting("model", "prior")) not in ("", "NoPrior")


def guidance(page: Page, groups: Sequence[Group]) -> None:
    """Eq. 4's term over training and between rounds; nothing where no configuration has a prior."""
    with_prior = [group for group in groups if guides(group.runs[0])]
    if not with_prior:
        return
    text = (
        "Eq. 4's term in the actor's loss, λ‖a_v − a_r‖², as updates logged it (each point is "
        f"the mean of {_MEAN_OF} of them): near 0 where the policy does what the "
        "VLM says, where few rows of a batch have an answer, or where λ is small."
    )
    if any(group.runs[0].setting("model", "prior", "q_filter") for group in with_prior):
        text += (
            " With a <code>q_filter</code> only those answers count that the critics prefer to the policy's action, "
            "and the mean is still over all."
        )
    page.section("Guidance", text)
    for group in named(page, with_prior):
        runs = [run for run in group.runs if logged(run)]
        over = all(run.state == "finished" for run in group.runs)
        if not runs:
            none = "No update has logged it" + " yet" * (not over)
            page.missing(
                f"{none}: <code>logs/csv/metrics.csv</code> has <code>{LOSS}</code> every "
                "<code>trainer.log_every_n_steps</code> updates, unless <code>trainer.logger</code> is false."
            )
            continue
        if not any(row[LAMBDA] for run in runs for row in logged(run)):
            page.missing(
                "λ was 0 throughout: the VLM has not guided the policy."
                if over
                else "λ has been 0 so far: the VLM has not guided the policy yet."
            )
            continue
        page.figures(
            [
                page.figure(
                    over_training(group, name, label), f"{group.name} {title}", f"{caption} over training"
                )
                for name, label, title, caption in (
                    (LOSS, "λ‖a_v − a_r‖²", "guidance loss", "Guidance loss"),
                    (LABELLED, "share of rows", "labelled", "Share of a batch's rows with an answer of the VLM"),
                )
            ]
        )  # fmt: skip
        page.add(_table(group))


def over_training(group: Group, name: str, label: str) -> Figure:
    """A logged quantity over environment steps, a line for each seed, in means of a few logged updates.

    Lines break at rounds, where λ and the VLM are others from one update to the next.
    """
    figure, axes = new_figure()
    for run, color, _, dashes, marker in figures.looks_of_seeds(group):
        bounds = [0, *(r["env_steps"] for r in run.rounds), math.inf]
        points: list[tuple[float, float]] = []
        for begins, ends in itertools.pairwise(bounds):
            rows = [row for row in logged(run) if begins < row["step"] <= ends]
            parts = [rows[i : i + _MEAN_OF] for i in range(0, len(rows), _MEAN_OF)]
            points += [(fmean(r["step"] for r in part), fmean(r[name] for r in part)) for part in parts]
            points.append((math.nan, math.nan))
        if len(points) > len(bounds) - 1:
            axes.plot(
                *zip(*points, strict=True), color=color, linewidth=1.6, linestyle=dashes, marker=marker, markersize=2.5,
                label=f"seed {run.seed}",
            )  # fmt: skip
    axes.set(xlabel="environment steps", ylabel=label)
    axes.set_ylim(bottom=0)
    figures.steps_axis(axes)
    if len(group.runs) > 1:
        figures.legend(axes, columns=4)
    return figure


def _table(group: Group) -> str:
    """A row for each stretch, over the seeds that have it."""
    several = len(group.runs) > 1
    found = sorted((one for run in group.runs for one in stretches(run)), key=lambda one: one.round)
    filtered = bool(group.runs[0].setting("model", "prior", "q_filter"))
    first = "before the first round" if group.round_numbers else "the whole run"
    rows = []
    for round_, same in itertools.groupby(found, key=lambda one: one.round):
        of_seeds = list(same)
        begins = sorted({one.begins for one in of_seeds})
        preferred = [one.preferred for one in of_seeds if math.isfinite(one.preferred)]
        loss, lam = (mean_and_spread([getattr(one, name) for one in of_seeds]) for name in ("loss", "lam"))
        rows.append(
            [
                f"after round {round_}" if round_ else first,
                "–".join(f"{step:,}" for step in dict.fromkeys([begins[0], begins[-1]])),
                *[str(len(of_seeds))] * several,
                plus_minus(*lam, 2), percent(fmean(one.labelled for one in of_seeds)),
                *[percent(fmean(preferred) if preferred else None)] * filtered, plus_minus(*loss, 3),
            ]
        )  # fmt: skip
    head = ["stretch", "from step", *["seeds"] * several, "λ", "rows with an answer"]
    head += [*["of these preferred"] * filtered, "λ‖a_v − a_r‖²"]
    spread = "; ± standard deviation over these seeds' means" if several else ""
    return table(head, rows, f"Means over the updates that were logged between two rounds{spread}")
