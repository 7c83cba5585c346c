"""What processes tell each other, in two that do nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from covr_lightning import processes
from covr_lightning.processes import OtherProcessFailed

WORKER = """
import math, sys
import torch
import torch.distributed as dist
from covr_lightning import processes
from covr_lightning.agent.priors import imitation_error

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
weights = [torch.zeros(shape, requires_grad=True) for shape in ((2,), (1, 2), (3,))]
for loss in (float(rank), math.inf if rank else 1.0):
    for p in weights[:2]:
        p.grad = torch.full_like(p, float(1 + 2 * rank))
    mean = processes.average_gradients(weights, torch.tensor(loss))
    # Labelled are two rows of the first process's batch, one 1 and one 2 away, and none of the second's.
    a_r = torch.zeros(4, 1, requires_grad=True)
    error = imitation_error(a_r, torch.tensor([[1.0], [2.0], [5.0], [5.0]]), torch.tensor([not rank] * 2 + [False] * 2))
    (a_r.grad,) = torch.autograd.grad(error, a_r)
    processes.average_gradients([a_r], error.detach())
    print(a_r.grad.flatten().tolist(), processes.gather(error.item()))
    print(mean.item(), *(p.grad.tolist() for p in weights[:2]), weights[2].grad, mean.shape == torch.Size([]))
"""


def test_gradients_and_losses_are_averaged(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in started:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        # In one process with both batches: the mean over two rows, (1 + 4) / 2, and gradients 2 · (0 − a_v) / 2. Their
        # mean over the processes is that.
        lines = said.splitlines()
        assert lines[::2] == ["[-1.0, -2.0, -0.0, -0.0] [5.0, 0.0]"] * 2
        # Losses 0 and 1, gradients 1 and 3; then a loss that is infinite in the second process only.
        assert lines[1::2] == [f"{loss} [2.0, 2.0] [[2.0, 2.0]] None True" for loss in ("0.5", "inf")]


def test_waits_of_other_code_end_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer\nand more")
    with pytest.raises(RuntimeError, match="gloo"), processes.waits_of_others_end_in_one_sentence():
        raise lost  # one process waits for nobody
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(OtherProcessFailed) as failed, processes.waits_of_others_end_in_one_sentence():
        raise lost
    assert "Another process of this run is gone ([../gloo/transport/tcp/pair.cc:534] Conn" in str(failed.value)
    assert "\n" not in str(failed.value)
    with pytest.raises(RuntimeError, match="shapes") as own, processes.waits_of_others_end_in_one_sentence():
        raise RuntimeError("shapes cannot be multiplied")
    assert not isinstance(own.value, OtherProcessFailed)
