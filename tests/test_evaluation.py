"""What is measured of episodes, and what an environment of somebody's own cannot measure."""

from __future__ import annotations

from typing import Any

import pytest

from covr_lightning.errors import ConfigError
from covr_lightning.evaluation import EpisodeResult, EpisodeStatistics


def test_means_and_spreads_by_hand() -> None:
    statistics = EpisodeStatistics()
    for returned, distance in ((1.0, 10.0), (3.0, 30.0)):
        statistics.update(EpisodeResult(returned, 5, {"distance": distance}))
    measured = {name: value.item() for name, value in statistics.compute().items()}
    assert measured == {"episodes": 2, "return": 2.0, "return_std": 1.0, "distance": 20.0, "distance_std": 10.0}


@pytest.mark.parametrize("metrics", [{"return": 5.0}, {"env_steps": 1.0}, {"x_std": 1.0}, {"x": None}, {"x": "far"}])
def test_a_metric_that_cannot_be(metrics: dict[str, Any]) -> None:
    (name,) = metrics
    with pytest.raises(ConfigError, match=f"episode_metrics gave '{name}'"):
        EpisodeStatistics().update(EpisodeResult(1.0, 5, metrics))


def test_metrics_keep_their_names() -> None:
    statistics = EpisodeStatistics()
    statistics.update(EpisodeResult(1.0, 5, {"a": 1.0}))
    with pytest.raises(ConfigError, match="gave b after an episode with a; the names must stay the same"):
        statistics.update(EpisodeResult(1.0, 5, {"b": 1.0}))
