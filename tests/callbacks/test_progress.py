"""The bar's estimate of the time left."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from covr_lightning.callbacks import CovrProgressBar
from covr_lightning.callbacks.progress import as_clock


def test_time_left_follows_the_newer_half_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = SimpleNamespace(env_steps=0, grad_steps=7, rounds=1)  # resumed after 7 updates
    data = SimpleNamespace(counters=counters, max_env_steps=10_000, last_training_return=None, lost_episodes=0)
    trainer = SimpleNamespace(datamodule=data, callback_metrics={})
    module = SimpleNamespace(prior=SimpleNamespace(weight=lambda counters: 0.5))
    bar = CovrProgressBar()

    def metrics(seconds: float, env_steps: int, grad_steps: int) -> dict[str, Any]:
        monkeypatch.setattr("covr_lightning.callbacks.progress.time.monotonic", lambda: seconds)
        counters.env_steps, counters.grad_steps = env_steps, grad_steps
        return bar.get_metrics(trainer, module)  # type: ignore[arg-type]

    def shown(seconds: float, env_steps: int, grad_steps: int) -> str | None:
        return metrics(seconds, env_steps, grad_steps).get("left")

    assert shown(0, 0, 7) is None
    assert shown(1, 1000, 7) is None  # the warm-up's 1000 steps a second say nothing
    assert shown(2, 2000, 8) is None
    assert shown(12, 2100, 58) == "13:10"  # 100 steps in 10 s; 7900 to go: 790 s
    for seconds in (12.5, 15):  # redrawn during an evaluation: 100 steps and 50 updates in the 10 s before
        rates = metrics(seconds, 2100, 58)
        assert (rates["env/s"], rates["upd/s"]) == ("10", "5.0")
    assert shown(102, 4000, 900) == "4:44"  # 1900 in 90 s, a round among them; 6000 to go
    assert shown(302, 5000, 1400) == "8:20"  # another job has come: 2900 in 290 s; 5000 to go
    assert shown(322, 7000, 2400) == "3:40"  # and gone: 3000 in 220 s; 3000 to go
    assert shown(332, 8000, 2900) == "0:20"  # 3000 in 30 s; 2000 to go
    assert shown(352, 10_000, 4000) == "0:00"


def test_clock() -> None:
    assert [as_clock(s) for s in (0, 59.6, 61, 3599, 3600, 36_125)] == [
        "0:00", "1:00", "1:01", "59:59", "1:00:00", "10:02:05",
    ]  # fmt: skip
