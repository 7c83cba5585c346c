"""Reward and end of an episode, as pure functions of what a tick did (Eqs. 7 and 8)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from covr_lightning.envs.driving.scenario import EpisodeRules, RewardWeights
from covr_lightning.envs.driving.simulator import Tick


def tick_reward(tick: Tick, steer: float, weights: RewardWeights, dt: float) -> float:
    """Reward of one tick: r = v·dt − w_c·collision − w_l·lane_invasion − w_s·|steer| (Eq. 7 for #HW, Eq. 8 for #GP).

    Args:
        tick: What happened.
        steer: The action's first value.
        weights: The scenario's weights.
        dt: Seconds of the tick.
    """
    return (
        tick.speed * dt
        - weights.collision * tick.collision
        - weights.lane_invasion * tick.lane_invasions
        - weights.steer * abs(steer)
    )


@dataclass(frozen=True)
class Progress:
    """How far an episode has come.

    Attributes:
        env_steps: Ticks so far.
        colliding: Newest consecutive ticks with a collision.
        ended: Why it is over: ``"off_road"``, ``"collision"``, ``"stuck"`` (these terminate), ``"end_of_road"``,
            ``"time"`` (these truncate), or ``""``.
    """

    env_steps: int = 0
    colliding: int = 0
    ended: str = ""

    @property
    def terminated(self) -> bool:
        """A true end: there is no future to bootstrap from."""
        return self.ended in ("off_road", "collision", "stuck")

    @property
    def truncated(self) -> bool:
        """Cut off: it could have gone on."""
        return self.ended in ("end_of_road", "time")


def advance(progress: Progress, tick: Tick, rules: EpisodeRules) -> Progress:
    """Count one more tick and judge whether the episode is over.

    Args:
        progress: Before the tick.
        tick: What happened.
        rules: The scenario's rules.
    """
    now = replace(
        progress, env_steps=progress.env_steps + 1, colliding=progress.colliding + 1 if tick.collision > 0 else 0
    )
    if tick.off_road:
        return replace(now, ended="off_road")
    if now.colliding >= rules.colliding_env_steps:
        return replace(now, ended="collision")
    if now.env_steps % rules.stuck_check_env_steps == 0 and tick.velocity < rules.stuck_speed:
        return replace(now, ended="stuck")
    if tick.end_of_road:
        return replace(now, ended="end_of_road")
    if now.env_steps >= rules.max_env_steps:
        return replace(now, ended="time")
    return now
