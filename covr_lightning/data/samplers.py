"""Samplers that go by how far the run is: what the data module tells them."""

from __future__ import annotations

import math
from abc import ABC
from typing import Any

from torchrl.data.replay_buffers.samplers import Sampler


class RunSampler(Sampler, ABC):
    """A TorchRL sampler that the data module tells how far the run is, before each draw.

    Attributes:
        progress: Share of the run's environment steps that have been taken, in [0, 1].
        episode_agent_steps: Agent steps of the longest episode.
        run_rows: Rows that the whole run makes for this replay (a process's share, where several collect); without a
            run, without end.
        agent_gamma: The agent's discount γ.
        wants_td_errors: Whether `update_priority` is to be called with each update's |δ|.
    """

    wants_td_errors = False
    progress = 0.0
    episode_agent_steps = 1
    run_rows = math.inf
    agent_gamma = 0.99

    def annealed(self, start: float, end: float = 1.0) -> float:
        """What goes linearly from `start` to `end` over the run, now."""
        return start + (end - start) * self.progress

    def _empty(self) -> None:
        """Nothing to forget."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: all of it follows from the storage and the run's clock."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to take."""

    def dumps(self, path: Any) -> None:
        """Not offered: a run's checkpoint holds :meth:`state_dict`."""
        raise RuntimeError("A sampler is saved with its state_dict, not to a folder.")

    loads = dumps
