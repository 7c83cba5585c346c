"""When the policy is evaluated during training, and a video of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import lightning as L

from covr_lightning.data.datamodule import ExperienceData
from covr_lightning.errors import ConfigError
from covr_lightning.evaluation import EpisodeResult

_NEVER = 2**62


class EvaluateEvery(L.Callback):
    """Evaluates the untrained policy, then whenever ``data.eval_every_env_steps`` have passed, and at the end.

    Lightning schedules validation in batches; this decides before each batch whether the one after it is due.
    """

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Make Lightning validate after this batch, or not."""
        data: ExperienceData = trainer.datamodule  # type: ignore[attr-defined]
        now, new = data.counters.env_steps, data.env_steps_completed
        crossed = now // data.eval_every_env_steps > (now - new) // data.eval_every_env_steps
        due = bool(new) and (crossed or now == new or now >= data.max_env_steps)
        trainer.val_check_batch = 1 if due else _NEVER


class EvaluationVideo(L.Callback):
    """Writes an mp4 of the first episode of each evaluation (``--video true``).

    Args:
        frames_per_second: Of the video; agent steps are its frames.
    """

    def __init__(self, frames_per_second: int = 25) -> None:
        if frames_per_second < 1:
            raise ConfigError(f"EvaluationVideo.frames_per_second is {frames_per_second}; it must be at least 1.")
        self.frames_per_second = frames_per_second

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Record the first episode of the first process only."""
        pl_module.record_frames = args[1] == 0 and trainer.is_global_zero  # type: ignore[assignment]

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any
    ) -> None:
        """Write the first episode."""
        pl_module.record_frames = False  # type: ignore[assignment]
        if isinstance(outputs, EpisodeResult) and outputs.frames:
            steps = trainer.datamodule.counters.env_steps  # type: ignore[attr-defined]
            folder = Path(trainer.default_root_dir) / "videos"
            assert trainer.state.fn is not None, "it is running"
            kind = "" if trainer.state.fn == "fit" else f"{trainer.state.fn.value}_"  # the run's own videos stay
            write_video(outputs, folder / f"{kind}env{steps}.mp4", self.frames_per_second)

    on_test_batch_start = on_validation_batch_start  # type: ignore[assignment]
    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]


def write_video(episode: EpisodeResult, path: Path, frames_per_second: int = 25) -> None:
    """Write an episode's frames as mp4, enlarged to at least 256 pixels (players blur smaller ones).

    Args:
        episode: Played with ``record=True``.
        path: File to write.
        frames_per_second: Agent steps shown per second.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = max(1, -(-256 // episode.frames[0].shape[-1]))
    with imageio.get_writer(path, fps=frames_per_second, macro_block_size=1) as writer:
        for frame in episode.frames:
            enlarged = frame.permute(1, 2, 0).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
            # H.264 wants even sides.
            even = enlarged[: enlarged.shape[0] // 2 * 2, : enlarged.shape[1] // 2 * 2]
            writer.append_data(even.numpy())  # type: ignore[attr-defined]
