"""Soft actor-critic from pixels: the one off-policy update that every method here shares.

Haarnoja et al. (2018) on images as in SAC-AE (Yarats et al., 2019) and RAD (Laskin et al., 2020), with the term of
COVR's Eq. 4 on the actor. The update is `training_step`; read it from top to bottom.

Where it differs from COVR's printed Eqs. 1–4: the target takes the minimum of two critics and stops at a true terminal
(Eqs. 2–3 leave both out), as every code that the paper builds on does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from covr_lightning import processes
from covr_lightning.agent.actors import GaussianActor
from covr_lightning.agent.augmentations import Augmentation, NoAugmentation
from covr_lightning.agent.checks import check_backend, check_graphs, check_precision, check_sizes
from covr_lightning.agent.encoders import ConvTrunk, Encoder
from covr_lightning.agent.finite import FiniteGuard, OnNonFinite
from covr_lightning.agent.graphs import UpdateGraphs
from covr_lightning.agent.networks import Projection, TwinQ, frozen, soft_update, squared_error, without_autocast
from covr_lightning.agent.objectives import Objective
from covr_lightning.agent.own_parts import augmented_size, check_weight, checked_loss, feature_count, try_parts
from covr_lightning.agent.priors import NoPrior, Prior
from covr_lightning.agent.reporting import Reporting
from covr_lightning.agent.views import OneView, Views
from covr_lightning.envs.base import EnvSpec
from covr_lightning.errors import ConfigError
from covr_lightning.step_times import StepTimes


@dataclass(frozen=True)
class Due:
    """What an update does beside moving the critics.

    Attributes:
        actor: Update actor and temperature.
        targets: Move the targets.
    """

    actor: bool
    targets: bool


class SACModule(Reporting):
    """Pixel SAC with exchangeable parts. With every part null it is plain SAC.

    Gradients: the critics' loss (and objectives) move the shared convolutions; the actor's loss stops at their output,
    in its own projection as in the critics'. Actor and critics have a projection of their own.

    Args:
        spec: The environment's shapes; filled in from `data` by the command line.
        augmentation: Random change of images, and what acting sees instead.
        views: Which augmented views feed critics, target and actor.
        encoder: What turns stacked frames into features.
        actor_head: The policy on the actor's latent.
        objectives: Auxiliary losses on the encoder.
        prior: The pull towards the VLM's actions (Eq. 4).
        filters: Filters of each convolution.
        strides: Strides of the convolutions, one per layer.
        latent: Size of z.
        tanh: Tanh after the encoder's LayerNorm.
        hidden: Width of the MLPs.
        gamma: Discount γ per agent step.
        critic_lr: Learning rate of critics and encoder.
        actor_lr: Learning rate of the actor.
        alpha_lr: Learning rate of the temperature.
        alpha_betas: Adam's β for the temperature.
        alpha_init: First temperature α₀.
        actor_every_grad_steps: Critic updates per update of actor and temperature.
        target_every_grad_steps: Critic updates per update of the targets.
        critic_tau: Step of the target critics' moving average.
        encoder_tau: Step of the target encoder's moving average.
        on_non_finite: What a NaN or infinite reward, loss or gradient does: ``"stop"`` the run (exit status 3; what was
            saved before stays), or ``"skip"`` the update or the transition.
        torch_compile: Backend of torch.compile for the networks, such as ``"inductor"``; by default they are not
            compiled, which on a CPU is not worth its time.
        cuda_graphs: Make the whole update by CUDA graphs (:class:`covr_lightning.agent.graphs.UpdateGraphs`). Elsewhere
            than on a GPU this changes nothing.
        seed: Seed of augmentation and update noise.
    """

    def __init__(
        self,
        spec: EnvSpec | None = None,
        augmentation: Augmentation | None = None,
        views: Views | None = None,
        encoder: Encoder | None = None,
        actor_head: GaussianActor | None = None,
        objectives: Sequence[Objective] | None = (),
        prior: Prior | None = None,
        filters: int = 32,
        strides: tuple[int, ...] = (2, 1, 1, 1),
        latent: int = 50,
        tanh: bool = False,
        hidden: int = 1024,
        gamma: float = 0.99,
        critic_lr: float = 1e-3,
        actor_lr: float = 1e-3,
        alpha_lr: float = 1e-4,
        alpha_betas: tuple[float, float] = (0.5, 0.999),
        alpha_init: float = 0.1,
        actor_every_grad_steps: int = 2,
        target_every_grad_steps: int = 2,
        critic_tau: float = 0.01,
        encoder_tau: float = 0.05,
        on_non_finite: OnNonFinite = "stop",
        torch_compile: str | None = None,
        cuda_graphs: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if spec is None:
            raise ConfigError("SACModule needs the environment's shapes: SACModule(spec=env.spec).")
        check_sizes(locals())
        check_backend(torch_compile)
        self.automatic_optimization = False
        self.spec = spec
        self.augmentation = augmentation or NoAugmentation()
        self.views = views or OneView()
        self.prior = prior or NoPrior()
        self.latent = latent
        self.gamma = gamma
        self.lrs = {"critic": critic_lr, "actor": actor_lr, "alpha": alpha_lr}
        self.alpha_betas = alpha_betas
        self.actor_every_grad_steps = actor_every_grad_steps
        self.target_every_grad_steps = target_every_grad_steps
        self.critic_tau, self.encoder_tau = critic_tau, encoder_tau
        self.target_entropy = -float(spec.action_dim)
        self.seed = seed
        self.finite = FiniteGuard(on_non_finite)
        self.torch_compile = torch_compile
        self.cuda_graphs = cuda_graphs
        self._graphs: UpdateGraphs | None = None
        self.times = StepTimes()
        #: Told after each update of the critics which rows of the replay it was on (B,), and their |δ| (B,): the mean
        #: of both critics' |Q − y|. Set where the sampler goes by them.
        self.td_error_listener: Callable[[Tensor, Tensor], None] | None = None

        frame = spec.frame_height, spec.frame_width
        size = augmented_size(self.augmentation, spec.channels, frame, "model.augmentation")
        self.views.check(spec.channels, size)
        self.trunk = encoder or ConvTrunk()
        self.trunk.build(spec.channels, size, filters, strides)
        features = feature_count(self.trunk)
        self.critic_projection = Projection(features, latent, tanh)
        self.critic = TwinQ(latent, spec.action_dim, hidden)
        self.actor_projection = Projection(features, latent, tanh)
        self.actor = actor_head or GaussianActor()
        self.actor.build(latent, spec.action_dim, hidden)
        #: What the networks are, by YAML key, as far as the shapes of their weights do not show it.
        self.architecture = {
            "model.strides": list(strides),
            "model.tanh": tanh,
            "model.actor_head.log_std_bounds": list(self.actor.log_std_bounds),
        }
        self.log_alpha = nn.Parameter(torch.tensor(math.log(alpha_init)))
        self.target_trunk = copy.deepcopy(self.trunk).requires_grad_(False)
        self.target_projection = copy.deepcopy(self.critic_projection).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.objectives = nn.ModuleList(objectives)
        for objective in objectives or ():
            objective.build(self)

    # -- the update ----------------------------------------------------------------------------------------------

    def training_step(self, batch: TensorDictBase, batch_idx: int = 0) -> None:
        """One update of the critics, and of actor, temperature and targets when they are due.

        Args:
            batch: Transitions (B,) with ``pixels``, ``action``, ``("next", "pixels" | "reward" | "terminated")`` and,
                for the prior, ``a_v`` and ``a_v_valid``; for an actor that `needs_previous_action` also
                ``previous_action`` (B, A), zero at an episode's first step; empty while the run warms up. A sampler may
                add ``priority_weight`` (B,), a factor of each transition's squared errors; the data add ``sequences``
                for objectives that need them.
            batch_idx: Not used.
        """
        if batch.is_empty():
            processes.share_buffers(self.buffers())  # acting moves them apart, and updates do
            return
        step = self.counters.grad_steps + 1
        due = self.due(step)
        lam = self.prior.weight(self.counters)
        check_weight(self.prior, lam)
        if self.cuda_graphs and self.device.type == "cuda":
            self._graphs = self._graphs or UpdateGraphs(self)
            with self.times("update"):
                errors, metrics = self._graphs.update(batch, due, lam)
        else:
            errors, metrics = self.update(batch, due, lam, self.all_optimizers())
        self.counters.grad_steps = step
        if self.td_error_listener is not None:
            self.td_error_listener(batch["index"], errors)
        processes.share_buffers(self.buffers())
        self.log_update(metrics)

    def due(self, grad_step: int) -> Due:
        """What is due at the n-th update, from 1."""
        return Due(grad_step % self.actor_every_grad_steps == 0, grad_step % self.target_every_grad_steps == 0)

    def update(
        self, batch: TensorDictBase, due: Due, lam: float | Tensor, optimizers: list[Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The update itself, all of which a GPU can do without its host.

        Args:
            batch: See :meth:`training_step`.
            due: What is updated beside the critics.
            lam: λ; a tensor where a CUDA graph is to read it anew each time, and then not 0.
            optimizers: Those of :meth:`configure_optimizers`.

        Returns:
            |δ| of each transition (B,), and metrics.
        """
        critic_opt, actor_opt, alpha_opt, *objective_opts = optimizers
        o, a, r = batch["pixels"], batch["action"], batch["next", "reward"]
        o_next, not_done = batch["next", "pixels"], (~batch["next", "terminated"]).to(r.dtype)
        a_prev = batch["previous_action"] if self.needs_previous_action else None  # that of o' is a
        lap = self.times.laps()
        views = self.views(o, o_next, self.augmentation, self.generator)
        alpha = self.log_alpha.detach().exp()

        # Critics (Eqs. 2 and 3): L_Q = Σ_views w Σ_i (Q_i(s, a) − y)², y = r + γ (min Q̄(s', ã) − α log π(ã | s')).
        per_row = batch.get("priority_weight", None)
        with torch.no_grad():
            y = torch.stack([self._target(view, a, r, not_done, alpha) for view in views.target]).mean(0)
        loss_q, errors = r.new_zeros(()), []
        for view, weight in zip(views.critic, views.critic_weights, strict=True):
            q1, q2 = self.critic(self.critic_projection(self.trunk(view)), a)
            loss_q = loss_q + weight * (squared_error(q1, y, per_row) + squared_error(q2, y, per_row))
            errors += [q1.detach() - y, q2.detach() - y]
        self._descend(critic_opt, loss_q, "critics' loss")
        metrics = {"train/critic_loss": loss_q.detach(), "train/q": q1.detach().mean()}
        lap("critic")

        # Actor and temperature (Eqs. 1 and 4). The encoder's output is detached: neither moves it.
        if due.actor:
            with torch.no_grad():
                h = self.trunk(views.actor)
                z_q = self.critic_projection(h)
            a_r, log_pi, mean = self.actor.sample(self.actor_projection(h), self.generator, a_prev)
            with frozen(self.critic):
                q = torch.minimum(*self.critic(z_q, a_r))
                loss_pi = (alpha * log_pi - q).mean()
                guided = a_r if self.prior.action == "sample" else mean
                preferred = self._preferred(z_q, batch["a_v"], q) if self.prior.q_filter else None
                loss_prior = self.prior.loss(guided, batch["a_v"], batch["a_v_valid"], lam, preferred)
                self._descend(actor_opt, loss_pi + loss_prior, "actor's loss")

            loss_alpha = (self.log_alpha.exp() * (-log_pi - self.target_entropy).detach()).mean()
            self._descend(alpha_opt, loss_alpha, "temperature's loss")
            metrics |= {
                "train/actor_loss": loss_pi.detach(),
                "train/prior_loss": loss_prior.detach(),
                "train/entropy": -log_pi.detach().mean(),
                "train/alpha": alpha,
                "train/labelled": batch["a_v_valid"].float().mean(),
            }
            if preferred is not None:
                of_labelled = (preferred & batch["a_v_valid"]).sum() / batch["a_v_valid"].sum().clamp(min=1)
                metrics["train/preferred"] = of_labelled
            lap("actor")

        for objective, optimizer in zip(self.objective_list, objective_opts, strict=True):
            loss, objective_metrics = checked_loss(objective, objective.loss(batch, views, self))
            self._descend(optimizer, loss, f"loss of {type(objective).__name__}")
            metrics |= objective_metrics
            lap("objectives")

        if due.targets:
            soft_update(self.target_critic, self.critic, self.critic_tau)
            soft_update(self.target_trunk, self.trunk, self.encoder_tau)
            soft_update(self.target_projection, self.critic_projection, self.encoder_tau)
            for objective in self.objective_list:
                objective.update_targets(self)
        lap("targets")
        return torch.stack(errors).abs().mean(0).squeeze(-1), metrics

    @torch.no_grad()
    def _preferred(self, z: Tensor, a_v: Tensor, q: Tensor) -> Tensor:
        """Where the critics think more of the VLM's action than of the policy's, which they give q (B, 1); (B, 1)."""
        return torch.minimum(*self.critic(z, a_v)) > q

    def _descend(self, optimizer: Any, loss: Tensor, name: str) -> None:
        """One optimizer step down a loss, if loss and gradients are finite."""
        optimizer.zero_grad()
        with without_autocast(self.device):  # in which Lightning calls a training step
            self.manual_backward(loss)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        loss = processes.average_gradients(parameters, loss.detach())
        self.finite.step(optimizer, name, self.counters, loss, parameters)

    def _target(self, view: Tensor, a: Tensor, r: Tensor, not_done: Tensor, alpha: Tensor) -> Tensor:
        """The target y for one view of o': the action from the online actor, the value from the target networks."""
        a_next, log_pi, _ = self.actor.sample(self.actor_projection(self.trunk(view)), self.generator, a)
        z = self.target_projection(self.target_trunk(view))
        v = torch.minimum(*self.target_critic(z, a_next)) - alpha * log_pi
        return r + self.gamma * not_done * v

    # -- optimizers, compilation ---------------------------------------------------------------------------------

    def configure_optimizers(self) -> list[Optimizer]:
        """Adam for critics with encoder, for the actor, for α, and one for each objective."""
        encoder = [*self.trunk.parameters()]
        critic = [*encoder, *self.critic_projection.parameters(), *self.critic.parameters()]
        actor = [*self.actor_projection.parameters(), *self.actor.parameters()]
        optimizers: list[Optimizer] = [
            Adam(critic, lr=self.lrs["critic"], fused=True),
            Adam(actor, lr=self.lrs["actor"], fused=True),
            Adam([self.log_alpha], lr=self.lrs["alpha"], betas=self.alpha_betas, fused=True),
        ]
        for objective in self.objective_list:
            own = [p for p in objective.parameters() if p.requires_grad]
            groups: list[dict[str, Any]] = [{"params": own, "lr": objective.lr, "weight_decay": objective.weight_decay}]
            if objective.encoder_lr_multiplier:
                rate = objective.lr * objective.encoder_lr_multiplier
                groups.append({"params": [*encoder, *self.critic_projection.parameters()], "lr": rate})
            optimizers.append(Adam(groups, fused=True))
        return optimizers

    @property
    def objective_list(self) -> list[Objective]:
        """The objectives, by their type."""
        return [objective for objective in self.objectives if isinstance(objective, Objective)]

    def compile_networks(self) -> None:
        """Compile the augmentation and all networks but the objectives' in place, if `torch_compile` is a backend."""
        if self.torch_compile is None:
            return
        self.augmentation.compile(self.torch_compile)
        networks = [self.trunk, self.critic_projection, self.critic, self.actor_projection, self.actor]
        networks += [self.target_trunk, self.target_projection, self.target_critic]
        for network in networks:
            network.compile(backend=self.torch_compile, dynamic=False)

    def all_optimizers(self) -> list[Any]:
        """The optimizers; all but the first unwrapped, so that Lightning's global_step counts critic updates."""
        first, *rest = self.optimizers()  # type: ignore[misc, attr-defined]
        return [first, *(getattr(optimizer, "optimizer", optimizer) for optimizer in rest)]

    def setup(self, stage: str) -> None:
        """Share the run's clock; compile the networks if asked to."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and hasattr(data, "counters"):
            self.counters = data.counters
        if self._trainer is not None:
            check_precision(self.trainer)
        if stage == "fit":
            check_graphs(self.cuda_graphs, self.trainer)
            self._graphs = None
            self.compile_networks()

    def on_fit_start(self) -> None:
        """Try the parts, which may be somebody's own, where they are to compute."""
        super().on_fit_start()
        try_parts(self)
