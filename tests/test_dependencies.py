"""The pins are complete, and the list that explains them is true."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required() -> dict[str, str]:
    """Direct dependencies, extras included: name → range."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    found = (re.fullmatch(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?(.*)", entry) for group in groups for entry in group)
    return {normal(match[1]): match[2] for match in found if match}


def pins() -> dict[str, str]:
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    entries = [line for line in lines if line and not line.startswith("#")]
    assert all(entry.count("==") == 1 for entry in entries), "exact versions only"
    return {normal(entry.split("==")[0]): entry.split("==")[1] for entry in entries}


def listed() -> dict[str, tuple[str, str]]:
    rows = re.findall(r"^\| ([a-z0-9-]+) \| ([^|]*) \| ([^|]*) \|", (ROOT / "docs/dependencies.md").read_text(), re.M)
    return {name: (asked, pinned) for name, asked, pinned in rows if name != "package"}


def test_every_dependency_is_explained_with_its_range_and_its_pin() -> None:
    pinned = pins()
    assert listed() == {name: (asked or "any", pinned.get(name, "–")) for name, asked in required().items()}


def test_only_what_no_machine_here_installs_is_not_pinned() -> None:
    assert set(required()) - set(pins()) <= {"vllm", "deepspeed", "ray"}
