"""One process of test_several_processes.py: trains an adapter and writes its weights and losses.

ddp_worker.py VLM ROWS OUT STRATEGY DTYPE "BATCH_SIZE ACCUMULATE"..., with torchrun's environment variables.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file, save_file

from covr_lightning.envs import DMControl
from covr_lightning.finetune.module import FineTuneSettings
from covr_lightning.finetune.training import train_adapter
from covr_lightning.random_state import own_randomness
from covr_lightning.vlm.vlm import VLM, LoRA


def main(folder: str, rows: str, out: str, strategy: str, dtype: str, *cases: str) -> None:
    vlm = VLM(folder, LoRA(rank=4, alpha=8, dropout=0.0), dtype=dtype)
    vlm.load(DMControl("reacher-easy").spec)
    with own_randomness(0):
        vlm.add_adapter()
    adapter = {name: p for name, p in vlm.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in adapter.items()}
    result = {f"before/{name}": value for name, value in before.items()}
    data, world = load_file(rows), int(os.environ["WORLD_SIZE"])
    fsdp2 = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
    for case in cases:
        with torch.no_grad():
            for name, p in adapter.items():
                p.copy_(before[name])
        batch_size, accumulate = map(int, case.split())
        settings = FineTuneSettings(
            epochs=2, batch_size=batch_size, accumulate=accumulate, lr=1e-4, gradient_checkpointing=False
        )
        losses, failures = train_adapter(
            vlm, data["frame"], data["action"], data["weight"], settings,
            {"accelerator": "cpu", "devices": world, "strategy": fsdp2 if strategy == "fsdp2" else strategy},
        )  # fmt: skip
        assert not failures, failures
        result[f"{case}/losses"] = torch.tensor(losses)
        trained = {name: p for name, p in vlm.model.named_parameters() if p.requires_grad}
        result |= {f"{case}/{name}": p.detach().clone() for name, p in trained.items()}
    save_file({name: value.contiguous() for name, value in result.items()}, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
