"""The replay D: TorchRL's buffer over a storage that keeps each frame once."""

from __future__ import annotations

import torch
from torchrl.data import RandomSampler, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import Sampler

from covr_lightning.data.frame_storage import FrameStackStorage
from covr_lightning.data.samplers import RunSampler
from covr_lightning.envs.base import EnvSpec


def make_replay(
    capacity: int, batch_size: int, spec: EnvSpec, sampler: Sampler | None, device: torch.device, seed: int
) -> TensorDictReplayBuffer:
    """An empty replay, or a process's share of one.

    Args:
        capacity: Transitions that it holds.
        batch_size: Transitions of a draw.
        spec: The environment's shapes.
        sampler: How they are drawn; uniformly by default.
        device: Where it is.
        seed: Of the draws.
    """
    replay = TensorDictReplayBuffer(
        storage=FrameStackStorage(capacity, spec.frame_stack, device=device),
        sampler=sampler or RandomSampler(),
        batch_size=batch_size,
        generator=torch.Generator().manual_seed(seed),
    )
    if isinstance(replay.sampler, RunSampler):
        replay.sampler.episode_agent_steps = spec.episode_agent_steps
    return replay
