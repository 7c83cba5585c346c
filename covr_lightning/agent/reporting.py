"""What an agent tells of itself while it trains: its updates' metrics and its evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean

from torch import Tensor

from covr_lightning import processes
from covr_lightning.agent.priors import Prior
from covr_lightning.agent.resuming import Resuming
from covr_lightning.counters import Counters
from covr_lightning.evaluation import DeterministicPolicy, EpisodeResult, EpisodeStatistics, play_episode


class Reporting(Resuming):
    """An agent whose loggers' x axis is environment steps. The update is that of its subclass SACModule."""

    prior: Prior

    def __init__(self) -> None:
        super().__init__()
        self.counters = Counters()
        self.eval_episodes = EpisodeStatistics()
        #: Returns of this process's training episodes that ended since an update was logged; the data append to it.
        self.training_returns: list[float] = []
        self.record_frames = False
        #: Makes the policy of one evaluation episode; None takes this agent.
        self.episode_policy: Callable[[], DeterministicPolicy] | None = None

    def validation_step(self, seed: int, batch_idx: int = 0) -> EpisodeResult | None:  # type: ignore[override]
        """Play one deterministic episode on the evaluation environment.

        Args:
            seed: The episode's seed; below 0 there is none to play.
            batch_idx: Not used.
        """
        if seed < 0:
            return None
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        policy = self.episode_policy() if self.episode_policy else self.act
        result = play_episode(policy, data.eval_env, int(seed), record=self.record_frames)
        self.eval_episodes.update(result)
        return result

    test_step = validation_step  # type: ignore[assignment]

    def on_validation_epoch_end(self) -> None:
        """Log mean and standard deviation over the evaluation's episodes."""
        self._log_evaluation("eval")

    def on_test_epoch_end(self) -> None:
        """Log mean and standard deviation over the test's episodes."""
        self._log_evaluation("test")

    def _log_evaluation(self, prefix: str) -> None:
        result = {f"{prefix}/{name}": value.float() for name, value in self.eval_episodes.compute().items()}
        self.eval_episodes.reset()
        fitting = self.trainer.state.fn == "fit"
        # Lightning prints a test's table of what goes to loggers, even if there are none.
        self.log_dict(result, logger=not fitting, rank_zero_only=True)
        if fitting:
            self.prior.evaluated(float(result[f"{prefix}/return"]))
            self._log_at_env_steps(result)

    def log_update(self, metrics: Mapping[str, Tensor]) -> None:
        """Log what an update has measured, every `trainer.log_every_n_steps` updates; means over the processes.

        ``train/return`` is the mean return of the training episodes that ended since the update logged before.
        """
        trainer = self._trainer
        every = trainer.log_every_n_steps if trainer is not None else 0  # type: ignore[attr-defined]
        if not every or self.counters.grad_steps % every:
            return
        own = {name: float(value) for name, value in metrics.items()}
        everyones = processes.gather((own, [*self.training_returns]))
        self.training_returns.clear()
        numbers = {name: fmean(one[name] for one, _ in everyones) for name in own}
        returns = [one for _, ended in everyones for one in ended]
        if returns:
            numbers["train/return"] = fmean(returns)
        self._log_at_env_steps({**numbers, "train/lambda": self.prior.weight(self.counters)})

    def _log_at_env_steps(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Hand metrics to the loggers now; Lightning's own rhythm starts anew with every resumed run."""
        numbers = {name: float(value) for name, value in metrics.items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(numbers, step=self.counters.env_steps)
