"""Counts of a VLM's answers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Answers:
    """How often a VLM was asked, and could not be understood or did not answer."""

    asked: int = 0
    unparsable: int = 0
    unanswered: int = 0

    def count(self, valid: Tensor, answered: Tensor) -> None:
        """Add answers: which of them can be parsed and which came at all, (B,) bool each."""
        self.asked += len(valid)
        self.unparsable += int((answered & ~valid).sum())
        self.unanswered += int((~answered).sum())

    def __add__(self, other: Answers) -> Answers:
        return Answers(self.asked + other.asked, self.unparsable + other.unparsable, self.unanswered + other.unanswered)
