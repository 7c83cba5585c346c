"""Several environments as one, which step at the same time where they live in processes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from covr_lightning.envs.base import EnvSpec, PixelEnv


class EnvBatch(EnvBase):
    """N environments of the same shapes as a TorchRL environment of batch size [N].

    Every environment gets its action before the first result is waited for, so that those in processes of their own
    (:class:`~covr_lightning.envs.process.EnvProcess`) step at the same time. A partial reset (TorchRL's ``_reset``)
    resets those it names and leaves the others alone.

    Observations are ``pixels`` (N, 3·k, H, W) uint8, ``env`` (N,) int64, the environment's number, so that a
    transition says whose it is, and ``previous_action`` (N, A), 0 at an episode's beginning. Actions are (N, A).

    Args:
        envs: The environments.
        first: Number of the first; the others follow.

    Attributes:
        continued: What :meth:`restore_episodes` gave last.

    Raises:
        ValueError: There are none, or their shapes differ.
    """

    def __init__(self, envs: Sequence[PixelEnv], first: int = 0) -> None:
        self.envs = list(envs)
        if len({env.env_spec for env in self.envs}) != 1:
            raise ValueError("A batch has one environment or more, all of the same EnvSpec.")
        n, spec = len(self.envs), self.envs[0].env_spec
        super().__init__(device=torch.device("cpu"), batch_size=torch.Size([n]))
        self.env_spec: EnvSpec = spec
        self._numbers = torch.arange(first, first + n)
        self._newest: list[TensorDict] = []  # of each environment
        self.continued = [False] * n
        self.observation_spec = Composite(
            pixels=Bounded(
                0, 255, (n, spec.channels, spec.frame_height, spec.frame_width), dtype=torch.uint8, device="cpu"
            ),
            env=Unbounded((n,), dtype=torch.int64),
            previous_action=Bounded(-1.0, 1.0, (n, spec.action_dim), dtype=torch.float32),
            lost=Categorical(2, (n, 1), dtype=torch.bool),
            shape=(n,),
        )
        self.action_spec = Bounded(-1.0, 1.0, (n, spec.action_dim), dtype=torch.float32)
        self.reward_spec = Unbounded((n, 1), dtype=torch.float32)
        flag = Categorical(2, (n, 1), dtype=torch.bool)
        self.done_spec = Composite(done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=(n,))

    @property
    def lost_episodes(self) -> int:
        """Episodes of all environments that were cut because a simulator or a process died or hung."""
        return sum(env.lost_episodes for env in self.envs)

    def episode_metrics(self) -> list[dict[str, float]]:
        """What each environment measures of its running episode."""
        return [env.episode_metrics() for env in self.envs]

    def episode_states(self) -> list[dict[str, Any]]:
        """Each environment's running episode (:meth:`~covr_lightning.envs.base.PixelEnv.episode_state`)."""
        return [env.episode_state() for env in self.envs]

    def restore_episodes(self, states: Sequence[dict[str, Any]]) -> list[bool]:
        """Continue each environment's episode; the next reset gives their observations.

        Args:
            states: What :meth:`episode_states` gave.

        Returns:
            For each environment, whether its episode is back.

        Raises:
            ValueError: There are more or fewer states than environments.
        """
        if len(states) != len(self.envs):
            raise ValueError(f"There are episodes of {len(states)} environments, but {len(self.envs)} environments.")
        self.continued = [env.restore_episode(state) for env, state in zip(self.envs, states, strict=True)]
        return self.continued

    def close(self, **kwargs: bool) -> None:
        """Close every environment, also if one of them fails to."""
        with ExitStack() as stack:
            for env in reversed(self.envs):
                stack.callback(env.close, **kwargs)
        super().close(**kwargs)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            for i, env in enumerate(self.envs):
                env.set_seed(seed + i)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        asked = tensordict.get("_reset", None) if tensordict is not None else None
        newest = self._newest or [TensorDict()] * len(self.envs)
        due = list(range(len(self.envs)))
        if asked is not None and self._newest:
            due = asked.flatten().nonzero().flatten().tolist()
        for i in due:
            self.envs[i].send_reset()
        self._newest = [env.reset() if i in due else newest[i] for i, env in enumerate(self.envs)]
        return self._stacked("pixels", "done", "terminated", "truncated", "lost")

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        for env, action in zip(self.envs, tensordict["action"], strict=True):
            env.send_action(action)
        self._newest = [env.receive() for env in self.envs]
        return self._stacked("pixels", "reward", "done", "terminated", "truncated", "lost")

    def _stacked(self, *keys: str) -> TensorDict:
        values = {key: torch.stack([newest[key] for newest in self._newest]) for key in keys}
        actions = torch.stack([env.previous_action for env in self.envs])
        values |= {"env": self._numbers.clone(), "previous_action": actions}
        return TensorDict(values, [len(self.envs)])
