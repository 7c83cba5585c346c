"""A replay sampler that prefers rows with a high return: the ablations that do without a VLM."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from covr_lightning.data.frame_storage import FrameStackStorage
from covr_lightning.data.samplers import RunSampler
from covr_lightning.errors import ConfigError
from covr_lightning.finetune.episodes import discounted_returns


class ReturnSampler(RunSampler):
    """`share` of each batch from the rows of highest return g, the rest uniformly from all rows (ablations M10, M11).

    g_t = Σ γ^{k−t} r_k to the episode's end, a time limit included, as in D_f. Rows of the episode that is still
    running have none yet and are drawn uniformly only; before the first episode has ended, the whole batch is. Both
    draws are with replacement.

    Paper: 80 % (M10) and 50 % (M11; its text says 20 %) of the batch. It does not say how many rows count as those of
    highest return; here it is the fraction `top`.

    Everything but the random numbers follows from the rows in the storage, so a resumed run needs no state of this.

    Args:
        share: Share of the batch drawn from the rows of highest return, in [0, 1].
        top: Fraction of the rows with a return that count as those of highest return, in (0, 1]; ties all count.
        gamma: Discount γ per agent step; the agent's by default.

    Raises:
        ConfigError: A value is out of range.
    """

    def __init__(self, share: float = 0.8, top: float = 0.1, gamma: float | None = None) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(f"data.sampler.share is {share}; it must lie in 0 to 1.")
        if not 0 < top <= 1:
            raise ConfigError(f"data.sampler.top is {top}; it must lie above 0 and at most at 1.")
        if gamma is not None and not 0 <= gamma <= 1:
            raise ConfigError(f"data.sampler.gamma is {gamma}; it must lie in 0 to 1.")
        self.share = share
        self.top = top
        self.gamma = gamma
        self._empty()

    def _empty(self) -> None:
        self._g = torch.empty(0)  # by position; NaN where there is none
        self._best = torch.empty(0, dtype=torch.long)
        self._seen = 0  # rows seen so far, by running number
        self._open: dict[int, list[int]] = {}  # running numbers of each environment's rows since its last episode

    def sample(self, storage: FrameStackStorage, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
        """Draw rows.

        Args:
            storage: The replay's storage.
            batch_size: B.

        Returns:
            Positions (B,), those of highest return first, and nothing more.
        """
        if len(storage) == 0:
            raise RuntimeError("Nothing can be drawn from an empty replay.")
        best = self.best(storage)
        n_best = round(self.share * batch_size) if len(best) else 0
        drawn = best[torch.randint(max(len(best), 1), (n_best,), generator=self._rng)]
        uniform = torch.randint(len(storage), (batch_size - n_best,), generator=self._rng)
        return torch.cat([drawn, uniform]), {}

    def best(self, storage: FrameStackStorage) -> Tensor:
        """Positions (N,), ascending, of the rows of highest return: at least ⌈top · rows with a return⌉ of them.

        Args:
            storage: The replay's storage.
        """
        if self._follow(storage):
            known = self._g[~self._g.isnan()]
            if len(known):
                lowest = known.kthvalue(len(known) - math.ceil(self.top * len(known)) + 1).values
                self._best = (self._g >= lowest).nonzero().squeeze(-1)
            else:
                self._best = torch.empty(0, dtype=torch.long)
        return self._best

    def _follow(self, storage: FrameStackStorage) -> bool:
        """Give rows of episodes that have ended since the last call their return; True if any return came or went."""
        size, end = storage.max_size, storage.last_row_id + 1
        if len(self._g) != size or end < self._seen:
            self._empty()
            self._g = torch.full((size,), math.nan)
        oldest = max(0, end - size)
        new = torch.arange(max(self._seen, oldest), end) % size
        changed = not bool(self._g[new].isnan().all())  # rows that had one were overwritten
        self._g[new] = math.nan
        following: Any = storage.column("next")
        done = following["done"].cpu().reshape(-1)
        for row in range(max(self._seen, oldest), end):
            env = int(storage.column("env")[row % size])
            changed |= self._finish(env, following["reward"], done, oldest)  # it was cut after it was seen
            self._open.setdefault(env, []).append(row)
        for env in list(self._open):
            changed |= self._finish(env, following["reward"], done, oldest)
        self._seen = end
        return changed

    def _finish(self, env: int, reward: Tensor, done: Tensor, oldest: int) -> bool:
        """Give the rows of an environment's open episode their return, if it has ended by now."""
        rows = [row for row in self._open.get(env, ()) if row >= oldest]
        if not rows or not bool(done[rows[-1] % len(done)]):
            return False
        episode = torch.tensor(rows) % len(self._g)
        gamma = self.agent_gamma if self.gamma is None else self.gamma
        self._g[episode] = discounted_returns(reward[episode].cpu().reshape(-1), gamma)
        del self._open[env]
        return True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin anew from the storage."""
        self._empty()
