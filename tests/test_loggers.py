"""Trackers that are not installed by default, by Lightning's loggers from a YAML, offline (docs/logging.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.short_runs import fit


def with_logger(folder: Path, kind: str, **settings: object) -> tuple[str, ...]:
    path = folder / "logger.yaml"
    logger = {"class_path": f"lightning.pytorch.loggers.{kind}", "init_args": settings}
    path.write_text(yaml.safe_dump({"trainer": {"logger": [logger]}}))
    return "--config", str(path), "--data.max_env_steps", "2000"


def test_mlflow(untrained_vlm: Path, tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow", reason="mlflow-skinny, sqlalchemy and alembic are not installed").tracking
    place = f"sqlite:///{tmp_path / 'mlruns.db'}"
    arguments = with_logger(tmp_path, "MLFlowLogger", experiment_name="covr", tracking_uri=place)
    assert fit(tmp_path, untrained_vlm, *arguments) == 0
    client = tracking.MlflowClient(tracking_uri=place)
    [experiment] = [one for one in client.search_experiments() if one.name == "covr"]
    [run] = client.search_runs([experiment.experiment_id])
    assert [point.step for point in client.get_metric_history(run.info.run_id, "eval/return")] == [40, 2000]
    assert client.get_metric_history(run.info.run_id, "round/kept")[0].step == 1200
    assert (tmp_path / "run" / "logs" / "csv" / "metrics.csv").is_file()


def test_weights_and_biases(untrained_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    arguments = with_logger(tmp_path, "WandbLogger", project="covr", save_dir=str(tmp_path), offline=True)
    assert fit(tmp_path, untrained_vlm, *arguments) == 0
    wandb.finish()  # as at the end of a process
    [log] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    for name in (b"eval/return", b"round/kept", b"train/critic_loss"):
        assert name in log.read_bytes()
    assert (tmp_path / "run" / "logs" / "csv" / "metrics.csv").is_file()
