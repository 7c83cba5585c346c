"""What a trained agent answers, beside the same worked out row by row."""

from __future__ import annotations

import pytest
import torch

from covr_lightning.agent import RandomCrop, SACModule
from covr_lightning.agent.networks import only_asked
from tests.agent.small_agents import agent, batch


@pytest.fixture
def cropped() -> SACModule:
    """Frames of 20, of which it sees the middle 16; α is not 1."""
    return agent(augmentation=RandomCrop(16), alpha_init=0.3)


@torch.no_grad()
def features(module: SACModule, pixels: torch.Tensor) -> torch.Tensor:
    return module.trunk(pixels[..., 2:18, 2:18])


@torch.no_grad()
def test_actions_are_of_the_middle_of_the_frames(cropped: SACModule) -> None:
    pixels = batch()["pixels"]
    mu, log_std = cropped.actor(cropped.actor_projection(features(cropped, pixels)))
    torch.testing.assert_close(cropped.act(pixels, deterministic=True), mu.tanh())
    noise = torch.randn(mu.shape, generator=torch.Generator().manual_seed(3))
    sampled = cropped.act(pixels, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(sampled, (mu + log_std.exp() * noise).tanh())


@torch.no_grad()
def test_the_smaller_value_of_an_action(cropped: SACModule) -> None:
    b = batch(16)
    q1, q2 = cropped.critic(cropped.critic_projection(features(cropped, b["pixels"])), b["action"])
    smaller = [min(one, other) for one, other in zip(q1.flatten().tolist(), q2.flatten().tolist(), strict=True)]
    assert 0 < int((q1 < q2).sum()) < 16
    assert cropped.min_q(b["pixels"], b["action"]).tolist() == pytest.approx(smaller)


@torch.no_grad()
def test_the_value_of_a_state(cropped: SACModule) -> None:
    pixels = batch(16)["pixels"]
    h = features(cropped, pixels)
    noise = torch.Generator().manual_seed(cropped.seed)
    a, log_pi, _ = cropped.actor.sample(cropped.actor_projection(h), noise)
    q1, q2 = cropped.critic(cropped.critic_projection(h), a)
    expected = [min(q1[i].item(), q2[i].item()) - 0.3 * log_pi[i].item() for i in range(16)]
    assert cropped.state_value(pixels).tolist() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_the_spread_of_actions_over_more_frames_than_are_taken_at_once(cropped: SACModule) -> None:
    pixels = batch(300)["pixels"]
    noise = torch.Generator().manual_seed(cropped.seed)
    parts = [
        cropped.actor.sample(cropped.actor_projection(features(cropped, part)), noise)
        for part in (pixels[:256], pixels[256:])
    ]
    entropy, scatter = cropped.spread(pixels)
    assert entropy == pytest.approx(-sum(log_pi.sum().item() for _, log_pi, _ in parts) / 300 / 2, rel=1e-5)
    middles = sum((a - middle).abs().sum().item() for a, _, middle in parts)
    assert scatter == pytest.approx(middles / 600, rel=1e-5)


class Averaging(torch.nn.Module):
    """Has averages of what passes through it: moved in place, assigned anew, and one that is expanded memory."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("last", None)
        self.register_buffer("ones", torch.ones(1).expand(3))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * h.mean(0)
        self.last = h.clone()
        return self.norm(h) * self.ones


def test_what_is_only_asked_has_its_buffers_back() -> None:
    module = Averaging()
    module(torch.rand(4, 3))
    held, before = dict(module.named_buffers()), {name: b.clone() for name, b in module.named_buffers()}
    with only_asked(module):
        module(torch.rand(4, 3))
        assert not torch.equal(module.mean, before["mean"])
        assert not torch.equal(module.norm.running_mean, before["norm.running_mean"])
    assert held == (after := dict(module.named_buffers()))  # the very same tensors
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("question", ["act", "spread", "min_q", "state_value"])
def test_questions_move_no_averages(question: str) -> None:
    module, b = agent(), batch(8)
    module.trunk = torch.nn.Sequential(module.trunk, torch.nn.BatchNorm1d(module.trunk.features))
    norm = module.trunk[1]
    module.trunk(b["pixels"])
    before = norm.running_mean.clone()
    getattr(module, question)(b["pixels"], *([b["action"]] if question == "min_q" else []))
    assert module.training
    assert torch.equal(norm.running_mean, before)
    assert norm.num_batches_tracked == 1
