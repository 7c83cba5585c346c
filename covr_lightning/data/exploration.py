"""What the agent does while it collects experience."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import Literal, Protocol

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from covr_lightning.agent.acting import Acting
from covr_lightning.counters import Counters
from covr_lightning.data.labels import Labeller
from covr_lightning.random_state import new_generator
from covr_lightning.step_times import StepTimes
from covr_lightning.vlm.answers import Answers
from covr_lightning.vlm.pictures import side_by_side


class Actor(Protocol):
    """What chooses actions after the warm-up."""

    def act(
        self,
        pixels: Tensor,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
        previous_action: Tensor | None = None,
    ) -> Tensor:
        """Actions (B, A) of observations (B, C, H, W) uint8 and the actions (B, A) before."""


class ExplorationPolicy(TensorDictModuleBase):
    """Warm-up actions first, then samples of the actor, for N environments at once.

    Args:
        actor: Chooses actions after the warm-up.
        action_dim: A.
        counters: The run's clock.
        warmup_agent_steps: Length of the warm-up.
        warmup_actions: ``"random"``: uniform over [−1, 1]^A. ``"vlm"``: the VLM's proposal, asked for at every
            `hold_agent_steps`-th step and at an episode's first, and held in between; a uniform one where it cannot be
            parsed or does not come, which is counted. (The paper's second cold-start option.)
        labeller: The VLM, for ``"vlm"``.
        hold_agent_steps: Agent steps of an environment between two questions.
        envs: Environments of the whole run, over all its processes.
        seed: Seed of the noise.
        times: Where its seconds are added up, and those of the environments that it acts in.

    Attributes:
        answers: What the VLM said in the warm-up.
    """

    def __init__(
        self,
        actor: Actor,
        action_dim: int,
        counters: Counters,
        warmup_agent_steps: int,
        warmup_actions: Literal["random", "vlm"] = "random",
        labeller: Labeller | None = None,
        hold_agent_steps: int = 10,
        envs: int = 1,
        seed: int = 0,
        times: StepTimes | None = None,
    ) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["pixels"], ["action", "warmup"]
        # Not a submodule: the actor belongs to the LightningModule.
        self._actor = (actor,)
        self.action_dim = action_dim
        self.counters = counters
        self.warmup_agent_steps = warmup_agent_steps
        self.warmup_actions = warmup_actions
        self.labeller = labeller
        self.hold_agent_steps = hold_agent_steps
        self.envs = envs
        self.times = times or StepTimes()
        self.answers = Answers()
        self.noise = torch.Generator().manual_seed(seed)  # uniform actions, on the CPU
        self._seed = seed
        self._actor_noise_state: Tensor | None = None
        self._actor_noise: torch.Generator | None = None
        self._held: Tensor | None = None

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``action`` (N, A) for ``pixels`` (N, 3·k, H, W) and ``previous_action`` (N, A).

        And ``warmup`` (N,) bool, whether it is the warm-up's.
        """
        warmup = self.counters.agent_steps < self.warmup_agent_steps
        with self.times("act"):
            if warmup:
                action = self._warmup_action(tensordict["pixels"])
            else:
                actor = self._actor[0]
                device = getattr(actor, "device", torch.device("cpu"))
                noise, before = self._noise_on(device), tensordict.get("previous_action", None)
                action = actor.act(tensordict["pixels"], generator=noise, previous_action=before).cpu()
        return tensordict.set("action", action).set("warmup", torch.full(tensordict.batch_size, warmup))

    def _noise_on(self, device: torch.device) -> torch.Generator:
        if self._actor_noise is None or self._actor_noise.device != device:
            self._actor_noise = new_generator(device, self._seed, self._actor_noise_state)
            self._actor_noise_state = None
        return self._actor_noise

    def noise_state(self) -> dict[str, Tensor | None]:
        """Random states and seed of the noise, the VLM's action that is being held, and counts of its answers (3,)."""
        actor = self._actor_noise.get_state() if self._actor_noise is not None else self._actor_noise_state
        held = self._held.clone() if self._held is not None else None
        answers = torch.tensor(astuple(self.answers))
        seed = torch.tensor(self._seed)  # the actor's noise begins with it when the warm-up is over
        return {"uniform": self.noise.get_state(), "actor": actor, "seed": seed, "held": held, "answers": answers}

    def set_noise_state(self, state: dict[str, Tensor | None]) -> None:
        """Set what :meth:`noise_state` gave."""
        assert state["uniform"] is not None, "noise_state always has it"
        self.noise.set_state(state["uniform"])
        self._actor_noise, self._actor_noise_state = None, state["actor"]
        seed = state.get("seed")  # checkpoints of earlier versions have none
        self._seed = int(seed) if seed is not None else self._seed
        self._held = state["held"].clone() if state["held"] is not None else None
        answers = state.get("answers")  # not in a run that was saved before they were counted
        self.answers = Answers(*answers.tolist()) if answers is not None else Answers()

    def reseed(self, seed: int) -> None:
        """Draw other noise from here on; no action is held."""
        self.noise.manual_seed(seed)
        self._seed, self._actor_noise, self._actor_noise_state, self._held = seed, None, None, None

    @contextmanager
    def only_tried(self) -> Iterator[None]:
        """Whoever asks inside only wants to see what this gives, as a collector does when it starts and starts again.

        The noise does not know of it afterwards.
        """
        noise = self.noise_state()
        yield
        self.set_noise_state(noise)

    def for_workers(self) -> WorkerPolicy:
        """The same for workers in processes of their own."""
        return WorkerPolicy(self._acting.actor_alone(), self.action_dim, self.warmup_agent_steps, self.envs)

    def send_weights(self, workers: WorkerPolicy) -> None:
        """Give the policy that :meth:`for_workers` made the weights of now."""
        with torch.no_grad():
            now = self._acting.state_dict()
            for name, weights in workers.networks.state_dict().items():
                weights.copy_(now[name])

    @property
    def _acting(self) -> Acting:
        actor = self._actor[0]
        assert isinstance(actor, Acting), "workers are for an agent with networks"
        return actor

    def _warmup_action(self, pixels: Tensor) -> Tensor:
        uniform = torch.rand(len(pixels), self.action_dim, generator=self.noise) * 2 - 1
        if self.warmup_actions == "random" or self.labeller is None:
            return uniform
        if self._held is None or self.counters.agent_steps // self.envs % self.hold_agent_steps == 0:
            self._held = torch.full_like(uniform, torch.nan)
        asked = self._held.isnan().any(-1)
        if asked.any():
            proposal, valid, answered = self.labeller.ask(side_by_side(pixels[asked], self.labeller.frames))
            self.answers.count(valid, answered)
            self._held[asked] = torch.where(valid[:, None], proposal, uniform[asked])
        return self._held.clone()

    def end_episode(self, env: int) -> None:
        """An environment begins a new episode: the VLM's answer to the one before is held no longer.

        Args:
            env: Its number among those that this policy acts in.
        """
        if self._held is not None:
            self._held[env] = torch.nan


class WorkerPolicy(ExplorationPolicy):
    """An :class:`ExplorationPolicy` that is sent to workers, with networks of its own.

    It keeps its own clock: while its environments take a step, those of all other workers are thought to take one. The
    warm-up's actions are random.

    Args:
        networks: A copy of the networks that choose actions, on the CPU.
        action_dim: A.
        warmup_agent_steps: Length of the warm-up, of the whole run.
        envs: Environments of the whole run.
    """

    def __init__(self, networks: Acting, action_dim: int, warmup_agent_steps: int, envs: int) -> None:
        super().__init__(networks, action_dim, Counters(), warmup_agent_steps, envs=envs)
        self.networks = networks

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``action`` (N, A) and ``warmup`` (N,), and count."""
        super().forward(tensordict)
        self.counters.agent_steps += self.envs
        return tensordict

    def without_weights(self) -> WorkerPolicy:
        """A copy whose weights take no memory until they are sent: small enough to start a process with."""
        copied = copy.deepcopy(self)
        copied.networks._apply(lambda weights: weights.to("meta"))
        return copied

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Set the weights of the networks, by their names in these."""
        self.networks.load_state_dict(weights)

    def begin(self, agent_steps: int, seed: int, noise: dict[str, Tensor | None] | None) -> None:
        """Set what a worker begins with.

        Args:
            agent_steps: The run's agent steps so far.
            seed: Seed of the noise.
            noise: Random states (:meth:`noise_state`) to go on from instead.
        """
        self.counters.agent_steps = agent_steps
        self.noise.manual_seed(seed)
        self._seed, self._actor_noise, self._actor_noise_state = seed, None, None
        if noise is not None:
            self.set_noise_state(noise)
