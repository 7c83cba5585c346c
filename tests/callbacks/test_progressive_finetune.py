"""What the callback refuses, and where a round's figures go."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from covr_lightning.callbacks import ProgressiveFineTune

from covr_lightning.errors import ConfigError
from covr_lightning.finetune.round import RoundReport


@pytest.mark.parametrize("precision", ["bf16-true", "16-mixed", "32"])
def test_precisions_that_would_change_the_base_weights_or_need_a_scaler(precision: str) -> None:
    with pytest.raises(ConfigError, match=f"is '{precision}'; it can be '32-true' or 'bf16-mixed'"):
        ProgressiveFineTune(precision=precision)


def test_peak_memory_goes_to_log_json_and_loggers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logged: dict[str, float] = {}
    logger = SimpleNamespace(log_metrics=lambda numbers, step: logged.update(numbers, step=step))
    trainer = SimpleNamespace(default_root_dir=str(tmp_path), loggers=[logger])
    report = RoundReport(round=2, env_steps=1000, rows=10, kept=4, peak_memory_mb=1234.5)
    with caplog.at_level(logging.INFO):
        ProgressiveFineTune()._record(trainer, SimpleNamespace(vlm=None), report)
    assert "0 s, 1234 MB at most" in caplog.text
    assert json.loads((tmp_path / "rounds" / "round_002.json").read_text())["peak_memory_mb"] == 1234.5
    assert (logged["round/peak_memory_mb"], logged["step"]) == (1234.5, 1000)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        ProgressiveFineTune()._record(trainer, SimpleNamespace(vlm=None), RoundReport(3, 2000, 0))
    assert "MB" not in caplog.text
