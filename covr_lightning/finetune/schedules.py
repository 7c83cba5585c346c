"""When the VLM is fine-tuned: ψ, the environment steps from one round to the next."""

from __future__ import annotations

from abc import ABC, abstractmethod

from covr_lightning.counters import Counters
from covr_lightning.errors import ConfigError


class Schedule(ABC):
    """Rounds at fixed environment steps. ψ_c is the length of the wait for round c + 1."""

    @abstractmethod
    def psi(self, c: int) -> int | None:
        """Environment steps between round c and round c + 1 (from the start for c = 0), 1 or more; None: never."""

    def due(self, counters: Counters) -> bool:
        """Whether round ``counters.rounds + 1`` is due. Nothing is due at step 0.

        Asked once per item of collection: of two rounds that become due in one, the second comes with the next.
        """
        at = self.round_at(counters.rounds)
        return at is not None and counters.env_steps >= at

    def round_at(self, c: int) -> int | None:
        """Environment step of round c + 1: Σ_{i ≤ c} ψ_i.

        Raises:
            ConfigError: A ψ is below 1.
        """
        at = 0
        for i in range(c + 1):
            psi = self.psi(i)
            if psi is None:
                return None
            if psi < 1:
                raise ConfigError(
                    f"{type(self).__name__}.psi({i}) is {psi} (schedule of ProgressiveFineTune); it must be at least 1 "
                    "environment step, or None where no round follows."
                )
            at += psi
        return at

    def rounds(self, env_steps: int) -> list[int]:
        """Environment steps of all rounds within a training length.

        Args:
            env_steps: Training length in environment steps.

        Returns:
            Ascending steps, the last at most `env_steps`.
        """
        steps: list[int] = []
        while (at := self.round_at(len(steps))) is not None and at <= env_steps:
            steps.append(at)
        return steps


class LinearSchedule(Schedule):
    """ψ_c = ψ₀·(c + 1): rounds at 5k, 15k, 30k, 50k, 75k for ψ₀ = 5000.

    This is what the paper's text ("increases linearly") and its five rounds in 100k steps (Tables 14 and 15) say;
    the recursion that it prints gives three (:class:`PrintedSchedule`).

    Args:
        psi0_env_steps: ψ₀ in environment steps.
    """

    def __init__(self, psi0_env_steps: int = 5000) -> None:
        self.psi0_env_steps = _positive(psi0_env_steps)

    def psi(self, c: int) -> int:
        """ψ₀·(c + 1)."""
        return self.psi0_env_steps * (c + 1)


class PrintedSchedule(Schedule):
    """ψ_{c+1} = ψ_c·(1 + c), as printed, counting rounds from 1: rounds at 5k, 15k, 45k, 165k for ψ₀ = 5000.

    ψ = 5k, 10k, 30k, 120k: the recursion is applied once a round is over, when c has already been increased.

    Args:
        psi0_env_steps: ψ₀ in environment steps.
    """

    def __init__(self, psi0_env_steps: int = 5000) -> None:
        self.psi0_env_steps = _positive(psi0_env_steps)

    def psi(self, c: int) -> int:
        """ψ₀ · Π_{i=1}^{c} (1 + i)."""
        psi = self.psi0_env_steps
        for i in range(1, c + 1):
            psi *= 1 + i
        return psi


class NeverSchedule(Schedule):
    """No rounds: the VLM stays frozen (the DPL and APL baselines)."""

    def psi(self, c: int) -> None:
        """Never."""
        return None


class GivenSchedule(Schedule):
    """Rounds at the given environment steps, and none after the last.

    Args:
        at_env_steps: Ascending, e.g. ``[50000, 75000]``.

    Raises:
        ConfigError: There are none, or they do not ascend from above 0.
    """

    def __init__(self, at_env_steps: list[int]) -> None:
        waits = [after - before for before, after in zip([0, *at_env_steps], at_env_steps, strict=False)]
        if not waits or min(waits) < 1:
            raise ConfigError(
                f"schedule.at_env_steps is {at_env_steps}; it must be ascending environment steps above 0."
            )
        self.at_env_steps = at_env_steps
        self._waits = waits

    def psi(self, c: int) -> int | None:
        """The wait for the next of the steps."""
        return self._waits[c] if c < len(self._waits) else None


def _positive(psi0_env_steps: int) -> int:
    if psi0_env_steps < 1:
        raise ConfigError(f"schedule.psi0_env_steps is {psi0_env_steps}; it must be at least 1 environment step.")
    return psi0_env_steps
