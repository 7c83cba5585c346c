"""Experience as a Lightning data module: collect an agent step, hand out a batch, over and over."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch.utils.data import DataLoader
from torchrl.data.replay_buffers.samplers import Sampler

from covr_lightning import processes
from covr_lightning.agent.sac import SACModule
from covr_lightning.data.checks import check_labels, check_lengths, check_processes, check_sampler, check_vlm
from covr_lightning.data.collection import Collection, OneCollector
from covr_lightning.data.experience import Experience, Listener
from covr_lightning.data.exploration import ExplorationPolicy
from covr_lightning.data.frame_storage import FrameStackStorage
from covr_lightning.data.labels import LabelQueue, StalePriors
from covr_lightning.data.loading import Stream, loader
from covr_lightning.data.replay import make_replay
from covr_lightning.data.replay_parts import ReplayParts
from covr_lightning.data.resuming import ResumingData
from covr_lightning.data.samplers import RunSampler
from covr_lightning.data.sequences import SequenceSampler
from covr_lightning.envs.base import EnvFactory, EnvSpec, PixelEnv
from covr_lightning.errors import ConfigError
from covr_lightning.random_state import seed_of, set_global_state
from covr_lightning.vlm.vlm import VLM

log = logging.getLogger(__name__)

#: What is added to a run's seed for the first episode of evaluations, and of tests.
EVAL_SEED_OFFSET, TEST_SEED_OFFSET = 10_000, 20_000


class ExperienceData(ResumingData):
    """The environments, the replay D, the VLM's labels, and the run's clock.

    Training: every environment takes an agent step, then come as many updates as are due. One item of the loader is one
    update's batch from the replay, or empty where none is due (the warm-up). Evaluation: one item is one episode's
    seed, played by the model on an environment of its own.

    In a run of several processes each has environments and a share of the replay of its own. Lengths, counters, batch
    size and capacity are those of the whole run: the same setting makes the same schedule and the same number of
    updates, each of as many transitions, on any number of processes.

    Args:
        env: The environment.
        vlm: The VLM that labels and is fine-tuned; filled in from the key `vlm` by the command line. It is loaded only
            by a run that uses it.
        max_env_steps: Training length in environment steps (action repeat included).
        batch_size: Transitions per update.
        replay_capacity: Transitions kept in D.
        warmup_agent_steps: Agent steps before the first update.
        warmup_actions: ``"random"`` or ``"vlm"`` (the VLM drives the warm-up; where its answer cannot be parsed or
            does not come, a random action is taken, and counted).
        sampler: TorchRL sampler; uniform by default. A :class:`~covr_lightning.data.samplers.RunSampler` is told how
            far the run is.
        label_every_agent_steps: The VLM is asked for every n-th agent step of an environment.
        label_batch_size: Frames per question to the VLM.
        stale_priors: What becomes of D's answers when a round has changed the VLM: ``"keep"`` them as they are (the
            paper's Algorithm 1 asks once per transition), ``"mask"`` them, so that only the newest VLM guides, or
            ``"relabel"`` their rows by the newest VLM, which costs one answer per labelled row and round.
        relabel_batch_size: Frames per question when relabelling.
        hold_answers: Whether the transitions between two questions take the last answer of their episode; by default
            they are masked.
        eval_every_env_steps: Environment steps between two evaluations.
        eval_episodes: Episodes per evaluation.
        num_envs: Environments of each process.
        collection: How they are run; by default by one collector in this process.
        updates_per_agent_step: Updates per agent step of any environment; the paper's is 1. Less makes many
            environments cheaper, and learns less from each step.
        replay_device: Where D's frames live: in the ``"cpu"``'s memory, or on the ``"agent"``'s device (3.2 GB for
            100,000 transitions of 100×100), so that they need not go there with every batch.
        seed: Seed of environments, exploration and sampling. The evaluation environment has seeds of its own.
    """

    def __init__(
        self,
        env: EnvFactory,
        vlm: VLM | None = None,
        max_env_steps: int = 100_000,
        batch_size: int = 512,
        replay_capacity: int = 100_000,
        warmup_agent_steps: int = 1000,
        warmup_actions: Literal["random", "vlm"] = "random",
        sampler: Sampler | None = None,
        label_every_agent_steps: int = 10,
        label_batch_size: int = 16,
        stale_priors: StalePriors = "keep",
        relabel_batch_size: int = 128,
        hold_answers: bool = False,
        eval_every_env_steps: int = 10_000,
        eval_episodes: int = 10,
        num_envs: int = 1,
        collection: Collection | None = None,
        updates_per_agent_step: float = 1.0,
        replay_device: Literal["cpu", "agent"] = "cpu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_lengths(locals(), env.spec)
        check_sampler(sampler)
        if replay_device not in ("cpu", "agent"):
            raise ConfigError(f"data.replay_device is {replay_device!r}; it can be 'cpu' or 'agent'.")
        self.env_factory = env
        self.vlm = vlm
        self.max_env_steps = max_env_steps
        self.batch_size = batch_size
        self.replay_capacity = replay_capacity
        self.warmup_agent_steps = warmup_agent_steps
        self.warmup_actions = warmup_actions
        self.sampler = sampler
        self.label_every_agent_steps = label_every_agent_steps
        self.label_batch_size = label_batch_size
        self.stale_priors: StalePriors = stale_priors
        self.relabel_batch_size = relabel_batch_size
        self.hold_answers = hold_answers
        self.eval_every_env_steps = eval_every_env_steps
        self.eval_episodes = eval_episodes
        self.num_envs = num_envs
        self.collection = collection or OneCollector()
        self.updates_per_agent_step = updates_per_agent_step
        self.replay_device = replay_device
        self.seed = seed

        #: Called with every transition, in order; the fine-tune callback fills D_f so.
        self.listeners: list[Listener] = []
        self._eval_env: PixelEnv | None = None
        #: Environment steps, of the whole run, that were taken before this item if it is the last one until more are
        #: taken; otherwise 0. Whatever is due at some step comes after that item.
        self.env_steps_completed = 0

    @property
    def spec(self) -> EnvSpec:
        """The environment's shapes."""
        return self.env_factory.spec

    @property
    def all_envs(self) -> int:
        """Environments of all processes."""
        return self.num_envs * processes.count()

    @property
    def storage(self) -> FrameStackStorage:
        """The replay's storage."""
        return self._experience.storage

    @property
    def labels(self) -> LabelQueue | None:
        """The VLM's questions about the replay's rows, if there is a VLM."""
        return self.experience.labels if self.experience is not None else None

    @property
    def last_training_return(self) -> float | None:
        """Return of the newest finished episode."""
        return self.experience.last_training_return if self.experience is not None else None

    def setup(self, stage: str) -> None:
        """Build the replay, the environments and the policy that explores them."""
        if stage != "fit" or self.experience is not None:
            return
        model, workers, own_seed = self._model, processes.count(), seed_of(self.seed, processes.number())
        at_once = self.collection.agent_steps_of_an_item(len(self.env_numbers))
        check_processes(self.batch_size, self.replay_capacity, self.all_envs, workers, at_once)
        if self.vlm is not None and self.trainer is not None:
            self.vlm.to(self.trainer.strategy.root_device)  # loaded there at once
        asks = model.prior.uses_vlm or self.warmup_actions == "vlm"
        callbacks = self._trainer.callbacks  # type: ignore[attr-defined]
        check_vlm(self.vlm, asks, model.prior, callbacks, self.max_env_steps)
        steps_of_an_env = -(-self.max_env_steps // (self.spec.action_repeat * self.all_envs))
        due = self.num_envs * -(-steps_of_an_env // self.label_every_agent_steps)
        check_labels(due, self.label_batch_size, model.prior, callbacks, self.max_env_steps)
        if asks and self.vlm is not None:
            self.vlm.load(self.spec)
        device = self._trainer.strategy.root_device if self.replay_device == "agent" else torch.device("cpu")
        replay = make_replay(
            self.replay_capacity // workers, self.batch_size // workers, self.spec, self.sampler, device, own_seed
        )
        if isinstance(replay.sampler, RunSampler):
            replay.sampler.agent_gamma = model.gamma
            replay.sampler.run_rows = steps_of_an_env * self.num_envs
            if replay.sampler.wants_td_errors:
                model.td_error_listener = replay.update_priority
        sequences = SequenceSampler.needed_by(model.objective_list, replay.storage, self.spec, own_seed)
        # Processes that start at different moments may each have found another folder free.
        folder = processes.from_first(self._trainer.default_root_dir)
        self._trainer._default_root_dir = folder  # type: ignore[attr-defined]
        labels = None
        if self.vlm is not None:
            labels = LabelQueue(
                replay.storage, self.vlm, self.label_every_agent_steps, self.label_batch_size, self.stale_priors,
                self.relabel_batch_size, self.hold_answers,
            )  # fmt: skip
        self.experience = Experience(
            replay, sequences, labels, ReplayParts(Path(folder) / "replay"), self.env_numbers, self.counters,
            model.prior, model.finite, self.listeners, model.training_returns, model.times,
        )  # fmt: skip
        self.policy = ExplorationPolicy(
            model, self.spec.action_dim, self.counters, self.warmup_agent_steps, self.warmup_actions, self.vlm,
            self.label_every_agent_steps, self.all_envs, own_seed, model.times,
        )  # fmt: skip
        self.listeners.append(self._tell_policy)
        if self._restored is not None:
            self._restore(self._restored)

    def _tell_policy(self, env: int, transition: TensorDictBase | None) -> None:
        """An episode that is over, or cut, holds no answer of the VLM's any longer."""
        if transition is None or bool(transition["next", "done"]):
            self.policy.end_episode(env - self.env_numbers.start)

    @property
    def _model(self) -> SACModule:
        model = self._trainer.lightning_module
        assert isinstance(model, SACModule), "this data feeds a SACModule"
        return model

    @property
    def eval_env(self) -> PixelEnv:
        """The environment that evaluation plays on; built when first used."""
        if self._eval_env is None:
            factory = self.env_factory.placed(None, self.all_envs, self.collection.together)
            self._eval_env = factory.make(self.seed + EVAL_SEED_OFFSET)
        return self._eval_env

    @property
    def lost_episodes(self) -> int:
        """Episodes, of training and evaluation, that were cut because a simulator died or hung."""
        in_evaluations = self._eval_env.lost_episodes if self._eval_env is not None else 0
        return self._lost_before + self.collection.lost_episodes + in_evaluations

    # -- loaders -------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        """Batches (B,) of transitions, or empty TensorDicts where no update is due."""
        self._open_environments(self.seed)
        return loader(Stream(self.stream, self.most_items))

    def val_dataloader(self) -> DataLoader:
        """One item per evaluation episode of this process: its seed; −1 where others have one more to play."""
        return self._episodes(self.seed + EVAL_SEED_OFFSET)

    def test_dataloader(self) -> DataLoader:
        """The same of a test, on episodes by which no checkpoint was chosen.

        The VLM alone plays those of the evaluations, as it does in rounds; nothing was chosen by them there.
        """
        vlm_plays = any(getattr(one, "vlm_plays", False) for one in self._trainer.callbacks)  # type: ignore[attr-defined]
        return self._episodes(self.seed + (EVAL_SEED_OFFSET if vlm_plays else TEST_SEED_OFFSET))

    def _episodes(self, first: int) -> DataLoader:
        number, count = self._trainer.global_rank, self._trainer.world_size
        seeds: Any = [*range(first, first + self.eval_episodes)[number::count]]
        seeds += [-1] * (-(-self.eval_episodes // count) - len(seeds))  # Lightning wants as many items everywhere
        return loader(seeds)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to the agent's device, without waiting until it is there."""
        if isinstance(batch, TensorDictBase):
            return batch.to(device, non_blocking=True)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    @property
    def _agent_steps_of_an_item(self) -> int:
        """Of all processes, between two moments at which a round or an evaluation can be due."""
        return self.collection.agent_steps_of_an_item(self.num_envs) * processes.count()

    def most_items(self) -> int:
        """Items that the training loader has left, at most."""
        agent_steps = self._agent_steps_of_an_item
        env_steps = max(0, self.max_env_steps - self.counters.env_steps)
        times = math.ceil(env_steps / (agent_steps * self.spec.action_repeat))
        return times * max(1, math.ceil(self.updates_per_agent_step * agent_steps)) + self.step_is_open

    def stream(self) -> Iterator[TensorDictBase]:
        """Collect, store, label, sample, until the run is over."""
        batches = self.collection.batches()
        if self._global_random_state is not None:  # Lightning drew from it while it made the loaders
            set_global_state(self._global_random_state)
            self._global_random_state = None
        if self.step_is_open:
            self.step_is_open = False
            # Those of now, where the checkpoint does not tell.
            of_now = self.spec.action_repeat * self._agent_steps_of_an_item
            self.env_steps_completed = self._open_env_steps or of_now
            yield TensorDict({}, [])
        while self.counters.env_steps < self.max_env_steps:
            with processes.failing_together():
                with self._model.times("environment"):
                    collected = next(batches)
                with self._model.times("store"):
                    agent_steps = self._store(collected)
            self.env_steps_completed = 0
            while self._updates_owed >= 2:
                self._updates_owed -= 1
                yield self._sample()
            self.env_steps_completed = agent_steps * self.spec.action_repeat
            if self._updates_owed >= 1:
                self._updates_owed -= 1
                yield self._sample()
            else:
                yield TensorDict({}, [])

    def _sample(self) -> TensorDictBase:
        with self._model.times("sample"):
            return self._experience.sample(min(1.0, self.counters.env_steps / self.max_env_steps))

    def _store(self, collected: TensorDictBase) -> int:
        """Write collected transitions (M,) into D, advance the clock, and tell who listens.

        Returns:
            Agent steps of all processes.
        """
        counters, agent_steps = self.counters, len(collected) * processes.count()
        rows, usable = self._experience.prepare(collected)
        before = counters.agent_steps
        first = self.warmup_agent_steps - 1
        counters.agent_steps += agent_steps
        counters.env_steps += agent_steps * self.spec.action_repeat
        self._updates_owed += self.updates_per_agent_step * (max(counters.agent_steps, first) - max(before, first))
        self._experience.add(rows, usable)
        return agent_steps

    def teardown(self, stage: str) -> None:
        """Close the environments."""
        if stage == "fit":
            self.collection.close()
        if self._eval_env is not None:
            self._eval_env.close()
            self._eval_env = None
