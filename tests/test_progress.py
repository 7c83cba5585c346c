"""Bars of parts of a run, on a terminal and in a log."""

from __future__ import annotations

import sys
import time

import pytest

from covr_lightning import processes
from covr_lightning.progress import bar


class Terminal:
    """Takes what is written to it."""

    def __init__(self) -> None:
        self.written = ""

    def write(self, text: str) -> int:
        self.written += text
        return len(text)

    def flush(self) -> None:
        """Nothing waits."""

    def isatty(self) -> bool:
        return True


def five_steps(shown: bool = True) -> None:
    with bar(5, "asking", "row", shown) as progress:
        for _ in range(5):
            progress.update()


def test_a_terminal_shows_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    five_steps()
    assert "asking:   0%" in terminal.written
    assert terminal.written.endswith("\r")  # gone


def test_a_log_is_told_only_of_what_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    five_steps()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("covr_lightning.progress.SECONDS_IN_A_LOG", 0.2)
    with bar(5, "asking", "row") as progress:
        time.sleep(0.3)
        progress.update(4)
    assert "4/5" in capsys.readouterr().err


def test_only_the_first_process_shows_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("covr_lightning.progress.SECONDS_IN_A_LOG", 0.0)
    five_steps(shown=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(processes, "number", lambda: 1)
    five_steps()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(processes, "number", lambda: 0)
    five_steps()
    assert "5/5" in capsys.readouterr().err
