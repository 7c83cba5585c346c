"""What a run leaves behind for its reader."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from covr_lightning.callbacks import RunSummary


def begin(folder: Path, curve: list[dict[str, float]]) -> None:
    """Begin training as a run does that is resumed from a checkpoint with this curve."""
    summary = RunSummary()
    summary.load_state_dict({"curve": curve})
    data = SimpleNamespace(counters=SimpleNamespace(env_steps=2000))
    trainer: Any = SimpleNamespace(default_root_dir=str(folder), datamodule=data, loggers=[])
    module: Any = SimpleNamespace(prior=SimpleNamespace(evaluated=lambda value: None))
    summary.on_train_start(trainer, module)


def test_a_run_resumed_from_an_older_checkpoint_takes_back_its_later_evaluations(tmp_path: Path) -> None:
    path = tmp_path / "curve.csv"
    path.write_text("env_steps,return,return_std\n40,1.00,0.50\n2000,3.00,0.50\n4000,9.00,0.50\n")
    begin(tmp_path, [{"env_steps": 40, "return": 1.0, "return_std": 0.5}])
    assert path.read_text().split() == ["env_steps,return,return_std", "40,1.00,0.50"]
    begin(tmp_path, [])
    assert not path.exists()
    begin(tmp_path, [])
