"""``covr report``: a page about runs, under way or over."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NoReturn

from covr_lightning.errors import ConfigError
from covr_lightning.report import beside_paper, configurations, guidance, learning, overview, pictures, sections
from covr_lightning.report.drawing import style
from covr_lightning.report.groups import Group, group_runs
from covr_lightning.report.page import MARK, Page
from covr_lightning.report.reading import read_run
from covr_lightning.report.runs import Run, class_name, find_runs
from covr_lightning.saving.files import write_atomically

#: The page's parts, in order; those of :data:`OF_ROUNDS` are left out where no run has a round.
PARTS = (
    overview.overview, learning.learning, sections.rounds, guidance.guidance, sections.buffer, sections.entropy,
    pictures.similarity, pictures.strips, beside_paper.beside_paper, configurations.differences, sections.times,
    pictures.videos,
)  # fmt: skip
OF_ROUNDS = (sections.buffer, sections.entropy, pictures.similarity, pictures.strips)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `covr report --help` lists the options.")


def report(arguments: Sequence[str]) -> int:
    """Run ``covr report``.

    Args:
        arguments: Command line behind ``report``.

    Returns:
        Exit status.

    Raises:
        ConfigError: A path leads nowhere or to no run, or the page cannot be written.
    """
    parser = _Parser(
        prog="covr report",
        description="Write one HTML page, and its figures as PNG, about runs: finished, stopped or still running. "
        "Runs of one configuration are taken together as its seeds.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder of them")
    parser.add_argument(
        "--out", type=Path, help="where to write (default: report/ in the run's folder; of several runs, ./report)"
    )
    options = parser.parse_args(list(arguments))
    folders = find_runs(options.runs)
    out = options.out or (folders[0] / "report" if len(folders) == 1 else Path("report"))
    print(f"report: {write_report(group_runs(_of_agents([read_run(folder) for folder in folders])), out)}")
    return 0


def _of_agents(runs: list[Run]) -> list[Run]:
    """Those that trained an agent; the others are named.

    Raises:
        ConfigError: None did.
    """
    kept, left_out = list[Run](), list[str]()
    for run in runs:
        if not run.configuration:
            left_out.append(f"{run.folder / 'config.yaml'} cannot be read")
        elif class_name(run.configuration.get("data")) == "SavedRows":
            left_out.append(f"{run.folder} fine-tuned a VLM alone, whose figures are in its rounds/")
        else:
            kept.append(run)
    if not kept:
        raise ConfigError(f"{'; '.join(left_out)}; a report is about runs that train an agent.")
    if left_out:
        print(f"left out: {'; '.join(left_out)}")
    return kept


def write_report(groups: Sequence[Group], out: Path) -> Path:
    """Write the page and its PNGs; those of an earlier page there that this one does not have are removed.

    Args:
        groups: What it is about.
        out: Its folder; made if need be.

    Returns:
        The page, ``index.html``.

    Raises:
        ConfigError: The folder cannot be written, or has a page that no report wrote; or a file cannot be read.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        _check_is_ours(out / "index.html")
        page = Page(out)
        with style():
            for part in PARTS:
                if part not in OF_ROUNDS or any(group.round_numbers for group in groups):
                    part(page, groups)
        path = out / "index.html"
        page.remove_pngs_of(path)
        write_atomically(path, [page.html(_title(groups), _head(groups)).encode(errors="replace")])
    except OSError as error:
        place = Path(error.filename or out).resolve()
        if place.is_relative_to(out.resolve()) or out.resolve().is_relative_to(place):
            raise ConfigError(f"{out} cannot be written ({error.strerror}); give another --out.") from error
        raise ConfigError(f"{place} cannot be read or written ({error.strerror}).") from error
    return path


def _check_is_ours(page: Path) -> None:
    """Refuse to replace a page that is none of a report."""
    if not page.is_file():
        return
    text = page.read_text(encoding="utf-8", errors="replace")
    if MARK not in text and "<figure data-png=" not in text:
        raise ConfigError(f"{page} is no report's page, and would be replaced; give another --out.")


def _title(groups: Sequence[Group]) -> str:
    names = [group.name for group in groups]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _head(groups: Sequence[Group]) -> str:
    run = groups[0].runs[0]
    tasks = dict.fromkeys(one.task for group in groups for one in group.runs)
    n = sum(len(group.runs) for group in groups)
    what = [", ".join(filter(None, tasks)), f"{n} runs" if n > 1 else str(run.folder)]
    now = datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M")
    about = " · ".join(filter(None, [*what, f"as of {now}"]))
    return f'<h1>{escape(_title(groups))}</h1><p class="lead">{escape(about)}</p>'
