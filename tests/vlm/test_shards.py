"""Gradients of two halves in threads are those of the whole batch, whatever the number of cores."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from covr_lightning.vlm.embedded.shards import SHARDS, sharded


def half(module: nn.Module, x: Tensor, total: int) -> tuple[Tensor, int]:
    loss = module(x).square().sum() / total
    return loss, len(x)


def test_gradients_are_those_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(9, 5)
    net[0].bias.requires_grad_(False)
    half(net, x, 9)[0].backward()
    whole = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    threads = torch.get_num_threads()
    with sharded(net) as shards:
        for _ in range(2):  # the second call replaces the first one's gradients
            counts = shards.backward([partial(half, x=x[i::SHARDS], total=9) for i in range(SHARDS)])
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads
    assert counts == [5, 4]
    parts = [p.grad for p in net.parameters() if p.grad is not None]
    assert len(parts) == len(whole) == 3
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


def test_replicas_follow_the_module() -> None:
    net = nn.Linear(2, 1)
    with sharded(net) as shards:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        losses = []
        for _ in range(30):
            parts = [partial(half, x=torch.ones(2, 2), total=4) for _ in range(SHARDS)]
            shards.backward(parts)
            optimizer.step()
            losses.append(half(net, torch.ones(4, 2), 4)[0].item())
    assert losses[-1] < 1e-3 * losses[0] + 1e-9


def test_an_error_in_a_thread_is_raised() -> None:
    def broken(module: nn.Module) -> tuple[Tensor, None]:
        raise ValueError("half of it")

    with sharded(nn.Linear(1, 1)) as shards, pytest.raises(ValueError, match="half of it"):
        shards.backward([broken, broken])
