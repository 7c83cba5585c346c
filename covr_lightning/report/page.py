"""A page in one file: figures, tables and pictures are inside it, and it asks nobody for anything."""

from __future__ import annotations

import base64
import importlib.resources
import io
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from covr_lightning.report.drawing import as_svg, write_png

#: What a page of this module says of itself in its head.
MARK = '<meta name="generator" content="covr report">'

#: Letters that a PNG's name has at most, without its counter and ending.
_LETTERS = 80


class Cell(str):
    """A table's cell as HTML, which a plain text that begins with ``<td`` is not."""


class _TextCell(Cell):
    """One of :func:`text_cell`."""


class Page:
    """Collects a page's parts, and writes its figures as PNG beside it.

    Args:
        folder: Where the PNGs go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: list[str] = []
        self._sections: list[tuple[str, str]] = []
        self._pngs: set[str] = set()

    def add(self, html: str) -> None:
        """Add HTML as it is."""
        self._parts.append(html)

    def section(self, title: str, how: str = "") -> None:
        """Begin a section.

        Args:
            title: Its title, also in the page's list of sections.
            how: How to read it, HTML.
        """
        name = _slug(title)
        self._sections.append((name, title))
        self.add(f'<h2 id="{name}">{escape(title)}</h2>')
        if how:
            self.add(f'<p class="how">{how}</p>')

    def missing(self, sentence: str) -> None:
        """Say in one sentence (HTML) what is not there and what records it."""
        self.add(f'<p class="missing">{sentence}</p>')

    def figure(self, figure: Figure | None, name: str, caption: str) -> str:
        """A figure's HTML; it is written as PNG too. Nothing of None.

        Args:
            figure: The figure.
            name: Of its PNG, without the ending.
            caption: Below it, plain text.
        """
        if figure is None:
            return ""
        whole = _slug(name)
        if len(whole) > _LETTERS:  # of a long name what begins it, and what the figure is of
            whole = f"{whole[: _LETTERS - 32].rstrip('-')}-{whole[-31:].lstrip('-')}"
        name, n = whole, 2
        while name in self._pngs:
            name, n = f"{whole}-{n}", n + 1
        self._pngs.add(name)
        svg = as_svg(figure, caption)
        figure.set_layout_engine("none")  # a figure is laid out once, which is a third of what drawing it takes
        write_png(figure, self.folder / f"{name}.png")
        return f'<figure data-png="{name}">{svg}<figcaption>{escape(caption)}</figcaption></figure>'

    def figures(self, figures: Sequence[str], wide: bool = False) -> None:
        """Add figures side by side where there is room."""
        inside = "".join(figures)
        if inside:
            self.add(f'<div class="figures{" wide" * wide}">{inside}</div>')

    def remove_pngs_of(self, earlier: Path) -> None:
        """Remove the PNGs beside an earlier page that this page does not have; where there is no such page, nothing."""
        try:
            names = set(re.findall(r'<figure data-png="([a-z0-9-]+)">', earlier.read_text(encoding="utf-8")))
        except (FileNotFoundError, UnicodeDecodeError):
            return
        for name in names - self._pngs:
            (earlier.parent / f"{name}.png").unlink(missing_ok=True)

    def html(self, title: str, head: str) -> str:
        """The whole page.

        Args:
            title: Plain text.
            head: HTML in front of the list of sections.
        """
        style = importlib.resources.files("covr_lightning.report").joinpath("style.css").read_text("utf-8")
        links = "".join(f'<a href="#{name}">{escape(text)}</a>' for name, text in self._sections)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{MARK}\n'
            f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
            f"<header>{head}<nav>{links}</nav></header>\n<main>\n"
            + "\n".join(self._parts)
            + "\n</main>\n</body>\n</html>\n"
        )


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    ours: Sequence[int] = (),
    dense: bool = False,
) -> str:
    """A table's HTML.

    Args:
        head: Titles, plain text; they stand as their cells do, at the left above a column of :func:`text_cell`.
        rows: Cells, each plain text or a :class:`Cell`; a row's first is its title.
        caption: Plain text.
        ours: Rows to stand out.
        dense: For many columns.
    """
    lines = [
        f'<div class="scroll"><table{" class=dense" * dense}>',
        f"<caption>{escape(caption)}</caption>" if caption else "",
    ]
    of_text = [bool(rows) and all(isinstance(row[i], _TextCell) for row in rows) for i in range(len(head))]
    kinds = [' class="text"' if text else "" for text in of_text]
    titles = "".join(f'<th scope="col"{kind}>{escape(title)}</th>' for kind, title in zip(kinds, head, strict=True))
    lines.append(f"<thead><tr>{titles}</tr></thead><tbody>")
    for i, row in enumerate(rows):
        html = [cell if isinstance(cell, Cell) else f"<td>{escape(cell)}</td>" for cell in row]
        html[:1] = [f'<th scope="row"{cell[3:-5]}</th>' for cell in html[:1]]
        cells = "".join(html)
        lines.append(f'<tr class="ours">{cells}</tr>' if i in ours else f"<tr>{cells}</tr>")
    return "\n".join([*filter(None, lines), "</tbody></table></div>"])


def bar(share: float) -> Cell:
    """A table's cell with a bar of a share of its width, from 0 to 1."""
    return Cell(f'<td class="bar"><i style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></i></td>')


def text_cell(text: str) -> Cell:
    """A table's cell whose text may be long: it breaks behind dots and the like, and between a name's words."""
    parts = (escape(part) for part in re.split(r"(?<=[._/|,)])(?=[^\s.\d])|(?<=[a-z])(?=[A-Z])", text))
    return _TextCell(f'<td class="text">{"<wbr>".join(parts)}</td>')


def picture(frame: np.ndarray, said: str) -> str:
    """A frame (3, h, w) uint8 as an image's HTML, and what is said where it is not seen."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(said)}" src="data:image/png;base64,{data}">'


def number(value: float | None, decimals: int = 1) -> str:
    """A number for people: a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:,.{decimals}f}"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text.replace("-", "−")


def plus_minus(mean: float, spread: float, decimals: int = 1) -> str:
    """Mean ± spread; the mean alone without a spread."""
    if math.isnan(mean) or math.isnan(spread):
        return number(mean, decimals)
    return f"{number(mean, decimals)} ± {number(spread, decimals)}"


def percent(share: float | None) -> str:
    """A share in per cent; one that is not 0 is not shown as 0."""
    if share is None or math.isnan(share):
        return "–"
    shown = f"{100 * share:.0f}"
    return "< 1 %" if shown == "0" and share > 0 else f"{shown} %"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"
