"""Links in the documentation lead somewhere: to a file that is there and a heading that it has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


def anchors(page: Path) -> list[str]:
    """The headings' anchors, as GitHub and GitLab make them: lower case, spaces to hyphens, punctuation left out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for link in links(page):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading, only {anchors(target)}"


def test_there_are_links_and_anchors_to_look_at() -> None:
    found = [link for page in PAGES for link in links(page)]
    assert sum("#" in link for link in found) >= 10
    assert "why-and-what-came-of-mending-it" in anchors(ROOT / "docs/results/cpu_size.md")


def test_every_curve_of_the_results_is_named_on_one_of_their_pages() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs/results").glob("*.md"))
    assert [path.name for path in (ROOT / "docs/results").glob("*.csv") if path.name not in pages] == []
