r"""An exported policy in a VLM's place: what guidance does where whoever answers knows the task.

    covr export --config learning_cpu/rad.yaml --ckpt_path runs/NAME/checkpoints/best.ckpt --out policy
    covr fit --config learning_cpu/dpl.yaml --vlm.frames 3 --data.label_every_agent_steps 1 \
      --vlm.engine benchmarks.known_task.PolicyVLM --vlm.engine.policy policy/policy.pt2
    covr test --config learning_cpu/dpl.yaml --actor vlm …    # the same keys: what it returns alone

Run from the repository's root. All but the answers is as in any run: prior, labelling, the text of an action. Results
are in docs/results/guidance.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from covr_lightning.agent.networks import without_autocast
from covr_lightning.errors import ConfigError
from covr_lightning.export import open_policy
from covr_lightning.vlm.engines.engine import Engine


class PolicyVLM(Engine):
    """Answers with an exported policy's tanh μ, through the text of an action.

    Args:
        policy: What ``covr export`` wrote, ``policy.pt2`` or ``policy.onnx``, for stacks of as many frames as
            ``vlm.frames``.
    """

    def __init__(self, policy: str) -> None:
        self.policy = policy

    def open(self, vlm: Any) -> None:
        """Load the policy; take over the answer's format.

        Raises:
            ConfigError: There is no such policy, or it takes other frames.
        """
        self._codec, self._frames = vlm.codec, vlm.frames
        size = (3 * vlm.frames, vlm.spec.frame_height, vlm.spec.frame_width)
        if not Path(self.policy).is_file():
            raise ConfigError(f"vlm.engine.policy is {self.policy!r}; there is no such file.")
        self._act, taken = open_policy(Path(self.policy), torch.device("cpu"))
        if taken != size:
            raise ConfigError(
                f"vlm.engine.policy takes no frames of {size}, but of {taken}; vlm.frames and data.env must be as "
                "where it was trained."
            )

    def answers(self, frames: Tensor) -> list[str | None]:
        """Answers to pictures (B, 3, H, n·W) uint8 of n frames side by side."""
        stacked = frames.unflatten(-1, (self._frames, -1)).movedim(-2, 1).flatten(1, 2)  # (B, 3·n, H, W)
        with without_autocast(stacked.device):  # it was exported in float32
            actions = torch.as_tensor(self._act(stacked.contiguous()))
        return [self._codec.encode(action) for action in actions]

    def use(self, adapter: Path | None) -> None:
        """A policy has no adapter."""
