"""With every part null the agent is pixel SAC as written down without parts, bit for bit; guided, with Eq. 4's term."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import nn
from torch.optim import Adam

from covr_lightning.agent import ConstantPrior, SACModule
from tests.agent.small_agents import agent, batch, parameters, same


class PlainSAC:
    """Pixel SAC (Haarnoja et al., 2018; Yarats et al., 2019) from scratch, beginning with an agent's weights.

    Args:
        module: The agent.
        lr: Learning rate of critics and encoder, of the actor, and of α.
        lam: λ of Eq. 4.
        mean: Whether tanh μ is pulled towards the VLM's actions, and no sample.
        over_batch: Whether rows without an answer count in Eq. 4's mean.
        q_filter: Whether only those answers count that the critics prefer.
    """

    def __init__(
        self,
        module: SACModule,
        lr: tuple[float, float, float] = (1e-3, 1e-3, 1e-4),
        lam: float = 0.0,
        mean: bool = False,
        over_batch: bool = False,
        q_filter: bool = False,
    ) -> None:
        self.lam, self.mean, self.over_batch, self.q_filter = lam, mean, over_batch, q_filter
        nets = copy.deepcopy(module)
        self.nets = nets
        self.conv, self.conv_target = nets.trunk.layers, nets.target_trunk.layers
        critic = [self.conv, nets.critic_projection, nets.critic]
        self.critic_opt = Adam([p for net in critic for p in net.parameters()], lr=lr[0], fused=True)
        actor = [nets.actor_projection, nets.actor]
        self.actor_opt = Adam([p for net in actor for p in net.parameters()], lr=lr[1], fused=True)
        self.alpha_opt = Adam([nets.log_alpha], lr=lr[2], betas=(0.5, 0.999), fused=True)
        self.noise = torch.Generator().manual_seed(0)
        self.steps = 0

    @staticmethod
    def encode(conv: nn.Sequential, images: torch.Tensor) -> torch.Tensor:
        # Scaled by the weights, as bits count here; test_fast_update.py has the images scaled.
        x = images.float().contiguous(memory_format=torch.channels_last)
        x = F.conv2d(x, conv[0].weight / 255, conv[0].bias, conv[0].stride)
        return conv[1:](x).permute(0, 2, 3, 1).flatten(1)

    def update(self, b: TensorDict) -> None:
        n = self.nets
        alpha = n.log_alpha.detach().exp()
        with torch.no_grad():
            h = self.encode(self.conv, b["next", "pixels"])
            a, log_pi, _ = n.actor.sample(n.actor_projection(h), self.noise)
            q1, q2 = n.target_critic(n.target_projection(self.encode(self.conv_target, b["next", "pixels"])), a)
            value = torch.min(q1, q2) - alpha * log_pi
            y = b["next", "reward"] + 0.99 * (1 - b["next", "terminated"].float()) * value
        q1, q2 = n.critic(n.critic_projection(self.encode(self.conv, b["pixels"])), b["action"])
        self.critic_opt.zero_grad()
        (F.mse_loss(q1, y) + F.mse_loss(q2, y)).backward()
        self.critic_opt.step()
        self.steps += 1
        if self.steps % 2:
            return
        h = self.encode(self.conv, b["pixels"]).detach()
        a, log_pi, mean = n.actor.sample(n.actor_projection(h), self.noise)
        q = torch.min(*n.critic(n.critic_projection(h).detach(), a))
        loss = (alpha * log_pi - q).mean()
        if self.lam:
            distance = ((b["a_v"] - (mean if self.mean else a)) ** 2).sum(1)
            if self.q_filter:
                distance = distance * (torch.min(*n.critic(n.critic_projection(h), b["a_v"])) > q)[:, 0]
            answered = b["a_v_valid"][:, 0].float()
            rows = len(b) if self.over_batch else answered.sum().clamp(min=1)
            loss = loss + self.lam * ((distance * answered).sum() / rows)
        self.actor_opt.zero_grad()
        loss.backward()
        self.actor_opt.step()
        self.alpha_opt.zero_grad()
        (n.log_alpha.exp() * (-log_pi.detach() - -2.0)).mean().backward()
        self.alpha_opt.step()
        with torch.no_grad():
            for target, source, tau in (
                (n.target_critic, n.critic, 0.01),
                (n.target_trunk, n.trunk, 0.05),
                (n.target_projection, n.critic_projection, 0.05),
            ):
                for p_target, p in zip(target.parameters(), source.parameters(), strict=True):
                    p_target.lerp_(p, tau)


def test_all_null_parts_give_plain_sac_bit_for_bit_after_50_updates() -> None:
    module = agent()
    plain = PlainSAC(module)
    before = parameters(module)
    for update in range(50):
        b = batch(seed=update)
        module.training_step(b)
        plain.update(b)
    after = parameters(module)
    assert same(after, parameters(plain.nets))
    for prefix in ("trunk.", "critic.", "actor.", "log_alpha", "target_trunk.", "target_critic."):
        assert not same(before, after, prefix), prefix


@pytest.mark.parametrize(
    ("prior", "plainly"),
    [
        ({}, {}),
        ({"action": "mean", "mean_over": "batch"}, {"mean": True, "over_batch": True}),
        ({"q_filter": True}, {"q_filter": True}),
    ],
)
def test_guidance_adds_the_term_of_eq_4_and_nothing_else(prior: dict[str, Any], plainly: dict[str, Any]) -> None:
    rates = {"critic_lr": 1e-3, "actor_lr": 3e-3, "alpha_lr": 5e-4}
    module = agent(prior=ConstantPrior(2.0, **prior), **rates)
    plain = PlainSAC(module, (1e-3, 3e-3, 5e-4), 2.0, **plainly)
    for update in range(50):
        b = batch(seed=update, labelled=0.3)
        module.training_step(b)
        plain.update(b)
    assert same(parameters(module), parameters(plain.nets))
