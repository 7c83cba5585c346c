"""Fine-tuning in two processes (gloo, CPU) makes the steps that one makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.forked import launch
from tests.vlm.tiny_models import write_hub_folder


def train(folder: Path, vlm: Path, processes: int, *arguments: str) -> list[dict[str, torch.Tensor]]:
    """Train the cases in as many processes; what each of them ends with."""
    outs = [folder / f"{processes}_{rank}_{arguments[0]}_{arguments[1]}.safetensors" for rank in range(processes)]
    of_each = [[str(vlm), str(folder / "rows.safetensors"), str(out), *arguments] for out in outs]
    statuses, said = launch("tests.finetune.ddp_worker", of_each, folder)
    assert statuses == [0] * processes, said
    return [load_file(out) for out in outs]


# Batches of 3 leave one of two processes a row less. Of the ten rows half weigh 0, so batches differ in how many are
# trained on; in batches of 1 always one process has none, and sometimes both. Answers with a minus are longer.
CASES = {
    "batches that do not divide": "3 1",
    "a process without rows": "1 1",
    "accumulation": "2 2",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    g = torch.Generator().manual_seed(1)
    save_file(
        {
            "frame": torch.randint(0, 256, (10, 3, 40, 40), dtype=torch.uint8, generator=g),
            "action": torch.rand(10, 2, generator=g) * 2 - 1,
            "weight": torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0, 0.25, 0.0, 1.0, 0.0, 0.7]),
        },
        folder / "rows.safetensors",
    )
    return folder


@pytest.fixture(scope="module")
def one(rows: Path, untrained_vlm: Path) -> dict[str, torch.Tensor]:
    return train(rows, untrained_vlm, 1, "auto", "float32", *CASES.values())[0]


@pytest.fixture(scope="module")
def two(rows: Path, untrained_vlm: Path) -> list[dict[str, torch.Tensor]]:
    return train(rows, untrained_vlm, 2, "ddp", "float32", *CASES.values())


def compare(one: dict[str, torch.Tensor], rank: dict[str, torch.Tensor], case: str, atol: float) -> None:
    names = [name for name in one if name.startswith(f"{case}/")]
    losses = f"{case}/losses"
    assert (one[losses] != 0).sum() > 3
    moved = max((one[n] - one[n.replace(case, "before", 1)]).abs().max() for n in names if n != losses)
    assert moved > 1e-4
    for name in names:
        torch.testing.assert_close(rank[name], one[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_steps_of_one(
    case: str, one: dict[str, torch.Tensor], two: list[dict[str, torch.Tensor]]
) -> None:
    for rank in two:
        compare(one, rank, CASES[case], 1e-6)


def test_a_vision_layer_that_nothing_is_read_from_is_not_waited_for(rows: Path, tmp_path: Path) -> None:
    # LLaVA reads the output of the last layer but one of its vision tower.
    llava, case = write_hub_folder(tmp_path, "llava"), CASES["accumulation"]
    (one,) = train(rows, llava, 1, "auto", "float32", case)
    assert any("vision_tower.encoder.layers.1." in name for name in one if name.startswith(f"{case}/"))
    assert not any("vision_tower.encoder.layers.2." in name for name in one if name.startswith(f"{case}/"))
    for rank in train(rows, llava, 2, "ddp", "float32", case):
        compare(one, rank, case, 1e-6)


def test_fsdp2_makes_the_steps_of_one(rows: Path, untrained_vlm: Path, one: dict[str, torch.Tensor]) -> None:
    case = CASES["accumulation"]
    for rank in train(rows, untrained_vlm, 2, "fsdp2", "float32", case):
        compare(one, rank, case, 1e-6)


def test_fsdp2_takes_a_float32_adapter_over_a_bfloat16_base(rows: Path, untrained_vlm: Path) -> None:
    case = CASES["a process without rows"]
    (one,) = train(rows, untrained_vlm, 1, "auto", "bfloat16", case)
    for rank in train(rows, untrained_vlm, 2, "fsdp2", "bfloat16", case):
        # In batches of one row no sum is split up, so nothing is rounded in another way.
        compare(one, rank, case, 1e-5)
