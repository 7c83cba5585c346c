"""D_f: what the agent has done since the last round, with the return that followed each action."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from covr_lightning import processes
from covr_lightning.errors import ConfigError
from covr_lightning.vlm.pictures import side_by_side


def discounted_returns(rewards: Tensor, gamma: float, bootstrap: float = 0.0) -> Tensor:
    """g_t = r_t + γ g_{t+1}, g_T = `bootstrap`; r_t is the reward after action t.

    Args:
        rewards: (T,).
        gamma: Discount per agent step.
        bootstrap: Value of the state after the last reward; 0 where the episode counts as over.

    Returns:
        (T,) float32, computed in float64.
    """
    g = torch.empty(len(rewards), dtype=torch.float64)
    running = float(bootstrap)
    for t in range(len(rewards) - 1, -1, -1):
        running = float(rewards[t]) + gamma * running
        g[t] = running
    return g.to(torch.float32)


def joined(parts: Sequence[TensorDictBase]) -> TensorDictBase:
    """Rows of several buffers as those of one; their episodes are numbered on.

    Args:
        parts: What :meth:`EpisodeBuffer.rows` gave, each with at least one row. If one has no ``episode``, because it
            was saved before there was one, the result has none.
    """
    if any("episode" not in part for part in parts):
        return torch.cat([part.exclude("episode") for part in parts])
    numbered, first = [], 0
    for part in parts:
        numbered.append(part.copy().set("episode", part["episode"] + first))
        first = int(numbered[-1]["episode"].max()) + 1
    return torch.cat(numbered)


def everyones(rows: TensorDictBase, scores: Tensor) -> tuple[TensorDictBase, Tensor]:
    """The rows of all processes, so that thresholds and weights are those of the whole D_f.

    Args:
        rows: This process's (N,), as :meth:`EpisodeBuffer.rows` gave them.
        scores: Theirs (N,).
    """
    everyone = [own for own in processes.gather((rows, scores)) if len(own[1])]
    if not everyone:
        return rows, scores
    return joined([own[0] for own in everyone]), torch.cat([own[1] for own in everyone])


class EpisodeBuffer:
    """The fine-tune buffer D_f of Algorithm 1, a TensorDict of rows (picture, action, reward, return).

    A row's return needs the future, so rows wait in the open episode of their environment until it ends; then their g
    is filled in and they can be chosen from. A round takes and clears finished rows only: open episodes stay across it.

    Args:
        gamma: Discount per agent step.
        value_after: V of the state that a transition (``action``, ``("next", "pixels")``) led to, which follows the
            rewards of a truncated episode. Without it such an episode counts as over.
        keep_stack: Keep the stacked observation of each row as well (needed by a score that asks the critics).
        frames: How many of an observation's newest frames the VLM is shown, side by side in one picture.
    """

    def __init__(
        self,
        gamma: float = 0.99,
        value_after: Callable[[TensorDictBase], float] | None = None,
        keep_stack: bool = False,
        frames: int = 1,
    ) -> None:
        self.gamma = gamma
        self.value_after = value_after
        self.keep_stack = keep_stack
        self.frames = frames
        self._open: dict[int, list[TensorDict]] = {}
        #: Of each open episode what its value is asked with, if that may be needed: nobody knows where it will be cut.
        self._newest: dict[int, TensorDictBase] = {}
        self._finished: list[TensorDict] = []

    def __len__(self) -> int:
        """Finished rows."""
        return sum(len(episode) for episode in self._finished)

    @property
    def open_rows(self) -> int:
        """Rows of episodes that are still running."""
        return sum(map(len, self._open.values()))

    def add(self, transition: TensorDictBase, env: int = 0) -> None:
        """Add one transition, and finish the episode if it ends it.

        Args:
            transition: One agent step with ``pixels`` (3·k, H, W), ``action``, and in ``next`` ``reward``,
                ``terminated``, ``truncated``, with `value_after` also ``pixels``.
            env: Number of the environment that it happened in.
        """
        row = TensorDict(
            {
                "frame": side_by_side(transition["pixels"], self.frames).clone(),
                "action": transition["action"].clone(),
                "reward": transition["next", "reward"].reshape(1).clone(),
            }
        )
        if self.keep_stack:
            row["pixels"] = transition["pixels"].clone()
        self._open.setdefault(env, []).append(row)
        if self.value_after is not None:
            self._newest[env] = transition.select("action", ("next", "pixels")).clone()
        if bool(transition["next", "terminated"]):
            self._newest.pop(env, None)
            self._finish(env, 0.0)
        elif bool(transition["next", "truncated"]):
            self.cut_episode(env)

    def cut_episode(self, env: int = 0) -> None:
        """End an environment's open episode where it is, as at a time limit or where a simulator is lost.

        With `value_after`, where a checkpoint of an earlier version has not said what the last row led to, the returns
        of its rows are not known, and they are dropped.

        Args:
            env: Number of the environment.
        """
        newest = self._newest.pop(env, None)
        if env not in self._open:
            return
        if self.value_after is None:
            self._finish(env, 0.0)
        elif newest is not None:
            self._finish(env, self.value_after(newest))
        else:
            del self._open[env]

    def _finish(self, env: int, bootstrap: float) -> None:
        episode = TensorDict.maybe_dense_stack(self._open.pop(env))
        episode["g"] = discounted_returns(episode["reward"].reshape(-1), self.gamma, bootstrap)[:, None]
        self._finished.append(episode)

    def rows(self) -> TensorDictBase:
        """All finished rows (N,), episode by episode.

        ``frame`` (3, H, n·W) uint8, ``action`` (A,), ``reward`` (1,), ``g`` (1,), and ``episode`` () int64, from 0.
        """
        if not self._finished:
            return TensorDict({}, [0])
        return torch.cat(
            [rows.copy().set("episode", torch.full((len(rows),), n)) for n, rows in enumerate(self._finished)]
        )

    def clear(self, open_too: bool = False) -> None:
        """Drop the finished rows; open episodes stay unless they are to go, too."""
        self._finished = []
        if open_too:
            self._open, self._newest = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Finished and open rows, and what the open ones led to, as plain tensors."""
        return {
            "frames": self.frames,
            "finished": [episode.to_dict() for episode in self._finished],
            "open": {env: TensorDict.maybe_dense_stack(rows).to_dict() for env, rows in self._open.items()},
            "newest": {env: transition.to_dict() for env, transition in self._newest.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the rows that :meth:`state_dict` gave.

        Raises:
            ConfigError: They have pictures of more or fewer frames, or lack the stacks that a score needs.
        """
        if (frames := state.get("frames", 1)) != self.frames:
            raise ConfigError(
                f"vlm.frames is {self.frames}, but the checkpoint's run showed its VLM {frames}; to go on, it must be "
                f"{frames}."
            )
        self._finished = [self._from_dict(episode) for episode in state["finished"]]
        self._open = {env: list(self._from_dict(rows).unbind(0)) for env, rows in state["open"].items()}
        newest = state.get("newest", {})  # checkpoints of earlier versions have none
        self._newest = {env: TensorDict(transition) for env, transition in newest.items()}

    def load_share(self, states: Sequence[dict[str, Any]], number: int, of: int) -> None:
        """Set this buffer's share of what several had, episode by episode; open episodes are ended where they are.

        Args:
            states: What their :meth:`state_dict` gave.
            number: This buffer's number among those that share.
            of: How many they are.

        Raises:
            ConfigError: As :meth:`load_state_dict`.
        """
        everything = []
        for state in states:
            self.load_state_dict(state)
            for env in list(self._open):
                self.cut_episode(env)
            everything += self._finished
        self._finished, self._open = everything[number::of], {}

    def _from_dict(self, columns: dict[str, Tensor]) -> TensorDict:
        if self.keep_stack and "pixels" not in columns:
            raise ConfigError(
                "The score of ProgressiveFineTune asks the critics, but the rows that the checkpoint's run gathered "
                "since its last round lack what they need; to go on, it must be that run's score until a round is over."
            )
        kept = {name: column for name, column in columns.items() if self.keep_stack or name != "pixels"}
        return TensorDict(kept, [len(kept["action"])])
