"""What the table of methods says is counted from the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import methods
from benchmarks.learning import METHODS
from covr_lightning.agent import DrQViews, RandomShift


class Counted:
    """Not counted.

    Neither is this.
    """

    #: Nor this.
    size = 3  # counted: 2, with the class's own line

    def double(self) -> int:
        """Not counted."""

        # Not counted.
        return (
            2
            * self.size
        )  # fmt: skip


def test_lines_of_code_by_hand() -> None:
    assert methods.lines_of_code(Counted) == 7  # class, size, def, and the four lines of the return


def test_a_methods_parts_and_parameters() -> None:
    cli = methods.build(METHODS["DrQ"].configs)
    assert methods.parts_of(cli) == [RandomShift, DrQViews]
    # Frames of 84 leave 35×35 of 32 filters after strides 2, 1, 1, 1.
    convolutions = 9 * 32 * 9 + 32 + 3 * (32 * 32 * 9 + 32)
    projection = 32 * 35 * 35 * 50 + 50 + 2 * 50
    actor = (50 * 1024 + 1024) + (1024 * 1024 + 1024) + (1024 * 2 + 2)
    q = (51 * 1024 + 1024) + (1024 * 1024 + 1024) + (1024 + 1)
    expected = convolutions + 2 * projection + actor + 2 * q + 1
    assert methods.trainable_parameters(cli.model) == expected
    assert methods.parts_of(methods.build(METHODS["SAC"].configs)) == []


def test_updates_are_timed_on_any_method() -> None:
    model = methods.build((*METHODS["ResAct"].configs, "point_reach.yaml")).model
    methods.update_of(model, 4)()
    assert model.counters.grad_steps == 2


def test_the_written_table_has_every_method(tmp_path: Path) -> None:
    written = (methods.ROOT / "docs" / "methods.md").read_text()
    table = written.partition(methods.BEGIN)[2].partition(methods.END)[0]
    names = [line.split("|")[1].strip() for line in table.strip().splitlines()[2:]]
    assert names == list(METHODS)
    assert set(methods.scores()) <= set(METHODS)
    assert set(methods.relative_times()) <= set(METHODS)
    rows = {line.split("|")[1].strip(): line.split("|")[3].strip() for line in table.strip().splitlines()[2:]}
    for name, method in METHODS.items():
        parts = methods.parts_of(methods.build(method.configs))
        lines = sum(map(methods.lines_of_code, parts))
        # A line more need not be written down at once, a tenth must.
        assert int(rows[name].replace("–", "0")) == pytest.approx(lines, rel=0.1), name
    for name, (score, random) in methods.scores().items():  # the table is of the newest figures
        assert f"| {score} ({random}) |" in next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{methods.BEGIN}\nold\n{methods.END}\nafter\n")
    methods.write(page, ["new"])
    assert page.read_text() == f"before\n{methods.BEGIN}\n\nnew\n\n{methods.END}\nafter\n"
