"""What a worker has of its own: its environments, made where it is, and its last words if one of them goes wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Unbounded

from covr_lightning.data.collection import make_envs
from covr_lightning.envs.base import EnvFactory, PixelEnv
from covr_lightning.envs.batch import EnvBatch
from covr_lightning.envs.process import EnvProcesses
from covr_lightning.errors import ConfigError, EnvironmentLost
from covr_lightning.random_state import derived_seed
from covr_lightning.saving.files import write_atomically

#: Where a worker's environments have lost episodes in; a transition brings it, as a running worker cannot be asked.
LOST = "lost_episodes"


@dataclass
class Workplace:
    """Makes a worker's environments, there.

    Attributes:
        factories: Make one each.
        numbers: Their numbers.
        seed: The run's seed.
        env_processes: Of processes of their own; None for the worker's.
        episodes: Running episodes to continue, with the worker's noise.
        last_words: File for the sentence of an error that the worker ends with; None where errors come back as they
            are.
    """

    factories: list[EnvFactory]
    numbers: range
    seed: int
    env_processes: EnvProcesses | None
    episodes: list[dict[str, Any]] | None = None
    last_words: Path | None = None

    def __call__(self) -> EnvBatch:
        """Make them."""
        made = make_envs(self.factories, self.numbers, self.seed, self.env_processes)
        envs = _WorkerEnvs(made, self.numbers.start, self.last_words)
        if self.episodes is not None:
            envs.restore_episodes(self.episodes)
        return envs

    def noise_seed(self) -> int:
        """Of this worker's noise alone."""
        return derived_seed(self.seed, self.numbers.start)

    def noise(self) -> dict[str, Any] | None:
        """The noise to go on with."""
        return self.episodes[0].get("noise") if self.episodes is not None else None


class _WorkerEnvs(EnvBatch):
    """A batch whose transitions say how many episodes each environment has lost, and whose errors are written down."""

    def __init__(self, envs: list[PixelEnv], first: int, last_words: Path | None = None) -> None:
        super().__init__(envs, first)
        self._last_words = last_words
        self.observation_spec[LOST] = Unbounded((len(envs),), dtype=torch.int64)

    def _reset(self, *args: Any, **kwargs: Any) -> TensorDict:
        with self._errors_written():
            return super()._reset(*args, **kwargs)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        with self._errors_written():
            return super()._step(tensordict)

    @contextmanager
    def _errors_written(self) -> Iterator[None]:
        try:
            yield
        except (ConfigError, EnvironmentLost) as error:
            if self._last_words is not None:
                words = json.dumps([isinstance(error, ConfigError), str(error)])
                with suppress(OSError):
                    write_atomically(self._last_words, [words.encode()])
            raise

    def _stacked(self, *keys: str) -> TensorDict:
        return super()._stacked(*keys).set(LOST, torch.tensor([env.lost_episodes for env in self.envs]))


def last_words(path: Path) -> ConfigError | EnvironmentLost | None:
    """The error that a worker has written down before it ended; None if it has not."""
    try:
        is_config, sentence = json.loads(path.read_bytes())
    except OSError:
        return None
    return ConfigError(sentence) if is_config else EnvironmentLost(sentence)
