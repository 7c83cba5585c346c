"""What the benchmark of the training loop takes apart is what the loop does."""

from __future__ import annotations

import pytest
import torch

from benchmarks import collection
from covr_lightning.agent import SACModule
from covr_lightning.envs import EnvSpec


def small(spec: EnvSpec) -> SACModule:
    return SACModule(spec, hidden=8, filters=2)


def test_the_agent_acts_once_the_warm_up_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "WARMUP", 5)
    acted = []
    monkeypatch.setattr(SACModule, "act", lambda *args, **kwargs: acted.append(args) or torch.zeros(1, 1))
    ways = {chance: collection.collected(40, "fast", store=True, agent=small if chance else None) for chance in (1, 0)}
    for _ in range(12):
        next(ways[1])
    # Each action but the first 5 is the agent's; the collector may be one step ahead of what was asked for.
    assert len(acted) in (12 - 5, 12 - 5 + 1)
    acted.clear()
    for _ in range(12):
        next(ways[0])
    assert not acted


def test_updates_alone_compute_in_the_precision_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(collection, "WARMUP", 0)
    monkeypatch.setattr(collection, "collected", lambda *args, **kwargs: iter(range(0)))
    monkeypatch.setattr(collection.TensorDictReplayBuffer, "sample", lambda replay: None)
    monkeypatch.setattr(SACModule, "training_step", lambda module, batch: seen.append(torch.is_autocast_enabled("cpu")))
    for precision in collection.PRECISIONS:
        next(collection.updates(precision))
        assert not torch.is_autocast_enabled("cpu")  # nor does what is collected between updates
    assert seen == [False, True]


def test_the_table_s_rows() -> None:
    parts = {"collection": (0.005, 0.006), "update": (0.015, 0.014)}
    seconds = collection.Seconds(whole=0.025, stream=0.006, step=0.015, sample=0.001)
    # Both: 20 ms, by steps 20; the loop 25; Lightning's 25 − 6 − 15 = 4 of an update of 16.
    assert [*collection._row([(parts, seconds)] * 2)] == [
        "5.00", "15.00", "20.00", "20.00", "25.00", "0.80 (0.80 to 0.80)", "0.80 (0.80 to 0.80)", "4.00", "25.0%",
    ]  # fmt: skip
