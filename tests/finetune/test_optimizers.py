"""The adapter's optimizers: which exist, which need a GPU, and that they are refused before anything is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from covr_lightning.cli import main
from covr_lightning.envs import DMControl
from covr_lightning.errors import ConfigError
from covr_lightning.finetune import KeepAll, UniformWeight
from covr_lightning.finetune.module import FineTuneSettings
from covr_lightning.finetune.optimizers import check_optimizer, make_optimizer
from covr_lightning.finetune.round import RoundReport, fine_tune_round
from covr_lightning.vlm.vlm import VLM, LoRA

PAGED = ("paged_adamw", "paged_adamw_8bit")


def rows(n: int) -> TensorDict:
    frame = torch.randint(0, 256, (n, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return TensorDict({"frame": frame, "action": torch.tensor([0.5, -0.5]).expand(n, 2)}, [n])


def test_one_step_of_adamw_by_hand() -> None:
    # g = 2: m = 0.2, v = 0.004; corrected 2 and 4; the step is lr·2/(√4 + 1e-8) = lr. Without weight decay 3 → 2.9.
    weight = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = make_optimizer("adamw", [weight], lr=0.1)
    (2 * weight).sum().backward()
    optimizer.step()
    assert weight.item() == pytest.approx(2.9, abs=1e-6)


def test_names() -> None:
    with pytest.raises(ConfigError, match=r"settings\.optimizer is 'sgd'; it can be 'adamw', 'paged_adamw'"):
        FineTuneSettings(optimizer="sgd")
    assert [FineTuneSettings(optimizer=name).optimizer for name in PAGED] == list(PAGED)
    check_optimizer("adamw", torch.device("cpu"))


@pytest.mark.parametrize("name", PAGED)
def test_paged_needs_a_gpu_and_says_so_before_anything_is_done(name: str, untrained_vlm: Path) -> None:
    vlm = VLM(str(untrained_vlm), LoRA(rank=2))
    vlm.load(DMControl("reacher-easy").spec)
    report = RoundReport(1, 1000, 8)
    with pytest.raises(ConfigError, match=rf"settings\.optimizer is '{name}', which needs a CUDA device.*'adamw'"):
        fine_tune_round(
            report, vlm, rows(8), torch.arange(8.0), 0.0, KeepAll(), UniformWeight(),
            FineTuneSettings(optimizer=name), {"accelerator": "cpu", "devices": 1},
        )  # fmt: skip
    assert not vlm.has_adapter


def test_a_run_that_cannot_page_does_not_begin(
    untrained_vlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fit", "--config", "quickstart.yaml", "--config", "qlora.yaml", "--vlm.path", str(untrained_vlm)]
    command += ["--vlm.quantization", "null", "--runs_dir", str(tmp_path), "--trainer.accelerator", "cpu"]
    assert main(command) == 2
    assert "settings.optimizer is 'paged_adamw_8bit', which needs a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", PAGED)
def test_paged_optimizers_teach(name: str, untrained_vlm: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install covr_lightning[quantised])")
    vlm = VLM(str(untrained_vlm), LoRA(rank=32, alpha=64, dropout=0.0), dtype="bfloat16")
    vlm.to(torch.device("cuda", 0))
    vlm.load(DMControl("reacher-easy").spec)
    report = RoundReport(1, 1000, 20)
    settings = FineTuneSettings(epochs=10, batch_size=8, accumulate=1, lr=3e-3, held_out=0.2, optimizer=name)
    trainer = {"accelerator": "gpu", "devices": [0], "precision": "bf16-mixed"}
    fine_tune_round(
        report, vlm, rows(20), torch.arange(20.0), 0.0, KeepAll(), UniformWeight(), settings, trainer
    )  # fmt: skip
    assert report.losses[-1] < report.losses[0]
    assert report.peak_memory_mb > 0
