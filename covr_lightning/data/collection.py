"""Where the environments run, and what comes of them: transitions, in the order of time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from tensordict import TensorDictBase
from torchrl.collectors import Collector

from covr_lightning.data.exploration import ExplorationPolicy
from covr_lightning.envs.base import EnvFactory, PixelEnv
from covr_lightning.envs.batch import EnvBatch
from covr_lightning.envs.process import EnvProcess, EnvProcesses
from covr_lightning.errors import WrongResult
from covr_lightning.random_state import seed_of

#: Keys of a transition; what else a collector adds is left out.
TRANSITION_KEYS: tuple[str | tuple[str, str], ...] = ("env", "pixels", "previous_action", "action", "warmup")
TRANSITION_KEYS += tuple(("next", key) for key in ("pixels", "reward", "done", "terminated", "truncated", "lost"))


class Collection(ABC):
    """Runs the environments of one process with the agent's policy.

    Attributes:
        resumes_exactly: Whether a run that is stopped and resumed ends as one that was not.
        together: Whether the environments live in the trainer's process.
    """

    resumes_exactly = True
    together = False

    @abstractmethod
    def open(self, factory: EnvFactory, policy: ExplorationPolicy, numbers: range, seed: int) -> None:
        """Build the environments.

        Args:
            factory: Makes an environment.
            policy: Chooses actions.
            numbers: Numbers of the environments among all of the run; their seeds are
                :func:`~covr_lightning.random_state.seed_of` these.
            seed: The run's seed.
        """

    @abstractmethod
    def agent_steps_of_an_item(self, envs: int) -> int:
        """M, the agent steps in an item of :meth:`batches`, of this number of environments."""

    @abstractmethod
    def batches(self) -> Iterator[TensorDictBase]:
        """Begin to collect; each item is M agent steps, flat (M,), endlessly.

        Each environment's transitions are in order. An item may be overwritten by the next one.
        """

    @abstractmethod
    def state(self) -> list[dict[str, Any]]:
        """The running episode of each environment."""

    @abstractmethod
    def restore(self, state: list[dict[str, Any]]) -> list[bool]:
        """Continue episodes, before collecting begins; for each environment, whether that could be done."""

    @property
    @abstractmethod
    def lost_episodes(self) -> int:
        """Episodes that were cut because a simulator or its process died or hung."""

    @abstractmethod
    def close(self) -> None:
        """Close the environments."""


def make_envs(
    factories: Sequence[EnvFactory], numbers: range, seed: int, settings: EnvProcesses | None
) -> list[PixelEnv]:
    """Build environments, each with the seed that :func:`~covr_lightning.random_state.seed_of` its number gives.

    Args:
        factories: Make one each.
        numbers: Their numbers.
        seed: The run's seed.
        settings: Of processes of their own; None for this process.

    Raises:
        WrongResult: A factory of somebody's own made something else.
    """
    each = zip(factories, numbers, strict=True)
    if settings is None:
        envs = [factory.make(seed_of(seed, number)) for factory, number in each]
        for factory, env in zip(factories, envs, strict=True):
            if not isinstance(env, PixelEnv):
                raise WrongResult(
                    f"{type(factory).__name__}.make (data.env) gave a {type(env).__name__}; it must give a PixelEnv "
                    "(covr_lightning.envs)."
                )
        return envs
    return [EnvProcess(factory, seed_of(seed, number), number, settings) for factory, number in each]


class OneCollector(Collection):
    """One TorchRL collector in the trainer's process steps all environments together, an agent step of each at a time.

    Args:
        env_processes: Let every environment live in a process of its own, supervised; by default they live in the
            trainer's. In either case the policy acts for all of them at once.
    """

    def __init__(self, env_processes: EnvProcesses | None = None) -> None:
        self.env_processes = env_processes
        self.together = env_processes is None
        self._envs: EnvBatch | None = None
        self._collector: Collector | None = None

    def open(self, factory: EnvFactory, policy: ExplorationPolicy, numbers: range, seed: int) -> None:
        """Build the environments."""
        factories = [factory.placed(number, policy.envs, self.together) for number in numbers]
        envs = make_envs(factories, numbers, seed, self.env_processes)
        for env in envs:
            env.times = policy.times
        self._envs = EnvBatch(envs, first=numbers.start)
        self._policy = policy

    def agent_steps_of_an_item(self, envs: int) -> int:
        """One of each environment."""
        return envs

    def batches(self) -> Iterator[TensorDictBase]:
        """One agent step of every environment per item, (N,)."""
        assert self._envs is not None, "open comes first"
        with self._policy.only_tried():
            self._collector = Collector(
                self._envs,
                self._policy,
                frames_per_batch=len(self._envs.envs),
                total_frames=-1,
                trust_policy=True,
                track_traj_ids=False,
                auto_register_policy_transforms=False,
            )
        return (collected.reshape(-1).select(*TRANSITION_KEYS) for collected in self._collector)

    def state(self) -> list[dict[str, Any]]:
        """The running episode of each environment."""
        assert self._envs is not None, "open comes first"
        return self._envs.episode_states()

    def restore(self, state: list[dict[str, Any]]) -> list[bool]:
        """Play the episodes again."""
        assert self._envs is not None, "open comes first"
        return self._envs.restore_episodes(state)

    @property
    def lost_episodes(self) -> int:
        """Of all environments."""
        return self._envs.lost_episodes if self._envs is not None else 0

    def close(self) -> None:
        """Close the environments, once."""
        envs, self._envs = self._envs, None
        if self._collector is not None:
            self._collector.shutdown()
            self._collector = None
        elif envs is not None:
            envs.close()
