"""`covr fit --config vlm_sft.yaml`: one round on saved rows, in one process and in two."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file, save_file
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from covr_lightning.cli import main
from covr_lightning.envs import DMControl
from covr_lightning.errors import ConfigError
from covr_lightning.finetune import EDDF, RALW, QScore, ReturnScore, RewardScore, SavedRows
from covr_lightning.finetune.alone import check_strategy, fine_tune_saved
from covr_lightning.finetune.module import FineTuneSettings
from covr_lightning.finetune.round import RoundReport, fine_tune_round
from covr_lightning.finetune.saved_rows import RowsOfRound, load_rows, save_rows
from covr_lightning.finetune.scores import Score
from covr_lightning.vlm.vlm import VLM, LoRA

SPEC = DMControl("reacher-easy", size=40).spec
SETTINGS = FineTuneSettings(epochs=1, batch_size=3, accumulate=1, lr=1e-4, held_out=0.2, gradient_checkpointing=False)


def saved(n: int = 40, round_: int = 3, seed: int = 0) -> RowsOfRound:
    g = torch.Generator().manual_seed(seed)
    rows = TensorDict(
        {
            "frame": torch.randint(0, 256, (n, 3, 40, 40), dtype=torch.uint8, generator=g),
            "action": torch.rand(n, 2, generator=g) * 2 - 1,
            "reward": torch.rand(n, 1, generator=g),
            "g": torch.rand(n, 1, generator=g),
        },
        [n],
    )
    return RowsOfRound(rows, rows["g"].reshape(-1), -0.7, round_, 1000 * round_, SPEC)


def arguments(rows: Path, vlm: Path, runs: Path) -> list[str]:
    settings = {"epochs": 1, "batch_size": 3, "accumulate": 1, "lr": 1e-4, "held_out": 0.2}
    return [
        "fit", "--config", "vlm_sft.yaml", "--data.rows", str(rows), "--vlm.path", str(vlm), "--runs_dir", str(runs),
        "--vlm.lora.rank", "4", "--vlm.lora.alpha", "8", "--vlm.lora.dropout", "0", "--trainer.accelerator", "cpu",
        "--model.settings.gradient_checkpointing", "false",
        *(part for name, value in settings.items() for part in (f"--model.settings.{name}", str(value))),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def one(untrained_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows and the run of one process on them."""
    folder = tmp_path_factory.mktemp("alone")
    save_rows(folder / "round_003_rows.safetensors", saved())
    assert main([*arguments(folder / "round_003_rows.safetensors", untrained_vlm, folder / "one")]) == 0
    return folder


def test_it_is_the_round_that_a_training_job_would_run(
    one: Path, untrained_vlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds = one / "one" / "vlm_sft" / "rounds"
    report = json.loads((rounds / "round_003.json").read_text())
    vlm = VLM(str(untrained_vlm), LoRA(rank=4, alpha=8, dropout=0.0))
    vlm.load(SPEC)
    vlm.round = 2
    expected, rows = RoundReport(3, 3000, 40), saved()
    fine_tune_round(
        expected, vlm, rows.rows, rows.scores, rows.entropy, EDDF(), RALW(), SETTINGS,
        {"accelerator": "cpu", "devices": 1}, tmp_path / "adapter",
    )  # fmt: skip
    assert report["losses"] == expected.losses
    assert report["losses"]
    for name in ("round", "env_steps", "rows", "kept", "trained", "held_out", "entropy", "tau", "error_constant"):
        assert report[name] == getattr(expected, name), name
    here = load_file(rounds / "round_003_adapter" / "adapter_model.safetensors")
    there = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in there)
    assert (rounds.parent / "config.yaml").is_file()


def test_two_devices_end_with_the_adapter_of_one(one: Path, untrained_vlm: Path) -> None:
    command = [sys.executable, "-m", "covr_lightning.cli"]
    command += arguments(one / "round_003_rows.safetensors", untrained_vlm, one / "two")
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    # The first process alone writes and prints.
    assert [p.name for p in (one / "two").iterdir()] == ["vlm_sft"]
    assert done.stdout.count("VLM error") == 1
    assert "constant" in done.stdout
    a, b = (one / name / "vlm_sft" / "rounds" for name in ("one", "two"))
    for key in ("losses", "error_constant"):
        of_a, of_b = (json.loads((folder / "round_003.json").read_text())[key] for folder in (a, b))
        assert of_b == pytest.approx(of_a, abs=1e-6)
    first, second = (load_file(folder / "round_003_adapter" / "adapter_model.safetensors") for folder in (a, b))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-6)


def test_pictures_of_more_frames_than_the_vlm_is_shown_are_refused(
    one: Path, untrained_vlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(one / "round_003_rows.safetensors", untrained_vlm, tmp_path)
    assert main([*command, "--vlm.frames", "2"]) == 2
    assert "vlm.frames is 2, but the pictures in data.rows are 40 pixels wide, where one" in capsys.readouterr().err


class NaNScore(Score):
    def __call__(self, rows: TensorDictBase, q: Any) -> Tensor:
        return torch.full((len(rows),), math.nan)


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = saved()
    save_rows(tmp_path / "rounds" / "r.safetensors", rows)
    back = load_rows(tmp_path / "rounds" / "r.safetensors")
    assert [p.name for p in (tmp_path / "rounds").iterdir()] == ["r.safetensors"]
    assert (back.entropy, back.round, back.env_steps, back.spec) == (-0.7, 3, 3000, SPEC)
    assert torch.equal(back.scores, rows.scores)
    assert back.rows.keys() == rows.rows.keys()
    assert all(torch.equal(back.rows[name], rows.rows[name]) for name in rows.rows.keys())  # noqa: SIM118 (iterating a TensorDict gives rows)


def test_a_folder_takes_its_rounds_in_order(tmp_path: Path) -> None:
    first, second = saved(5, 2, seed=1), replace(saved(4, 10, seed=2), entropy=0.5)
    save_rows(tmp_path / "round_010_rows.safetensors", second)
    save_rows(tmp_path / "round_002_rows.safetensors", first)
    both = SavedRows(str(tmp_path)).load()
    assert (len(both.rows), both.round, both.env_steps, both.entropy) == (9, 10, 10000, 0.5)
    assert torch.equal(both.scores, torch.cat([first.scores, second.scores]))
    judged = SavedRows(str(tmp_path), score=RewardScore(), entropy=2.0).load()
    assert torch.equal(judged.scores, both.rows["reward"].reshape(-1))
    assert judged.entropy == 2.0


def test_a_file_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "round_001_rows.safetensors"
    save_rows(path, saved(4))
    assert len(SavedRows([str(path), str(tmp_path)]).load().scores) == 4


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    path = tmp_path / "round_001_rows.safetensors"
    with pytest.raises(ConfigError, match=r"data\.rows is .* neither a file nor a folder"):
        SavedRows(str(path)).load()
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(ConfigError, match=r"data\.rows is .* cannot be read as safetensors"):
        SavedRows(str(path)).load()
    save_file({"frame": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, path)
    with pytest.raises(ConfigError, match="lacks the round's ε"):
        SavedRows(str(path)).load()
    rows = saved(4)
    del rows.rows["frame"]
    save_rows(path, rows)
    with pytest.raises(ConfigError, match="lacks the columns frame"):
        SavedRows(str(path)).load()
    rows = saved(4)
    rows.rows["action"] = rows.rows["action"][:, :1]
    save_rows(path, rows)
    with pytest.raises(ConfigError, match=r"action \(4, 1\).* must hold .* finite actions \(N, 2\)"):
        SavedRows(str(path)).load()
    for wrong in (math.nan, math.inf):
        rows = saved(4)
        rows.scores[2] = wrong
        save_rows(path, rows)
        with pytest.raises(ConfigError, match="must hold finite scores"):
            SavedRows(str(path)).load()
    other, both = tmp_path / "round_002_rows.safetensors", [str(path), str(tmp_path / "round_002_rows.safetensors")]
    save_rows(path, saved(4))
    rows = saved(4)
    rows.rows["frame"] = torch.cat([rows.rows["frame"]] * 2, dim=-1)
    save_rows(other, rows)
    with pytest.raises(ConfigError, match=r"frames of \(3, .* with the same vlm\.frames"):
        SavedRows(both).load()
    other.unlink()
    with pytest.raises(ConfigError, match="scores that are not finite for 4 rows"):
        SavedRows(str(path), score=NaNScore()).load()
    save_rows(path, saved(0))
    with pytest.raises(ConfigError, match=r"score \(0,\).* N at least 1"):
        SavedRows(str(path)).load()
    rows = saved(4)
    del rows.rows["g"]
    save_rows(path, rows)
    assert len(SavedRows(str(path)).load().scores) == 4
    with pytest.raises(ConfigError, match=r"data\.score is ReturnScore, but the rows in data\.rows lack .*\bg\b"):
        SavedRows(str(path), score=ReturnScore()).load()
    with pytest.raises(ConfigError, match=r"data\.score is QScore"):
        SavedRows(str(path), score=QScore())


def test_rows_that_are_not_there_leave_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "vlm_sft.yaml", "--data.rows", "none", "--runs_dir", str(tmp_path / "runs")]) == 2
    assert "data.rows is 'none'" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*"))


def test_the_length_has_one_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "vlm_sft.yaml", "--data.rows", "x", "--trainer.max_epochs", "3"]) == 2
    assert "trainer.max_epochs is 3; the length of a fine-tuning is model.settings.epochs" in capsys.readouterr().err


def test_what_lightning_says_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", "--config", "vlm_sft.yaml", "--data.rows", "x", "--trainer.accelerator", "banana"]
    assert main([*arguments, "--runs_dir", str(tmp_path)]) == 2
    assert "covr: trainer: You selected an invalid accelerator name" in capsys.readouterr().err


STRATEGIES = {
    "ddp_spawn": ("ddp_spawn", "spawns or forks its processes"),
    "ddp_fork": ("ddp_fork", "spawns or forks its processes"),
    "tensor parallel": (
        ModelParallelStrategy(),
        "data_parallel_size is 'auto'; it must be the number of all devices, 2",
    ),
}


@pytest.mark.parametrize("case", STRATEGIES)
def test_strategies_that_would_lose_the_adapter_are_refused(case: str) -> None:
    strategy, says = STRATEGIES[case]
    with pytest.raises(ConfigError, match=says):
        check_strategy(L.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_precisions_that_would_change_the_weights_are_refused(precision: Any) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.precision is '{precision}'.*'32-true' or 'bf16-mixed'"):
        check_strategy(L.Trainer(accelerator="cpu", devices=1, precision=precision, logger=False))


def test_a_sharded_vlm_is_not_measured(tmp_path: Path) -> None:
    save_rows(tmp_path / "round_003_rows.safetensors", saved())
    fsdp2 = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=fsdp2, logger=False)
    with pytest.raises(ConfigError, match=r"held_out is 0\.2 with ModelParallelStrategy"):
        fine_tune_saved(SavedRows(str(tmp_path)), VLM(), SETTINGS, trainer, {}, tmp_path)
    vlm, settings = VLM(), replace(SETTINGS, held_out=0)
    vlm.quantization = "nf4"
    with pytest.raises(ConfigError, match=r"vlm\.quantization is 'nf4' with ModelParallelStrategy"):
        fine_tune_saved(SavedRows(str(tmp_path)), vlm, settings, trainer, {}, tmp_path)


@pytest.mark.gpu
def test_it_stands_alone_on_a_gpu(one: Path, untrained_vlm: Path, tmp_path: Path) -> None:
    more = ["--trainer.accelerator", "gpu", "--trainer.devices", "1"]
    assert main([*arguments(one / "round_003_rows.safetensors", untrained_vlm, tmp_path), *more]) == 0
    of_cpu, of_gpu = (
        json.loads((folder / "vlm_sft" / "rounds" / "round_003.json").read_text()) for folder in (one / "one", tmp_path)
    )
    assert of_gpu["losses"] == pytest.approx(of_cpu["losses"], rel=1e-2)
