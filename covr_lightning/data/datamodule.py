"""Experience as a Lightning data module: collect an agent step, hand out a batch, over and over."""

from __future__ import annotations

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
from covr_lightning.data.labels import LabelQueue
from covr_lightning.envs.base import EnvFactory, EnvSpec, PixelEnv
from covr_lightning.errors import ConfigError
from covr_lightning.vlm.vlm import VLM

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
        eval_every_env_steps: int = 10_000,
        eval_episodes: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name in ("max_env_steps", "batch_size", "replay_capacity", "label_every_agent_steps", "label_batch_size"):
            _at_least_one(name, locals()[name])
        for name in ("warmup_agent_steps", "eval_every_env_steps", "eval_episodes"):
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
        self.eval_every_env_steps = eval_every_env_steps
        self.eval_episodes = eval_episodes
        self.seed = seed

        self.counters = Counters()
        #: Called with every transition, in order; the fine-tune callback fills D_f so.
        self.listeners: list[Callable[[TensorDictBase], None]] = []
        self.replay: TensorDictReplayBuffer | None = None
        self.labels: LabelQueue | None = None
        self.episode_return = 0.0
        self.last_training_return: float | None = None
        self._env: PixelEnv | None = None
        self._eval_env: PixelEnv | None = None
        self._collector: Collector | None = None
        self._restored: dict[str, Any] | None = None

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
        if self.vlm is not None:
            self.labels = LabelQueue(self.storage, self.vlm, self.label_every_agent_steps, self.label_batch_size)
        self.policy = ExplorationPolicy(
            model, self.spec.action_dim, self.counters, self.warmup_agent_steps, self.warmup_actions, self.vlm,
            self.label_every_agent_steps, self.seed,
        )  # fmt: skip
        self._env = self.env_factory.make(self.seed)
        self._collector = Collector(
            self._env,
            self.policy,
            frames_per_batch=1,
            total_frames=-1,
            trust_policy=True,
            track_traj_ids=False,
            auto_register_policy_transforms=False,
        )
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
        return DataLoader(_Stream(self), batch_size=None, num_workers=0, collate_fn=_as_is)

    def val_dataloader(self) -> DataLoader:
        """One item per evaluation episode: its seed."""
        first = self.seed + EVAL_SEED_OFFSET
        return DataLoader(range(first, first + self.eval_episodes), batch_size=None, num_workers=0)  # type: ignore[arg-type]

    test_dataloader = val_dataloader

    def stream(self) -> Iterator[TensorDictBase]:
        """Collect, store, label, sample, until the run is over."""
        assert self._collector is not None, "setup('fit') comes first"
        assert self.replay is not None, "setup('fit') comes first"
        prior = self._model.prior
        for collected in self._collector:
            transition = self._store(collected)
            if self.labels is not None and prior.uses_vlm and prior.wants_labels(self.counters):
                self.labels.offer(self.storage.last_row_id, self.counters.agent_steps - 1)
            for listener in self.listeners:
                listener(transition)
            warming_up = self.counters.agent_steps < self.warmup_agent_steps
            yield TensorDict({}, []) if warming_up else self.replay.sample()
            if self.counters.env_steps >= self.max_env_steps:
                return

    def _store(self, collected: TensorDictBase) -> TensorDictBase:
        """Write one collected agent step into D and advance the clock."""
        rows = collected.reshape(-1).select(*TRANSITION_KEYS)
        n, a = len(rows), self.spec.action_dim
        rows["a_v"] = torch.zeros(n, a)
        rows["a_v_valid"] = torch.zeros(n, 1, dtype=torch.bool)
        rows["vlm_round"] = torch.full((n, 1), -1)
        assert self.replay is not None, "setup('fit') comes first"
        self.replay.extend(rows)
        transition = rows[0]
        self.counters.agent_steps += 1
        self.counters.env_steps += self.spec.action_repeat
        self.episode_return += float(transition["next", "reward"])
        if bool(transition["next", "done"]):
            self.counters.episodes += 1
            self.last_training_return, self.episode_return = self.episode_return, 0.0
        return transition

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The clock and the replay's file, written beside the checkpoint.

        The environment itself is not saved yet: a resumed run starts a new episode, and the one that was open counts
        as truncated.
        """
        state: dict[str, Any] = {"counters": self.counters.state_dict()}
        if self.replay is None:
            return state
        folder = Path(self._trainer.default_root_dir) / "replay"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"env{self.counters.env_steps}.safetensors"
        if not path.exists():
            self.storage.save(path)
            # The checkpoint before the newest may still be the one that is resumed, if this one is not finished.
            for old in sorted(folder.glob("env*.safetensors"), key=lambda p: p.stat().st_mtime)[:-2]:
                old.unlink()
        state |= {
            "replay": str(path),
            "sampler_rng": self.replay._rng.get_state(),
            "exploration_rng": self.policy.noise.get_state(),
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
        path = Path(state["replay"])
        if not path.is_file():
            raise ConfigError(f"The checkpoint's replay {path} is gone; without it the run cannot be resumed.")
        try:
            self.storage.restore(path)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.storage.cut_episode()
        assert self.replay is not None, "restored after setup"
        self.replay._writer._cursor = (self.storage.last_row_id + 1) % self.replay_capacity
        self.replay._rng.set_state(state["sampler_rng"])
        self.policy.noise.set_state(state["exploration_rng"])
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
        return max(0, self.data.agent_steps - self.data.counters.agent_steps)

    def __iter__(self) -> Iterator[TensorDictBase]:
        return self.data.stream()


def _as_is(item: TensorDictBase) -> TensorDictBase:
    return item


def _at_least_one(name: str, value: int | None) -> None:
    if value is None or value < 1:
        raise ConfigError(f"data.{name} is {value}; it must be at least 1.")
