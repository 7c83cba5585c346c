"""benchmarks/vlm_gpu.py at its tiny shape, and the shape it takes on a GPU."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest
import torch

from benchmarks import vlm_gpu
from benchmarks.qwen import QWEN_3B, QWEN_TOKENS, make_model, make_processor


def test_tiny_runs_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start, out = time.perf_counter(), tmp_path / "made" / "table.csv"
    vlm_gpu.main(["--tiny", "--out", str(out)])
    elapsed = time.perf_counter() - start
    with out.open() as file:
        rows = {row["what"]: row for row in csv.DictReader(file)}
    ways = ["generate", "labelling (prefix cache)", "labelling (prefix cache, constrained)"]
    ways.append("labelling (prefix cache, constrained, with its adapter)")
    trl = [] if vlm_gpu.missing_for_trl() else ["fine-tuning, TRL's SFTTrainer"]
    ours = "fine-tuning, this package"
    assert list(rows) == [*ways, ours, f"{ours}, a step in one batch", *trl]
    printed = capsys.readouterr().out
    for name, row in rows.items():
        figure = float(row["value"])
        # 2 · 10⁵ weights of 2 bytes are labelled with, some more are trained.
        assert 0.4 < float(row["weights_mb"]) < 4
        assert float(row["working_mb"]) < 1000
        assert f"| {name} | {figure:.4g} {row['unit']} |" in printed
        if name in ways:
            assert row["unit"] == "s an image"
            assert 0 < figure < elapsed
        else:
            # 2 × 2 rows, each of a prompt of 190 tokens and an answer of 8 to 17.
            tokens = int(row["note"].split(" and ")[1].split()[0])
            assert 4 * 198 <= tokens <= 4 * 208
            assert row["unit"] == "tokens/s"
            assert figure > tokens / elapsed  # a step took less than everything
    assert "batch 1," in rows["generate"]["note"]
    assert "batch 4," in rows[ways[1]]["note"]
    assert ("left out: trl is not installed" in printed) == (vlm_gpu.missing_for_trl() == "trl")


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        vlm_gpu.main([])
    assert "no CUDA device; --tiny runs on the CPU" in capsys.readouterr().err


@pytest.mark.skipif(not vlm_gpu.missing_for_trl(), reason="trl and datasets are installed")
def test_trl_by_name_without_trl_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        vlm_gpu.main(["--tiny", "--parts", "fine_tuning_trl"])
    assert left.value.code == 2
    assert "--parts names fine_tuning_trl, but " in capsys.readouterr().err


def test_the_full_shape_is_the_3b_model_s() -> None:
    processor = make_processor("highway", tokens=1000)
    model = make_model(QWEN_3B, processor, torch.bfloat16, torch.device("meta"))
    assert (model.num_parameters(), model.dtype) == (3_754_622_976, torch.bfloat16)
    assert vlm_gpu.FULL.shape is QWEN_3B
    assert vlm_gpu.FULL.tokens == QWEN_TOKENS
    # Table 9: 4 × 4 rows a step, rank 128, α 256 on CARLA.
    assert (vlm_gpu.FULL.settings.batch_size, vlm_gpu.FULL.settings.accumulate) == (4, 4)
    assert (vlm_gpu.FULL.lora.rank, vlm_gpu.FULL.lora.alpha) == (128, 256)


def test_the_tokenizer_has_qwen_s_size_and_cuts_answers_digit_by_digit() -> None:
    tokenizer = make_processor("highway").tokenizer
    assert len(tokenizer) == 151_665
    pieces = tokenizer.tokenize("action:[0.02, -0.98]")
    assert pieces == ["action", ":[", "0", ".", "0", "2", ",", "Ġ-", "0", ".", "9", "8", "]"]


@pytest.mark.gpu
def test_tiny_on_a_gpu() -> None:
    results = vlm_gpu.run(vlm_gpu.TINY, torch.device("cuda"))
    assert len(results) >= 4
    assert all(result.value > 0 and result.working_mb > 0 for result in results)
