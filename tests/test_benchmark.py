"""`covr benchmark inference`: its table, its figures, and what it refuses."""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path

import pytest
import torch

from covr_lightning import benchmark
from covr_lightning.agent import SACModule
from covr_lightning.cli import main
from covr_lightning.envs import DMControl, EnvFactory, EnvSpec
from covr_lightning.envs.dmc import DMControlEnv
from covr_lightning.errors import ConfigError
from covr_lightning.export import POLICY_FILES, export_policy
from covr_lightning.vlm.driving_prompts import DRIVING_PROMPTS
from covr_lightning.vlm.prompts import POINT_REACH, prompt_for
from covr_lightning.vlm.vlm import VLM

COMMAND = ["benchmark", "inference", "--device", "cpu"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime", reason='needs pip install "covr_lightning[export]"')
    folder = tmp_path_factory.mktemp("policy")
    export_policy(SACModule(EnvSpec("x", 30, 30, 3, 2, 4, 100), filters=4, hidden=16, latent=8), folder)
    return folder


def test_the_table_of_the_embedded_vlm_and_a_policy(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "table.csv"
    start = time.perf_counter()
    few = ["--images", "4", "--batch_size", "1", "4"]
    assert main([*COMMAND, *few, "--policy", str(policy), "--out", str(out)]) == 0
    elapsed = time.perf_counter() - start
    with out.open() as file:
        rows = [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]

    vlm = VLM()
    vlm.load(DMControl().spec)
    weights = 4 * sum(tensor.numel() for tensor in [*vlm.model.parameters(), *vlm.model.buffers()]) / 1e6
    ways = ("labelling (prefix cache)", "labelling (prefix cache, constrained)")
    expected = [
        ("generate", 1, weights),
        *((way, size, weights) for size in (1, 4) for way in ways),
        *((f, size, (policy / f).stat().st_size / 1e6) for f in ("policy.pt2", "policy.onnx") for size in (1, 4)),
    ]
    measured, published = rows[: len(expected)], rows[len(expected) :]
    for row, (what, size, megabytes) in zip(measured, expected, strict=True):
        assert str(row["what"]).endswith(what)
        assert (row["batch_size"], row["calls"]) == (size, 5)  # 4 pictures, but 5 calls at least
        assert row["weights_mb"] == pytest.approx(megabytes)
        assert 1e-6 < row["seconds_an_image"] < elapsed
        assert row["deviation"] >= 0
        assert row["device"].startswith("CPU")
        if not math.isnan(row["working_mb"]):
            assert -1 < row["working_mb"] < 500
            assert row["total_mb"] == pytest.approx(row["weights_mb"] + row["working_mb"])
        assert row["pictures"] == ("random pixels" if what.startswith("policy") else "frames of cartpole-swingup")
    assert sum(row["seconds_an_image"] * row["batch_size"] for row in measured) < elapsed
    assert all("embedded" in row["what"] for row in measured[:5])
    # A policy of 15 kB is far faster than a VLM of 3 million parameters.
    assert max(row["seconds_an_image"] for row in measured[5:]) < min(row["seconds_an_image"] for row in measured[:5])

    assert [(row["what"], row["seconds_an_image"], row["total_mb"], row["calls"]) for row in published] == [
        ("published: Qwen2.5-VL-3B", 4.4409, 8344, 0),
        ("published: Qwen2-VL-2B", 4.9421, 7060, 0),
        ("published: LLaVA-1.5-7B", 3.6634, 14722, 0),
        ("published: policy", 0.0012, 10, 0),
    ]
    printed = capsys.readouterr().out
    assert len(printed.strip().splitlines()) == 2 + len(rows)
    assert all(f"| {row['what']} |" in printed for row in rows)


def _number(text: str):  # -> float | str
    try:
        return float(text)
    except ValueError:
        return text


@pytest.mark.parametrize(("task", "size"), [("reacher-easy", 100), ("ghost-pedestrian", 128)])
def test_pictures_are_frames_of_the_task(task: str, size: int) -> None:
    frames, source = benchmark.pictures(task, 3)
    assert (frames.shape, frames.dtype, source) == ((3, 3, size, size), torch.uint8, f"frames of {task}")
    neighbours = (frames[0, :, 1:].float() - frames[0, :, :-1].float()).abs().mean()
    assert neighbours < 20  # of random pixels they differ by 85 on average


def test_pictures_are_random_where_nothing_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: DMControlEnv) -> None:
        raise ConfigError("No rendering backend works.")

    monkeypatch.setattr(DMControlEnv, "_render", fail)
    frames, source = benchmark.pictures("cartpole-swingup", 2)
    assert (frames.shape, source) == ((2, 3, 100, 100), "random pixels")
    assert (frames[0, :, 1:].float() - frames[0, :, :-1].float()).abs().mean() > 60


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["benchmark"], ["inference"]),
        (["benchmark", "training"], ["'training'", "inference"]),
        ([*COMMAND, "--vlm.path", "/nowhere/vlm"], ["'/nowhere/vlm'", "no VLM folder", "vlm.path"]),
        ([*COMMAND, "--vlm.dtype", "int3"], ["'int3'", "bfloat16", "vlm.dtype"]),
        ([*COMMAND, "--task", "walker-wlk"], ["'walker-wlk'", "no prompt", "walker-walk", "highway", "--task"]),
        ([*COMMAND, "--out", "."], ["--out is '.'", "a folder"]),
        ([*COMMAND, "--policy", "/nowhere/policy"], ["'/nowhere/policy'", "no such folder", "--policy"]),
        ([*COMMAND, "--policy", "."], ["'.'", "policy.pt2", "policy.onnx", "covr export"]),
        ([*COMMAND, "--batch_size", "1", "64"], ["64", "--images is 32", "--batch_size"]),
        ([*COMMAND, "--batch_size", "two"], ["batch_size", "'two'", "int"]),
        ([*COMMAND, "--images", "0"], ["--images is 0"]),
    ],
)
def test_what_it_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]) -> None:
    assert main(arguments) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("covr: ")
    for part in parts:
        assert part in sentence


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_cuda_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "inference", "--device", "cuda"]) == 2
    assert "no CUDA device; it can be auto or cpu" in capsys.readouterr().err


@pytest.mark.parametrize("name", POLICY_FILES)
def test_a_damaged_policy(policy: Path, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes((policy / name).read_bytes()[:100])
    with pytest.raises(ConfigError, match=f"{name} cannot be read"):
        benchmark.policy_rows(tmp_path / name, [1], 1, torch.device("cpu"))


@pytest.mark.gpu
def test_on_a_gpu(policy: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    arguments = ["--device", "cuda", "--policy", str(policy), "--images", "4", "--batch_size", "4", "--out", str(out)]
    assert main(["benchmark", "inference", *arguments]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    name = torch.cuda.get_device_name()
    assert [row["device"] == name for row in rows[:5]] == [True, True, True, True, False]  # ONNX runs on the CPU
    assert all(float(row["working_mb"]) > 0 for row in rows[:3])


def test_every_task_with_a_prompt_has_pictures() -> None:
    for task in (*DRIVING_PROMPTS, POINT_REACH, "walker-walk"):
        prompt_for(task)
        assert isinstance(benchmark._factory(task), EnvFactory)
