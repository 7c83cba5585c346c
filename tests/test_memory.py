"""Peak memory: a block that comes and goes is seen once, and a fine-tune round's report shows it."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from covr_lightning import memory
from covr_lightning.allocator import USERS_OWN
from covr_lightning.envs import DMControl
from covr_lightning.finetune import KeepAll, UniformWeight
from covr_lightning.finetune.module import FineTuneSettings
from covr_lightning.finetune.round import RoundReport, fine_tune_round
from covr_lightning.memory import PeakMemory
from covr_lightning.vlm.vlm import VLM, LoRA

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
MEGABYTES = 400


def rows(n: int) -> TensorDict:
    frame = torch.randint(0, 256, (n, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return TensorDict({"frame": frame, "action": torch.tensor([0.5, -0.5]).expand(n, 2)}, [n])


def block(device: torch.device = CPU) -> float:
    """Fills and frees a block of 400 MB; its last value, so that nothing can leave it out."""
    return torch.ones(MEGABYTES * 1_000_000 // 4, device=device)[-1].item()


@pytest.fixture
def _resets() -> None:
    if math.isnan(PeakMemory(CPU).megabytes()):
        pytest.skip("this kernel does not let a process reset its peak memory (/proc/self/clear_refs)")


def told(function: str, *arguments: object, keeps_freed: bool) -> list[float]:
    """What one of this module's functions gives in a process of its own.

    Here the collector may free what earlier tests have left while the block is there, and whether freed memory is kept
    is the whole process's to say, once and for all.
    """
    code = (
        "import json\n"
        "from covr_lightning.allocator import keep_freed_memory\n"
        "import tests.test_memory as tests\n"
        f"if {keeps_freed}: assert keep_freed_memory()\n"
        f"print(json.dumps(tests.{function}{arguments!r}))"
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith(USERS_OWN)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=own, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def peaks_of_a_block() -> list[float]:
    """Before, with and after."""
    peak = PeakMemory(CPU)
    before = peak.megabytes()
    block()
    return [before, peak.megabytes(), PeakMemory(CPU).megabytes()]


#: Whether the process keeps what it has freed, as that of `covr` does.
both = pytest.mark.parametrize("keeps_freed", [False, True], ids=["glibc", "covr"])


@both
@pytest.mark.usefixtures("_resets")
def test_a_block_counts_from_its_reset_on(keeps_freed: bool) -> None:
    before, with_block, after = told("peaks_of_a_block", keeps_freed=keeps_freed)
    assert with_block - before == pytest.approx(MEGABYTES, rel=0.05)
    assert after - before < MEGABYTES / 10


class BlockKeeper(KeepAll):
    """Keeps all, and needs a block of memory for it."""

    def keep(self, scores: Tensor, entropy: float) -> Tensor:
        block()
        return super().keep(scores, entropy)


def peaks_of_rounds(folder: str) -> list[float]:
    """Of four, of which the third needs the block."""
    vlm = VLM(folder, LoRA(rank=2))
    vlm.load(DMControl("reacher-easy").spec)
    settings = FineTuneSettings(epochs=1, max_steps=1, batch_size=2, accumulate=1, held_out=0.0)
    peaks = []
    for filter_ in (KeepAll(), KeepAll(), BlockKeeper(), KeepAll()):
        gc.collect()  # of the round before, which could be freed while the block is there
        report = RoundReport(1, 1000, 4)
        fine_tune_round(
            report, vlm, rows(4), torch.arange(4.0), 0.0, filter_, UniformWeight(), settings,
            {"accelerator": "cpu", "devices": 1},
        )  # fmt: skip
        assert report.as_dict()["peak_memory_mb"] == report.peak_memory_mb
        peaks.append(report.peak_memory_mb)
    return peaks


@both
@pytest.mark.usefixtures("_resets")
def test_a_round_reports_its_peak(untrained_vlm: Path, keeps_freed: bool) -> None:
    _, before, with_block, after = told("peaks_of_rounds", str(untrained_vlm), keeps_freed=keeps_freed)
    assert with_block - before > 0.75 * MEGABYTES  # the block comes before training, which needs memory of its own
    assert with_block - after > 0.75 * MEGABYTES


def test_unknown_where_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "no_folder" / "clear_refs")
    assert math.isnan(PeakMemory(CPU).megabytes())


@pytest.mark.gpu
def test_on_a_gpu_what_pytorch_gave_out() -> None:
    gpu = torch.device("cuda", 0)
    gc.collect()  # of earlier tests
    before = torch.cuda.memory_allocated(gpu) / 1e6
    peak = PeakMemory(gpu)
    block(gpu)
    assert peak.megabytes() - before == pytest.approx(MEGABYTES, rel=0.02)
    assert PeakMemory(gpu).megabytes() == pytest.approx(before, abs=2)
