"""The paper's numbers, and the documents that quote them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from covr_lightning.config_files import bundled_configs
from covr_lightning.published import mean_over_tasks, published_results

DOCS = Path(__file__).parents[1] / "docs"


def test_reader() -> None:
    (covr,) = published_results(1, method="COVR (Ours)", metric="ER")
    assert (covr.table, covr.setting, covr.mean, covr.std, str(covr)) == (1, "CARLA HW", 248, 81, "248 ± 81")
    (memory,) = published_results(17, "deployment", "Qwen2.5-VL-3B", "memory MB")
    assert (memory.mean, memory.std, str(memory)) == (8344, None, "8344")
    assert len(published_results()) == 317
    assert {row.setting for row in published_results(4, "Walker")} == {"DMControl 100k: Walker, Walk"}
    assert [row.mean for row in published_results((12, 13), metric="ER")] == [227, 248, 232, 224, 248, 187, 128]
    # (237 + 239 + 118 + 95 + 230 + 85) / 6 = 1004 / 6; COVR: (872 + 969 + 504 + 802 + 976 + 960) / 6 = 5083 / 6.
    assert mean_over_tasks("SAC") == pytest.approx(1004 / 6)
    assert mean_over_tasks("COVR (Ours)") == pytest.approx(5083 / 6)
    assert mean_over_tasks("Flare") is None
    with pytest.raises(ValueError, match="Table 6 is none of 1, 2, 3"):
        published_results(6)
    with pytest.raises(ValueError, match="'er'; it can be 'return', 'ER'"):
        published_results(metric="er")  # type: ignore[arg-type]


def quoted(table: int | tuple[int, ...], setting: str | None, method: str, metric: str | None = None) -> str:
    rows = published_results(table, setting, method, metric)  # type: ignore[arg-type]
    return str(rows[0]).replace("-", "−") if rows else "–"


def test_methods_are_told_with_the_papers_numbers() -> None:
    names, text = set(bundled_configs()), (DOCS / "methods.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    checked = []
    for cells in rows:
        named = re.findall(r"[\w/]+\.yaml", " ".join(cells))
        assert set(named) <= names
        if len(cells) == 7 and named:
            method, mean = cells[0], mean_over_tasks(cells[0])
            assert cells[2:] == [
                quoted(1, None, method, "ER"), quoted(2, None, method, "ER"), quoted((3, 4), "Cartpole", method),
                "–" if mean is None else f"{mean:.0f}", quoted(10, None, method),
            ]  # fmt: skip
        elif len(cells) == 6 and cells[0].startswith(("M", "COVR")):
            assert cells[4:] == [quoted(5, None, cells[0], metric) for metric in ("ER", "DD")]
        elif cells[0] in ("12", "13", "16"):
            (name,) = named
            header = bundled_configs()[name].read_text()
            assert f"Paper: ER {cells[3]}, DD {cells[4]}." in header
            method = re.search(r"^# (?:λ = (\d)|ψ₀ = (\d+)|([\w.-]+)) in the sweep", header)
            assert method is not None
            lam, psi0, vlm = method.groups()
            row = f"lambda={lam}" if lam else f"psi0={psi0}" if psi0 else vlm.replace("LLaVA", "LLava")
            assert cells[3:] == [quoted(int(cells[0]), None, row, metric) for metric in ("ER", "DD")]
        else:
            continue
        checked += named
    # learning_cpu and learning_road hold no experiment of the paper's.
    assert {name for name in names if "/" in name and not name.startswith("learning_")} <= set(checked)


@pytest.mark.parametrize("number", range(1, 12))
def test_headers_of_the_ablations_quote_their_rows(number: int) -> None:
    header = bundled_configs()[f"ablations/m{number}.yaml"].read_text()
    assert f"Paper: ER {quoted(5, None, f'M{number}', 'ER')}, DD {quoted(5, None, f'M{number}', 'DD')} (" in header
