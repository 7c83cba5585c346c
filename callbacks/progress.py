"""The progress bar: environment steps, speed, return, λ and round."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from covr_lightning.errors import ConfigError


class CovrProgressBar(TQDMProgressBar):
    """One bar for the run, in agent steps, with what a user of this method looks for.

    ``left`` estimates the time to the end by the newer half of the environment steps since the first update of this
    process, evaluations and rounds included: a pace that has changed, as where other jobs came or went, is forgotten as
    the run goes on. The warm-up is much faster than what follows; while it lasts there is no estimate.

    Args:
        refresh_rate: Agent steps between two redraws.
    """

    def __init__(self, refresh_rate: int = 25) -> None:
        if refresh_rate < 0:
            raise ConfigError(f"CovrProgressBar.refresh_rate is {refresh_rate}; it must be 0 (none) or more.")
        super().__init__(refresh_rate=refresh_rate)
        self._clock: tuple[float, int, int] | None = None
        self._rates: dict[str, str] = {}
        self._first: tuple[float, int, int] | None = None  # when and where this process was first seen
        self._updating_from = 0  # where it was first seen after an update
        self._passed: deque[tuple[float, int]] = deque()  # when and where it was seen in the newer half since then

    # Lightning's own counts the warm-up in and promises too much.
    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Environment steps, their rate, that of updates, time left, last episode and evaluation, λ and round."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        counters = data.counters
        now = (time.monotonic(), counters.env_steps, counters.grad_steps)
        shown: dict[str, Any] = {"env": str(counters.env_steps)}
        if self._clock is None:
            self._clock = now
        elif now[1] > self._clock[1]:  # redrawn at the end of an evaluation, it keeps the rates of before
            seconds = max(now[0] - self._clock[0], 1e-9)
            self._rates = {
                "env/s": f"{(now[1] - self._clock[1]) / seconds:.0f}",
                "upd/s": f"{(now[2] - self._clock[2]) / seconds:.1f}",
            }
            self._clock = now
        shown |= self._rates
        left = self._seconds_left(now, data.max_env_steps)
        if left is not None:
            shown["left"] = as_clock(left)
        if data.last_training_return is not None:
            shown["ep"] = f"{data.last_training_return:.0f}"
        if "eval/return" in trainer.callback_metrics:
            shown["eval"] = f"{float(trainer.callback_metrics['eval/return']):.0f}"
        shown["λ"] = f"{pl_module.prior.weight(counters):g}"  # type: ignore[union-attr, operator]
        shown["round"] = counters.rounds
        if data.lost_episodes:
            shown["lost"] = data.lost_episodes
        return shown

    def _seconds_left(self, now: tuple[float, int, int], max_env_steps: int) -> float | None:
        """Estimated seconds to the end of the run; None while nothing is known."""
        seconds, env_steps, grad_steps = now
        self._first = self._first or now
        if grad_steps <= self._first[2]:
            return None
        if not self._passed:
            self._updating_from = env_steps
        if not self._passed or env_steps > self._passed[-1][1]:  # not redrawn in an evaluation
            self._passed.append((seconds, env_steps))
        while len(self._passed) > 1 and 2 * self._passed[1][1] <= self._updating_from + env_steps:
            self._passed.popleft()
        since, done = self._passed[0][0], env_steps - self._passed[0][1]
        return (max_env_steps - env_steps) * (seconds - since) / done if done > 0 else None

    def init_train_tqdm(self) -> Any:
        """Name the bar after what it counts."""
        bar = super().init_train_tqdm()
        bar.set_description("agent steps")
        bar.unit = "step"
        return bar

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Keep the bar's name: there are no epochs here."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description("agent steps")

    def init_validation_tqdm(self) -> Any:
        """Call evaluation by its name."""
        bar = super().init_validation_tqdm()
        bar.set_description("evaluation")
        return bar


def as_clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
