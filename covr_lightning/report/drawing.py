"""Figures that follow the page: SVG whose colours are the page's variables, so light, dark and paper each suit."""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

#: Colours on white, as the PNGs have them; the page's style sheet has a variable for each, and what it is in the dark.
INK, MUTED, LINE, PAPER = "#1f2937", "#6b7280", "#d1d5db", "#ffffff"
# Blue, orange, green, pink, red and light blue, told apart without red, green or blue cones, and 3 : 1 on the page.
COLORS = ("#004fb4", "#dd7710", "#007f55", "#cf63a6", "#961f00", "#2196ee")
_VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", PAPER: "--paper"} | {
    c: f"--c{i}" for i, c in enumerate(COLORS)
}

#: Width of a figure in inches; 72 of its units are an inch in the page, so text keeps its size on a phone.
WIDTH, HEIGHT = 6.2, 3.7

_STYLE: dict[Any, Any] = {
    "font.size": 11.5, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "xtick.color": INK,
    "ytick.color": INK, "axes.titlecolor": INK, "axes.titlesize": 12, "axes.grid": True, "grid.color": LINE,
    "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "legend.fontsize": 11, "legend.handlelength": 2.1, "legend.columnspacing": 1.2,
    "svg.fonttype": "none", "svg.hashsalt": "covr", "text.parse_math": False, "figure.facecolor": "white",
    "axes.facecolor": "none",
}  # fmt: skip


def style() -> AbstractContextManager[None]:
    """Figures that are made and written inside have the report's style."""
    return rc_context(_STYLE)


def new_figure(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """An empty figure, and its axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def as_svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element for a page.

    Args:
        figure: The figure.
        label: What a screen reader says of it.
    """
    text = io.StringIO()
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="|url\()#([\w-]+)', svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    head, _, body = svg.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, "matplotlib gives every figure one"
    lines = [line.strip() for line in body.splitlines() if line.strip()]
    return f'<svg {box[0]} role="img" aria-label="{escape(label)}">' + "\n".join(lines)


def write_png(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, on white."""
    figure.savefig(path, dpi=150)
