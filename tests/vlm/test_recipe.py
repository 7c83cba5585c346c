"""The whole recipe, as it made the shipped weights: minutes on two cores, so it is marked slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from covr_lightning.vlm.embedded.recipe import train_embedded_vlm


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_the_recipe_from_another_seed_grounds_numbers_in_pixels(tmp_path: Path) -> None:
    report = train_embedded_vlm(tmp_path / "vlm", seed=1)
    ratios = {name: scene["ratio"] for name, scene in report["scenes"].items()}
    assert report["mean_ratio"] <= 0.6
    assert all(ratio < 1 for ratio in ratios.values()), ratios
