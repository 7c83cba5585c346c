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

BUFFERS = """
import sys
import torch
import torch.distributed as dist
from covr_lightning import processes

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
whole, column = (torch.full((2, 3), 1.0 + rank) for _ in range(2))
of_all, memory = torch.ones(1).expand(4), torch.full((4,), 1.0 + rank)
small, flag, none, one = torch.tensor([7 + rank], dtype=torch.int16), torch.tensor(not rank), torch.zeros(0), memory[:1]
processes.share_buffers([whole, column[:, 1:], of_all, small, flag, none, one.squeeze(0)])
print(whole.tolist(), column.tolist(), of_all.tolist(), small.tolist(), flag.item(), memory.tolist())
"""


def two(code: str, folder: Path) -> list[str]:
    """What two processes print."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(folder / "meet")], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    return said


def test_buffers_of_any_type_and_layout_become_the_first_ones(tmp_path: Path) -> None:
    first, second = two(BUFFERS, tmp_path)
    ones = [1.0] * 3
    assert first == f"{[ones] * 2} {[ones] * 2} {[1.0] * 4} [7] True {[1.0] * 4}\n"
    # What lies beside a buffer in memory stays.
    assert second == f"{[ones] * 2} {[[2.0, 1.0, 1.0]] * 2} {[1.0] * 4} [7] True {[1.0, 2.0, 2.0, 2.0]}\n"


def test_gradients_and_losses_are_averaged(tmp_path: Path) -> None:
    for said in two(WORKER, tmp_path):
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
