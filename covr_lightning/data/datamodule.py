"""Experience as a Lightning data module: collect an agent step, hand out a batch, over and over."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from tensordict import TensorDict, TensorDictBase
from torch.utils.data import DataLoader, IterableDataset
from torchrl.collectors import Collector
from torchrl.data import RandomSampler, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import Sampler

from covr_lightning.agent.sac import SACModule
from covr_lightning.counters import Counters
from covr_lightning.data.exploration import ExplorationPolicy
from covr_lightning.data.frame_storage import FrameStackStorage
from covr_lightning.data.labels import LabelQueue, StalePriors
from covr_lightning.data.replay_parts import ReplayParts
from covr_lightning.envs.base import EnvFactory, EnvSpec, PixelEnv
from covr_lightning.errors import ConfigError
from covr_lightning.random_state import global_state, set_global_state
from covr_lightning.saving.checkpoints import newest_good_checkpoint
from covr_lightning.saving.manifest import ReplayPartError
from covr_lightning.vlm.vlm import VLM

log = logging.getLogger(__name__)

#: Keys of a transition that go into the replay; what else a collector adds is left out.
TRANSITION_KEYS = ("pixels", "action", ("next", "pixels"), ("next", "reward"), ("next", "done"))
TRANSITION_KEYS += (("next", "terminated"), ("next", "truncated"))  # type: ignore[assignment]

EVAL_SEED_OFFSET = 10_000


class ExperienceData(L.LightningDataModule):
    """The environments, the replay D, the VLM's labels, and the run's clock.

    Training: one item of the loader is one agent step, and with it one batch from the replay; during the warm-up the
    batch is empty. Evaluation: one item is one episode's seed, played by the model on a second environment.

    Args:
        env: The environment.
        vlm: The VLM that labels and is fine-tuned; filled in from the key `vlm` by the command line. It is loaded only
            by a run that uses it.
        max_env_steps: Training length in environment steps (action repeat included).
        batch_size: Transitions per update.
        replay_capacity: Transitions kept in D.
        warmup_agent_steps: Agent steps before the first update.
        warmup_actions: ``"random"`` or ``"vlm"`` (the VLM drives the warm-up).
        sampler: TorchRL sampler; uniform by default.
        label_every_agent_steps: The VLM is asked for every n-th agent step.
        label_batch_size: Frames per question to the VLM.
        stale_priors: What becomes of D's answers when a round has changed the VLM: ``"keep"`` them as they are (the
            paper's Algorithm 1 asks once per transition), ``"mask"`` them, so that only the newest VLM guides, or
            ``"relabel"`` their rows by the newest VLM, which costs one answer per labelled row and round.
        relabel_batch_size: Frames per question when relabelling.
        eval_every_env_steps: Environment steps between two evaluations.
        eval_episodes: Episodes per evaluation.
        seed: Seed of environment, exploration and sampling. The evaluation environment has seeds of its own.
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
        eval_every_env_steps: int = 10_000,
        eval_episodes: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name in ("max_env_steps", "batch_size", "replay_capacity", "label_every_agent_steps", "label_batch_size"):
            _at_least_one(name, locals()[name])
        for name in ("warmup_agent_steps", "eval_every_env_steps", "eval_episodes", "relabel_batch_size"):
            _at_least_one(name, locals()[name])
        if batch_size > warmup_agent_steps:
            raise ConfigError(
                f"data.batch_size is {batch_size}, but the first update comes after data.warmup_agent_steps = "
                f"{warmup_agent_steps} transitions; the batch can be 1 to {warmup_agent_steps}."
            )
        if batch_size > replay_capacity:
            raise ConfigError(
                f"data.batch_size is {batch_size}, but the replay holds data.replay_capacity = {replay_capacity}."
            )
        if warmup_agent_steps * env.spec.action_repeat >= max_env_steps:
            raise ConfigError(
                f"data.max_env_steps is {max_env_steps}, but the warm-up alone takes {warmup_agent_steps} agent steps "
                f"× {env.spec.action_repeat} environment steps (data.warmup_agent_steps); it must be above "
                f"{warmup_agent_steps * env.spec.action_repeat}."
            )
        if warmup_actions not in ("random", "vlm"):
            raise ConfigError(f"data.warmup_actions is {warmup_actions!r}; it can be 'random' or 'vlm'.")
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
        self.eval_every_env_steps = eval_every_env_steps
        self.eval_episodes = eval_episodes
        self.seed = seed

        self.counters = Counters()
        #: Called with every transition, in order, and with None where an episode is cut; the fine-tune callback fills
        #: D_f so.
        self.listeners: list[Callable[[TensorDictBase | None], None]] = []
        self.replay: TensorDictReplayBuffer | None = None
        self.labels: LabelQueue | None = None
        self.episode_return = 0.0
        self.last_training_return: float | None = None
        self._env: PixelEnv | None = None
        self._eval_env: PixelEnv | None = None
        self._collector: Collector | None = None
        #: Whether a round or an evaluation of the newest agent step is still to come (it was stopped in one). A resumed
        #: run then begins with an empty item, which brings them about.
        self.step_is_open = False
        #: Whether the training episode that a checkpoint was saved in could be continued.
        self.episode_continues = True
        self._restored: dict[str, Any] | None = None
        self._global_random_state: dict[str, Any] | None = None

    @property
    def spec(self) -> EnvSpec:
        """The environment's shapes."""
        return self.env_factory.spec

    @property
    def agent_steps(self) -> int:
        """Agent steps of the whole run."""
        return math.ceil(self.max_env_steps / self.spec.action_repeat)

    @property
    def storage(self) -> FrameStackStorage:
        """The replay's storage."""
        assert self.replay is not None, "setup('fit') makes the replay"
        return self.replay.storage

    def setup(self, stage: str) -> None:
        """Build the replay, the environment and the collector."""
        if stage != "fit" or self.replay is not None:
            return
        model = self._model
        if self.vlm is not None and self.trainer is not None:
            self.vlm.to(self.trainer.strategy.root_device)  # loaded there at once
        if model.prior.uses_vlm or self.warmup_actions == "vlm":
            if self.vlm is None:
                raise ConfigError("This run asks a VLM for actions, but none is given (YAML key vlm).")
            self.vlm.load(self.spec)
        self.replay = TensorDictReplayBuffer(
            storage=FrameStackStorage(self.replay_capacity, self.spec.frame_stack),
            sampler=self.sampler or RandomSampler(),
            batch_size=self.batch_size,
            generator=torch.Generator().manual_seed(self.seed),
        )
        self._parts = ReplayParts(Path(self._trainer.default_root_dir) / "replay")
        if self.vlm is not None:
            self.labels = LabelQueue(
                self.storage, self.vlm, self.label_every_agent_steps, self.label_batch_size, self.stale_priors,
                self.relabel_batch_size,
            )  # fmt: skip
        self.policy = ExplorationPolicy(
            model, self.spec.action_dim, self.counters, self.warmup_agent_steps, self.warmup_actions, self.vlm,
            self.label_every_agent_steps, self.seed,
        )  # fmt: skip
        self._env = self.env_factory.make(self.seed)
        if self._restored is not None:
            self._restore(self._restored)

    @property
    def _trainer(self) -> L.Trainer:
        assert self.trainer is not None, "a Trainer runs this"
        return self.trainer

    @property
    def _model(self) -> SACModule:
        model = self._trainer.lightning_module
        assert isinstance(model, SACModule), "this data feeds a SACModule"
        return model

    @property
    def eval_env(self) -> PixelEnv:
        """The environment that evaluation plays on; built when first used."""
        if self._eval_env is None:
            self._eval_env = self.env_factory.make(self.seed + EVAL_SEED_OFFSET)
        return self._eval_env

    @property
    def lost_episodes(self) -> int:
        """Episodes, of training and evaluation, that were cut because a simulator died or hung."""
        return sum(env.lost_episodes for env in (self._env, self._eval_env) if env is not None)

    # -- loaders -------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        """One item per agent step: a batch (B,) of transitions, or an empty TensorDict during the warm-up."""
        return DataLoader(_Stream(self), batch_size=None, num_workers=0, collate_fn=_as_is, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader:
        """One item per evaluation episode: its seed."""
        first = self.seed + EVAL_SEED_OFFSET
        seeds: Any = range(first, first + self.eval_episodes)
        # Without a generator, every evaluation would draw from the global random numbers.
        return DataLoader(seeds, batch_size=None, num_workers=0, generator=torch.Generator())

    test_dataloader = val_dataloader

    def stream(self) -> Iterator[TensorDictBase]:
        """Collect, store, label, sample, until the run is over."""
        assert self.replay is not None, "setup('fit') comes first"
        prior = self._model.prior
        self._collector = self._make_collector()
        if self._global_random_state is not None:  # Lightning drew from it while it made the loaders
            set_global_state(self._global_random_state)
            self._global_random_state = None
        if self.step_is_open:
            self.step_is_open = False
            yield TensorDict({}, [])
        if self.counters.env_steps >= self.max_env_steps:
            return
        for collected in self._collector:
            transition = self._store(collected)
            wants_label = prior.uses_vlm and prior.wants_labels(self.counters)
            if self.labels is not None and wants_label and transition is not None:
                self.labels.offer(self.storage.last_row_id, self.counters.agent_steps - 1)
            for listener in self.listeners:
                listener(transition)
            warming_up = self.counters.agent_steps < self.warmup_agent_steps
            yield TensorDict({}, []) if warming_up else self.replay.sample()
            if self.counters.env_steps >= self.max_env_steps:
                return

    def _make_collector(self) -> Collector:
        """Begin to collect: with a new episode, or with the one that a checkpoint brought."""
        noise = self.policy.noise_state()
        collector = Collector(
            self._env,
            self.policy,
            frames_per_batch=1,
            total_frames=-1,
            trust_policy=True,
            track_traj_ids=False,
            auto_register_policy_transforms=False,
        )
        self.policy.set_noise_state(noise)  # it asks the policy once, to see what it gives
        return collector

    def _store(self, collected: TensorDictBase) -> TensorDictBase | None:
        """Write one collected agent step into D and advance the clock; None if its reward is not finite."""
        rows = collected.reshape(-1).select(*TRANSITION_KEYS)
        n, a = len(rows), self.spec.action_dim
        rows["a_v"] = torch.zeros(n, a)
        rows["a_v_valid"] = torch.zeros(n, 1, dtype=torch.bool)
        rows["vlm_round"] = torch.full((n, 1), -1)
        assert self.replay is not None, "setup('fit') comes first"
        transition = rows[0]
        finite = self._model.finite.allows("reward", self.counters, transition["next", "reward"])
        self.counters.agent_steps += 1
        self.counters.env_steps += self.spec.action_repeat
        if not finite:
            self.storage.cut_episode()
            return None
        self.replay.extend(rows)
        self.episode_return += float(transition["next", "reward"])
        if bool(transition["next", "done"]):
            self.counters.episodes += 1
            self.last_training_return, self.episode_return = self.episode_return, 0.0
        return transition

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The clock, the running episode, random states, and the replay's manifest, whose new part is written first."""
        state: dict[str, Any] = {"counters": self.counters.state_dict()}
        if self.replay is None:
            return state
        state |= {
            "replay": self._parts.save(self.storage),
            "sampler_rng": self.replay._rng.get_state(),
            "exploration": self.policy.noise_state(),
            "episode": self._env.episode_state() if self._env is not None else None,
            "episode_return": self.episode_return,
            "last_training_return": self.last_training_return,
            "step_is_open": self.step_is_open,
            "global_random_state": global_state(),
            "labels": self.labels.state_dict() if self.labels is not None else None,
            "vlm_round": self.vlm.round if self.vlm is not None else 0,
        }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the clock at once, the replay when it exists."""
        self.counters.load_state_dict(state["counters"])
        if self.replay is not None:
            self._restore(state)
        else:
            self._restored = state

    def _restore(self, state: dict[str, Any]) -> None:
        self._restored = None
        if "replay" not in state:
            return
        try:
            self._parts.restore(self.storage, state["replay"])
        except ReplayPartError as error:
            other = newest_good_checkpoint(Path(self._trainer.ckpt_path or ""))
            raise ConfigError(f"{error}; {other}.") from error
        assert self.replay is not None, "restored after setup"
        assert self._env is not None, "restored after setup"
        written = self.storage.last_row_id + 1
        self.replay._writer.load_state_dict({"_cursor": written % self.replay_capacity, "_write_count": written})
        self.replay._rng.set_state(state["sampler_rng"])
        self.policy.set_noise_state(state["exploration"])
        self.step_is_open = state["step_is_open"]
        self.last_training_return = state["last_training_return"]
        self._global_random_state = state["global_random_state"]
        self.episode_continues = self._env.restore_episode(state["episode"])
        if self.episode_continues:
            self.episode_return = state["episode_return"]
        else:
            log.warning("%s cannot continue the episode it was stopped in: it is cut.", type(self._env).__name__)
            self.storage.cut_episode()
        if self.labels is not None and state["labels"] is not None:
            self.labels.load_state_dict(state["labels"])

    def teardown(self, stage: str) -> None:
        """Close the environments."""
        if stage == "fit" and self._collector is not None:
            self._collector.shutdown()
            self._collector = None
        if self._eval_env is not None:
            self._eval_env.close()
            self._eval_env = None


class _Stream(IterableDataset):
    """The endless stream with a length: without one, Lightning would fetch an item ahead of the update."""

    def __init__(self, data: ExperienceData) -> None:
        self.data = data

    def __len__(self) -> int:
        return max(0, self.data.agent_steps - self.data.counters.agent_steps) + self.data.step_is_open

    def __iter__(self) -> Iterator[TensorDictBase]:
        return self.data.stream()


def _as_is(item: TensorDictBase) -> TensorDictBase:
    return item


def _at_least_one(name: str, value: int | None) -> None:
    if value is None or value < 1:
        raise ConfigError(f"data.{name} is {value}; it must be at least 1.")
