"""What the report shows, section by section, each from what the runs' folders hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from covr_lightning.report import figures
from covr_lightning.report.groups import Group, Measured, score_of
from covr_lightning.report.page import Page, bar, number, percent, plus_minus, table
from covr_lightning.report.published import as_printed, per_round
from covr_lightning.report.runs import Run, class_name, figure_of, init_args
from covr_lightning.saving.round_files import RoundFiles

#: What settings are called on the command line.
CALLBACK = "--trainer.callbacks"
PLAY_ALONE = f"{CALLBACK}.vlm_episodes 10"

_NO_PROFILE = "the run's folder has no <code>profile.json</code>, which a run writes from its first evaluation on"


def rounds(page: Page, groups: Sequence[Group]) -> None:
    """Tables 14 and 15, and each round's figures."""
    page.section(
        "Round by round",
        "First how well the policy does at its first evaluation after each round, if the next did not come "
        "before it, and the VLM when it acts alone (Tables 14, 15); hollow and dashed where only "
        "some of the seeds have come so far. Then the VLM's error against executed actions of kept rows that it was "
        "not trained on; it has learnt something when the filled dot is under the solid line. Dotted: how far the "
        "policy's draws are from its mean, which is about what would remain for a VLM that knew this mean; rows of D_f "
        "come from earlier policies, too.",
    )
    for group in named(page, groups):
        if not _has_rounds(page, group):
            continue
        label = group.label
        for run in group.runs:
            if run.missing_rounds:
                names = ", ".join(f"<code>rounds/{RoundFiles(Path(), n).report}</code>" for n in run.missing_rounds)
                seed = f"Seed {run.seed}: " if len(group.runs) > 1 else ""
                page.missing(
                    f"{seed}{names} cannot be read, so when that round was is not known: the policy after it and after "
                    "the round before it is left out, and so is the guidance there."
                )
        page.figures(
            [
                page.figure(
                    figures.performance_per_round(group, "return", label), f"{group.name} performance",
                    f"{label} of policy and VLM after each round",
                ),
                page.figure(
                    figures.vlm_error(group.first), f"{group.name} vlm error",
                    f"VLM error on held-out rows{of_seed(group)}",
                ),
            ]
        )  # fmt: skip
        page.add(_performance_table(group, "return", label))
        if group.drives:
            page.add(_performance_table(group, "distance", "DD (m)"))
        page.add(_unheard(group))
        if not any(run.vlm for run in group.runs):
            folder = group.first.folder
            said = f"How the VLM does alone is not recorded: <code>{PLAY_ALONE}</code> plays it in each round"
            for adapter in sorted((folder / "rounds").glob("round_*_adapter"))[:1]:
                said += (
                    f", and <code>covr test --config {escape(str(folder / 'config.yaml'))} --actor vlm --vlm.adapter "
                    f"{escape(str(adapter))}</code> adds a round of this run"
                )
            page.missing(f"{said}.")
        for run in group.runs:
            if run.rounds:
                page.add(_figures_table(run, f"Seed {run.seed}" if len(group.runs) > 1 else ""))


def _unheard(group: Group) -> str:
    """Says how often the VLM alone could not be understood; nothing where it always was."""
    asked, unparsable, unanswered = (
        int(sum(one.facts.get(name, 0) for run in group.runs for one in run.vlm.values()))
        for name in ("asked", "unparsable", "unanswered")
    )
    if not unparsable + unanswered:
        return ""
    return (
        f'<p class="small">Of {asked:,} answers that the VLM was asked for while it played alone, {unparsable:,} could '
        f"not be parsed and {unanswered:,} never came; it did nothing then.</p>"
    )


def _performance_table(group: Group, name: str, label: str) -> str:
    paper = per_round(group.runs[0], "DD" if name == "distance" else "ER")
    several = len(group.runs) > 1

    def cells(*measured: Measured | None) -> list[str]:
        texts = []
        for one in measured:
            texts.append(plus_minus(*one[:2]) if one else "–")
            texts += [str(len(one.seeds)) if one and one.seeds else "–"] * several
        return texts

    seeds = ["seeds"] * several
    head = ["after round", f"policy {label}", *seeds, f"VLM alone {label}", *seeds]
    head += ["paper: policy", "paper: VLM"] if paper else []
    rows = []
    for n in [0, *(n for n in group.round_numbers if n)]:
        row = [str(n), *cells(group.policy_after(n, name) if n else None, group.vlm_after(n, name))]
        printed = [paper.get(f"{who} after round {n}") for who in ("policy", "VLM")] if paper else []
        rows.append([*row, *(as_printed(one) for one in printed)])
    for at, last in group.points(name)[-1:]:
        end = [f"last evaluation, {at:,} steps", *cells(last, None)]
        rows.append([*end, f"{as_printed(paper['policy at the end'])} (end)", "–"] if paper else end)
    spread = "over the seeds behind a number, where there are two or more" if several else f"over {_episodes(group)}"
    source = " (paper: #HW on CARLA)" if paper else ""
    return table(head, rows, f"{label}, ± standard deviation {spread}{source}")


def _episodes(group: Group) -> str:
    """Episodes behind the numbers of a group's one run, and how many if that is known."""
    run = group.runs[0]
    of_vlm = sorted({len(one.columns["return"]) for one in run.vlm.values()})
    counts = [f"policy {run.eval_episodes}"] if run.eval_episodes else []
    counts += [f"VLM alone {' or '.join(map(str, of_vlm))}"] if of_vlm else []
    return f"episodes ({', '.join(counts)})" if counts else "episodes"


def _figures_table(run: Run, caption: str) -> str:
    head = ["round", "steps", "rows", "kept", "top 95 %", "w > 0", "ε", "τ", "held out", "VLM error", "after",
            "constant", "noise", "unparsable", "s", "MB"]  # fmt: skip
    rows = [
        [
            str(r["round"]), f"{r['env_steps']:,}", f"{r['rows']:,}", f"{r.get('kept', 0):,}",
            f"{r['kept_top95']:,}" if "kept_top95" in r else "–", f"{r.get('trained', 0):,}",
            number(figure_of(r, "entropy"), 2), number(figure_of(r, "tau")), _held_out(r),
            number(figure_of(r, "error_before"), 3), number(figure_of(r, "error_after"), 3),
            number(figure_of(r, "error_constant"), 3), number(figure_of(r, "noise"), 3),
            _unparsable(r),
            number(figure_of(r, "seconds"), 0), number(figure_of(r, "peak_memory_mb"), 0),
        ]
        for r in run.rounds
    ]  # fmt: skip
    legend = "w > 0: rows trained on; held out: rows / episodes that they are of; s: seconds; MB: peak memory"
    return table(head, rows, f"{caption}. {legend}" if caption else legend, dense=True)


def _unparsable(r: dict[str, Any]) -> str:
    """Shares of the answers that could not be parsed, and of the rows that got none."""
    text = f"{percent(figure_of(r, 'unparsable_before'))} → {percent(figure_of(r, 'unparsable_after'))}"
    unanswered = [figure_of(r, f"unanswered_{when}") for when in ("before", "after")]
    if any(share > 0 for share in unanswered):
        text += f" (no answer: {' → '.join(map(percent, unanswered))})"
    return text


def _held_out(r: dict[str, Any]) -> str:
    """Rows that measured the VLM, and how many episodes they are of, where a round has written it."""
    episodes = r.get("held_out_episodes")
    return f"{r.get('held_out', 0):,}" + (f" / {episodes}" if episodes else "")


def buffer(page: Page, groups: Sequence[Group]) -> None:
    """Fig. 8."""
    page.section(
        "What each round trained on",
        f"{escape(capital(score_of(groups).many))} of the rows in D_f when the round came: grey all rows, blue those "
        "that the filter kept, orange its threshold τ, dashed the lowest row that a fixed filter of the best 95 % "
        "would keep (Fig. 8).",
    )
    for group in named(page, groups, with_rounds=True):
        run = group.first
        drawn = [
            page.figure(
                figures.scores_in_buffer(r, run.score.symbol), f"{group.name} {run.score.many} round {r['round']}",
                f"{capital(run.score.many)} in D_f, round {r['round']}{of_seed(group)}",
            )
            for r in run.rounds
        ]  # fmt: skip
        kept = page.figure(
            figures.kept_per_round(run), f"{group.name} kept", f"Rows kept in each round{of_seed(group)}"
        )
        page.figures([kept, *drawn])
        if not any(drawn):
            page.missing(
                f"The distribution of {escape(run.score.many)} is not in these rounds' files: an earlier version of "
                "the package wrote them; new rounds record it without a setting."
            )


def entropy(page: Page, groups: Sequence[Group]) -> None:
    """Fig. 7."""
    signs = {_sign(group) for group in groups if group.round_numbers}
    sigmoid = "σ(ε)" if signs == {1.0} else "σ(−ε)" if signs == {-1.0} else "σ(±ε)"
    page.section(
        "Exploration: ε and the threshold",
        f"τ = median + {sigmoid}·IQR of the {escape(score_of(groups).many)}. The more the policy still explores, the "
        "higher ε. First over training, then where each round was on the sigmoid, its number below; of several seeds "
        "each in its colour (Fig. 7).",
    )
    for group in named(page, groups, with_rounds=True):
        filter_, sign = (group.first.fine_tuning() or {}).get("filter"), _sign(group)
        page.figures(
            [
                page.figure(figures.entropy(group), f"{group.name} entropy", "ε over training"),
                page.figure(
                    figures.sigmoid_of_entropy(group, sign), f"{group.name} sigmoid",
                    "σ(ε) of each round" if sign > 0 else "σ(−ε) of each round (sign: prose)",
                ),
            ]
        )  # fmt: skip
        if not any(run.action_size for run in group.runs):
            page.missing(
                "ε over training is not drawn: it is per action dimension, and this run does not tell how many there "
                "are, since an earlier version of the package wrote its rounds."
            )
        if init_args(filter_).get("compare") == "raw":
            many = escape(group.first.score.many)
            page.add(
                f'<p class="small">With <code>compare: raw</code> τ is in units of z-scores, whose median and IQR it '
                f"is made of, and the {many} are compared with it as they are.</p>"
            )
        other = class_name(filter_)
        if other not in ("", "EDDF"):
            page.add(f'<p class="small">This run\'s filter is {escape(other)}, which ε does not move.</p>')


def _sign(group: Group) -> float:
    """Sign of ε in the group's threshold."""
    filter_ = (group.first.fine_tuning() or {}).get("filter")
    return -1.0 if init_args(filter_).get("sign") == "prose" else 1.0


def times(page: Page, groups: Sequence[Group]) -> None:
    """Where the time went."""
    page.section("Where the time went")
    for group in named(page, groups):
        for run in group.runs:
            seed = f"Seed {run.seed}: " if len(group.runs) > 1 else ""
            seconds: dict[str, float] = (run.profile or {}).get("seconds") or {}
            if seconds:
                total = float((run.profile or {}).get("total_seconds") or sum(seconds.values()))
                counts = (run.profile or {}).get("counts") or {}
                parts = sorted(seconds.items(), key=lambda part: -part[1])
                most = max(parts[0][1], 1e-9)
                rows = [
                    [
                        name,
                        number(s, 1),
                        percent(s / total) if total else "–",
                        f"{counts[name]:,}" if name in counts else "–",
                        bar(s / most),
                    ]
                    for name, s in parts
                ]
                caption = f"{seed}{_duration(total)} {_until(run)}"
                page.add(table(["part", "seconds", "share", "times", ""], rows, caption))
            elif run.rounds:
                spent = sum(figure_of(r, "seconds") for r in run.rounds)
                renewing = sum(figure_of(r, "seconds_renewing") for r in run.rounds)
                page.missing(
                    f"{escape(seed)}Fine-tune rounds took {_duration(spent)} and renewing answers "
                    f"{_duration(renewing)}; the rest is not known: {_NO_PROFILE}."
                )
            else:
                page.missing(f"{escape(seed)}{_NO_PROFILE.capitalize()}.")


def _until(run: Run) -> str:
    """What ``profile.json`` covers: a run writes it after each evaluation and at its end."""
    if run.state == "finished" or not run.curve:
        return "in all"
    return f"up to the last evaluation, at {int(run.curve[-1]['env_steps']):,} steps"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def of_seed(group: Group) -> str:
    """Which seed's details are shown, where there are several."""
    return f", seed {group.first.seed}" if len(group.runs) > 1 else ""


def named(page: Page, groups: Sequence[Group], with_rounds: bool = False) -> Iterator[Group]:
    """The groups, or those that have rounds, each under its name if there are several."""
    for group in groups:
        if with_rounds and not group.round_numbers:
            continue
        if len(groups) > 1:
            page.add(f"<h3>{escape(group.title)}</h3>")
        yield group


def _has_rounds(page: Page, group: Group) -> bool:
    """Whether there is any round; says why not otherwise."""
    if any(run.rounds for run in group.runs):
        return True
    settings = group.first.fine_tuning()
    if settings is None:
        page.missing(
            "This configuration fine-tunes no VLM: rounds come with the callback "
            "<code>covr_lightning.callbacks.ProgressiveFineTune</code> at <code>trainer.callbacks</code>."
        )
    elif class_name(settings.get("schedule")) == "NeverSchedule":
        page.missing("This configuration has no rounds: its <code>schedule</code> is <code>NeverSchedule</code>.")
    else:
        over = all(run.state == "finished" for run in group.runs)
        none = "No round was run" if over else "No round has been run yet"
        first = _first_round(settings.get("schedule"))
        due = f": the first is due at {escape(first)} environment steps" if first else ""
        page.missing(f"{none}{due}.")
    return False


def _first_round(schedule: Any) -> str:
    """Environment steps of the first round, as far as a schedule's settings tell them; as they are if no number."""
    given = init_args(schedule)
    default = 5000 if class_name(schedule) in ("", "LinearSchedule", "PrintedSchedule") else ""
    first = given.get("at_env_steps") or given.get("psi0_env_steps", default)
    first = first[0] if isinstance(first, list) else first
    return f"{first:,}" if isinstance(first, int | float) else str(first)


def capital(text: str) -> str:
    """A text with a capital at the beginning, and whatever others it has."""
    return text[:1].upper() + text[1:]
