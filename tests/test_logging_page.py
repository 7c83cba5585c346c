"""docs/logging.md names what is logged and what a round's file holds, and nothing else."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from covr_lightning.finetune import RoundReport

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "logging.md").read_text(encoding="utf-8")


def test_what_updates_log() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "covr_lightning" / "agent").glob("*.py"))
    logged = set(re.findall(r'"(train/\w+)"', code))
    assert len(logged) > 10
    assert logged == set(re.findall(r"`(train/\w+)`", PAGE))


def test_what_a_round_reports() -> None:
    table = PAGE.split("`rounds/round_NNN.json`, one for each")[1].split("`rounds/round_NNN_adapter`")[0]
    named = [name for row in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(field.name for field in fields(RoundReport))
