"""Emphasizing recent experience: the later in an episode, the newer the transitions that an update is on."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from covr_lightning import processes
from covr_lightning.data.frame_storage import FrameStackStorage
from covr_lightning.data.samplers import RunSampler
from covr_lightning.errors import ConfigError


class EmphasizingRecentSampler(RunSampler):
    """Emphasizing recent experience (ERE, Wang & Ross, 2019): uniform sampling from the newest c_k rows.

    c_k = max(N · η^{1000 k / K}, c_min), at most all rows there are; η goes linearly from `eta` to 1 over the run.
    There, K updates follow an episode of K steps, and update k = 0 … K − 1 is on the newest c_k rows. Here an update
    follows each agent step: k is the number of the newest row in its episode. K, as an episode's length is not known
    before its end, is that of the same environment's episode before it, or, if the replay has none, of the longest
    there can be. An episode that is longer than K stays at the smallest c_k. Rows of all environments count as one
    replay, in the order of time; of several environments, the one whose row is the newest gives k and K.

    Defaults are those of the authors' ``SOP_ere.py``, but for c_min: with their 5000 sampling would be uniform for a
    fifth or more of a run of 12,500 to 25,000 agent steps. Their N is the replay's capacity, 10⁶, which is also the
    length of a run that ``SOP_ere.py`` makes. Here it is the run's length, as a run may be much shorter than its
    replay's capacity; c_k is less than all rows in some 70 % of the updates (with a capacity of four or eight times
    the run's rows, in 20 or 8 %). With η = 1 sampling is uniform, with the same draws as TorchRL's RandomSampler.

    Args:
        eta: η at the beginning; the authors take 0.994, others 0.996.
        c_min: Rows that are always drawn from; several processes share them out.
        n: N: ``"run"``, as many rows as the run makes, at most the replay's capacity; ``"capacity"`` of the replay; or
            ``"rows"``, as many as there are.

    Raises:
        ConfigError: A value is out of range.
    """

    def __init__(self, eta: float = 0.994, c_min: int = 1000, n: Literal["run", "capacity", "rows"] = "run") -> None:
        if not 0 < eta <= 1:
            raise ConfigError(f"data.sampler.eta is {eta}; it must lie above 0 and at most at 1.")
        if c_min < 1:
            raise ConfigError(f"data.sampler.c_min is {c_min}; it must be at least 1.")
        if n not in ("run", "capacity", "rows"):
            raise ConfigError(f"data.sampler.n is {n!r}; it can be 'run', 'capacity' or 'rows'.")
        self.eta = eta
        self.c_min = c_min
        self.n = n

    def newest(self, storage: FrameStackStorage) -> int:
        """c_k, for the rows there are now.

        Args:
            storage: The replay's storage, not empty.
        """
        position = storage.last_row_id % storage.max_size
        episode = self._episode_before(storage, position)
        k = min(int(storage.column("episode_row")[position]), episode - 1)
        n = {"run": min(storage.max_size, self.run_rows), "capacity": storage.max_size, "rows": len(storage)}[self.n]
        c = int(n * self.annealed(self.eta) ** (1000 * k / episode))
        return min(max(c, math.ceil(self.c_min / processes.count())), len(storage))

    def _episode_before(self, storage: FrameStackStorage, position: int) -> int:
        """K: rows of the episode before the one that the row at `position` is of, in its environment."""
        env = storage.column("env")
        ended = storage.column(("next", "done")).squeeze(-1) & (env == env[position])
        ended[position] = False
        rows = storage.column("row_id")[ended]
        if not len(rows):
            return self.episode_agent_steps
        return int(storage.column("episode_row")[rows.max() % storage.max_size]) + 1

    def sample(self, storage: FrameStackStorage, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
        """Draw rows.

        Args:
            storage: The replay's storage.
            batch_size: B.

        Returns:
            Positions (B,), and nothing more.
        """
        if len(storage) == 0:
            raise RuntimeError("Nothing can be drawn from an empty replay.")
        c = self.newest(storage)
        drawn = torch.randint(c, (batch_size,), generator=self._rng)
        end = (storage.last_row_id + 1) % storage.max_size  # the newest c positions lie before it, around the ring
        if end >= c:
            return drawn + (end - c), {}
        return torch.where(drawn < end, drawn, drawn + (storage.max_size - c)), {}
