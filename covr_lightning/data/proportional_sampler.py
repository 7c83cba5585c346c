"""Prioritised experience replay: transitions that the critics are wrong about come more often."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrl.data.replay_buffers.storages import Storage

from covr_lightning.data.frame_storage import FrameStackStorage
from covr_lightning.data.samplers import RunSampler
from covr_lightning.data.sum_tree import SumTree
from covr_lightning.errors import ConfigError


class ProportionalSampler(RunSampler):
    """Proportional prioritised replay (PER, Schaul et al., 2016, Sec. 3.3 and 3.4).

    P(i) = p_i / Σ_j p_j, p_i = (|δ_i| + 1e-5)^α, and each row's squared error in the critics' loss is weighted by
    w_i = (N P(i))^−β, divided by the largest w of the batch. δ_i is the mean of both critics' |Q − y| when the row was
    drawn last, before that update; new rows get the largest p so far (1 at first), so that each is drawn soon. β goes
    linearly from `beta` to 1 over the run.

    COVR's paper gives no settings; these are the first paper's and of ``SOP_per.py`` (Wang & Ross, 2019), which divides
    by the largest w of the whole replay. The weights do not go into the actor's loss, as they do in some codes for SAC.
    Rows are drawn independently, with replacement; the paper draws one from each of B equal shares of Σ p. In several
    processes each has its own rows and priorities.

    Priorities are kept over a stop. A run that goes on in another number of processes or environments begins with equal
    ones.

    Args:
        alpha: α, how much priorities count; at 0 sampling is uniform and every weight 1.
        beta: β at the beginning.

    Raises:
        ConfigError: A value is out of range.
    """

    wants_td_errors = True
    #: What keeps a row with δ = 0 from never being drawn again.
    epsilon = 1e-5

    def __init__(self, alpha: float = 0.6, beta: float = 0.4) -> None:
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not 0 <= value <= 1:
                raise ConfigError(f"data.sampler.{name} is {value}; it must lie in 0 to 1.")
        self.alpha = alpha
        self.beta = beta
        self._empty()

    def _empty(self) -> None:
        self._tree: SumTree | None = None
        self._largest = 1.0  # of all p so far
        self._waiting: list[Tensor] = []  # positions of new rows that are not in the tree yet

    def extend(self, index: Tensor) -> None:
        """Give new rows the largest priority so far.

        Args:
            index: Their positions (M,).
        """
        self._waiting.append(torch.as_tensor(index).reshape(-1).cpu())

    def add(self, index: int) -> None:
        """Give a new row the largest priority so far."""
        self.extend(torch.tensor([index]))

    def sample(self, storage: FrameStackStorage, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
        """Draw rows.

        Args:
            storage: The replay's storage.
            batch_size: B.

        Returns:
            Positions (B,), and ``priority_weight`` (B,) float32, w.
        """
        if len(storage) == 0:
            raise RuntimeError("Nothing can be drawn from an empty replay.")
        tree = self._followed(storage)
        mass = torch.rand(batch_size, dtype=torch.float64, generator=self._rng).numpy() * tree.total
        index = tree.find(mass)
        p = tree.leaves[index]
        weight = (p / p.min()) ** -self.annealed(self.beta)  # N and Σ p cancel
        return torch.from_numpy(index), {"priority_weight": torch.from_numpy(weight.astype(np.float32))}

    def update_priority(self, index: Any, priority: Any, *, storage: Storage | None = None) -> None:
        """Change the priorities of rows that an update was on; what is not finite changes nothing.

        Args:
            index: Their positions (B,).
            priority: Their |δ| (B,).
            storage: The replay's storage.
        """
        assert isinstance(storage, FrameStackStorage), "the replay hands it in"
        tree = self._followed(storage)
        delta = torch.as_tensor(priority, dtype=torch.float64).cpu().numpy()
        finite = np.isfinite(delta)
        p = (delta[finite] + self.epsilon) ** self.alpha
        tree.set(torch.as_tensor(index).cpu().numpy()[finite], p)
        self._largest = float(p.max(initial=self._largest))

    def _followed(self, storage: FrameStackStorage) -> SumTree:
        """The tree, with all rows that have been written."""
        if self._tree is None:
            self._tree = SumTree(storage.max_size)
        if self._waiting:
            new = torch.cat(self._waiting).numpy()
            self._tree.set(new, np.full(len(new), self._largest))
            self._waiting = []
        return self._tree

    def state_dict(self) -> dict[str, Any]:
        """Every row's p, the largest so far, and rows that came since the last draw."""
        p = np.empty(0) if self._tree is None else self._tree.leaves.copy()
        waiting = torch.cat([torch.empty(0, dtype=torch.long), *self._waiting])
        return {"p": torch.from_numpy(p), "largest": self._largest, "waiting": waiting}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set what :meth:`state_dict` gave."""
        self._empty()
        p = state_dict["p"].numpy()
        if len(p):
            self._tree = SumTree(len(p))
            self._tree.set(np.arange(len(p)), p)
        self._largest = state_dict["largest"]
        if len(state_dict["waiting"]):
            self._waiting = [state_dict["waiting"]]
