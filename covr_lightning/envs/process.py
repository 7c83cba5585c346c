"""An environment in a process of its own, started again when it dies or hangs."""

from __future__ import annotations

import logging
import pickle
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from covr_lightning.envs.base import EnvFactory, PixelEnv
from covr_lightning.envs.child import Child, ChildLost
from covr_lightning.errors import ConfigError, EnvironmentLost
from covr_lightning.random_state import derived_seed
from covr_lightning.stopping import stop_signals

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EnvProcesses:
    """How environments are supervised that live in processes of their own.

    Attributes:
        step_timeout_seconds: How long a step, with its action repeat, may take before the process counts as hung and
            is killed.
        start_timeout_seconds: The same for what can take long: the process's start, and an episode's start.
        restarts: How often in a row one environment's process may be started again. An episode that ends well sets the
            count back: a simulator that crashes once a day does not end a run of a month, one that no longer works
            does.
        first_wait_seconds: Wait before the first of these restarts; every further one waits twice as long as the one
            before it. A signal that stops the run ends the waits.
        longest_wait_seconds: But no longer than this.

    Raises:
        ConfigError: A timeout is not above 0, another value is negative, or the longest wait is below the first.
    """

    step_timeout_seconds: float = 60.0
    start_timeout_seconds: float = 300.0
    restarts: int = 10
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 60.0

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        key = "data.collection.env_processes"
        for name in ("step_timeout_seconds", "start_timeout_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{key}.{name} is {getattr(self, name)}; it must be above 0.")
        for name in ("restarts", "first_wait_seconds"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{key}.{name} is {getattr(self, name)}; it must be at least 0.")
        if not self.longest_wait_seconds >= self.first_wait_seconds:
            raise ConfigError(
                f"{key}.longest_wait_seconds is {self.longest_wait_seconds}; it must be at least "
                f"{key}.first_wait_seconds = {self.first_wait_seconds}."
            )

    def wait_seconds(self, restart: int) -> float:
        """Wait before a restart.

        Args:
            restart: Its number in the row, from 0.
        """
        return min(self.first_wait_seconds * 2.0 ** min(restart, 1000), self.longest_wait_seconds)


class EnvProcess(PixelEnv):
    """The environment that a factory makes, in a child process.

    The simulator alone is there. The stack of frames and the running episode's actions are here, so that observations
    and saved episodes are those of the same environment in this process, bit for bit, and either continues what the
    other has saved.

    When the process dies, hangs, or its environment raises, the running episode is truncated: the last frame again,
    reward 0, and it counts in `lost_episodes`. The next reset waits and starts the process again, with a seed made of
    the environment's seed and the number of the restart, so that another episode comes. A checkpoint that is saved
    while the process is down has no episode to continue, and that seed for the next one.

    The constructor does not wait for the process: several start at the same time.

    Args:
        factory: Describes the environment; pickled for the child.
        seed: Seed of everything random in the environment.
        number: The environment's number, for messages.
        settings: Timeouts and restarts.

    Attributes:
        lost_episodes: Episodes that were cut because the process, or the simulator in it, died or hung.
        repeatable: Whether the simulator does the same again; known from the first reset or restored episode on.
        restarts: How often the process was started again.

    Raises:
        ConfigError: Up to the first reset: the environment cannot be built or reset with its settings. At any time: it
            gives something else than it should.
        EnvironmentLost: From a reset or from :meth:`restore_episode`: the allowed restarts are used up.
    """

    def __init__(self, factory: EnvFactory, seed: int, number: int = 0, settings: EnvProcesses | None = None) -> None:
        spec = factory.spec
        self.number = number
        self.settings = settings or EnvProcesses()
        self.restarts = 0
        self._factory = pickle.dumps(factory)
        self._seed = seed
        self._asked_seed: int | None = None  # set from outside; no episode was drawn from it yet
        self._child: Child | None = None
        self._in_a_row = 0  # restarts since an episode ended well
        self._not_before = 0.0
        self._why_lost = ""
        self._has_worked = False
        self._in_episode = False
        self._metrics: dict[str, float] = {}
        self._frame = np.zeros((spec.frame_height, spec.frame_width, 3), np.uint8)
        super().__init__(spec, seed)
        self._asked_seed = None
        self._start(seed)

    # -- what a PixelEnv is made of ------------------------------------------------------------------------------

    def simulator_seed(self, seed: int) -> None:
        """Seed everything random; a process that is started again before the next episode gets this seed too."""
        self._asked_seed = seed
        try:
            self._ask("simulator_seed", seed)
        except ChildLost:
            return  # it starts with this seed

    def random_state(self) -> dict[str, Any]:
        """What the next reset draws from; while the process is down, ``{"restart_seed": …}``."""
        try:
            return self._ask("random_state")
        except ChildLost:
            return {"restart_seed": self._seed_of_restart()}

    def set_random_state(self, state: dict[str, Any]) -> None:
        """Let the next reset draw from what :meth:`random_state` gave; starts a process that is down."""
        if "restart_seed" in state:
            self.simulator_seed(state["restart_seed"])
        else:
            self._asked_seed = None
            self._ask_surely("set_random_state", state)

    def send_reset(self) -> None:
        """Let the process begin an episode; one that is down is started first, after its wait.

        Not once the run is to stop: then :meth:`draw_episode` gives it no episode.
        """
        if self._child is None and stop_signals.requested is not None:
            return
        if not self._restored:
            self._running().send("draw_episode", seconds=self.settings.start_timeout_seconds)

    def draw_episode(self) -> tuple[dict[str, Any], np.ndarray]:
        """Start an episode, with as many restarts as it takes and are allowed."""
        while True:
            if self._child is None and stop_signals.requested is not None:
                # The step in which a signal came is to end, and be saved; the resumed run starts the process.
                return {"restart_seed": self._seed_of_restart()}, self._frame
            if self._child is None or self._child.awaited != "draw_episode":
                self.send_reset()
            try:
                drawn_from = self._receive()
            except ChildLost:
                continue
            self._has_worked = self._in_episode = True
            self._asked_seed = None
            return drawn_from, self._frame

    def simulator_reset(self) -> np.ndarray:
        """Start an episode."""
        return self.draw_episode()[1]

    def simulator_send(self, action: np.ndarray) -> None:
        """Let the process begin a step."""
        if self._child is not None:
            self._child.send("simulator_step", action, seconds=self.settings.step_timeout_seconds)

    def simulator_receive(self) -> tuple[np.ndarray, float, bool, bool]:
        """The step's result; a process that is lost truncates the episode."""
        lost = self.lost_episodes
        try:
            reward, terminated, truncated = self._receive()
        except ChildLost:
            self.step_lost = True
            return self._frame, 0.0, False, True
        if terminated or truncated or self.time_is_up:
            self._in_episode = False
            if self.lost_episodes == lost:
                self._in_a_row = 0
        return self._frame, reward, terminated, truncated

    def simulator_step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        """Both halves of a step."""
        self.simulator_send(action)
        return self.simulator_receive()

    def episode_metrics(self) -> dict[str, float]:
        """What the environment measured of the running episode up to its newest answer."""
        return self._metrics

    def episode_state(self) -> dict[str, Any]:
        """The running episode, and how often the process was started again; nothing to continue while it is down."""
        state = super().episode_state()
        down = self._child is None
        if down:
            state["pixels"] = None
        return {**state, "restarts": self.restarts + down}  # the next one's seed is saved, and not to come twice

    def restore_episode(self, state: dict[str, Any]) -> bool:
        """Continue an episode, saved here or by the environment in its trainer's process."""
        self.restarts = max(self.restarts, state.get("restarts", 0))  # seeds of restarts do not come again
        self._ask_surely("random_state")  # `repeatable` is known then
        return super().restore_episode(state)

    def close(self, **kwargs: bool) -> None:
        """Let the environment close itself and its process end; kill what does not."""
        if self._child is not None:
            self._child.end()
            self._child = None
        super().close(**kwargs)

    # -- the process ---------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """The process's id; None while it is down."""
        return self._child.process.pid if self._child is not None else None

    def _seed_of_restart(self) -> int:
        """The seed of the next restart."""
        if self._asked_seed is not None:
            return self._asked_seed
        return derived_seed(self._seed, self.restarts + 1)

    def _start(self, seed: int) -> None:
        try:
            self._child = Child(self._factory, seed, self.env_spec, self.settings.start_timeout_seconds)
        except OSError as error:
            self._lose(f"it cannot be started: {error}")

    def _running(self) -> Child:
        """The process; one that is down is started, which is not waited for."""
        while self._child is None:
            if self._in_a_row >= self.settings.restarts:
                raise EnvironmentLost(
                    f"Environment {self.number} is lost ({self._why_lost}), and all {self.settings.restarts} restarts "
                    "in a row that data.collection.env_processes.restarts allows are used up"
                )
            stop_signals.sleep(max(0.0, self._not_before - time.monotonic()))
            seed = self._seed_of_restart()
            self._in_a_row += 1
            self.restarts += 1
            self._start(seed)
        return self._child

    def _ask(self, name: str, *arguments: Any) -> Any:
        if self._child is not None:
            self._child.send(name, *arguments, seconds=self.settings.step_timeout_seconds)
        return self._receive()

    def _ask_surely(self, name: str, *arguments: Any) -> Any:
        while True:
            self._running()
            try:
                return self._ask(name, *arguments)
            except ChildLost:
                continue

    def _receive(self) -> Any:
        if self._child is None:
            raise ChildLost(self._why_lost)
        try:
            answer = self._child.receive()
        except ChildLost as lost:
            self._child.kill()
            self._child = None
            if lost.wrong_result or (lost.config_error and not self._has_worked):
                raise ConfigError(lost.why) from None
            self._lose(lost.why)
            raise
        self.repeatable = answer.repeatable
        self.lost_episodes += answer.lost_episodes
        self.step_lost = answer.step_lost
        self._metrics = answer.episode_metrics
        if answer.frame is not None:
            self._frame = answer.frame
        return answer.result

    def _lose(self, why: str) -> None:
        self._why_lost = why
        self.lost_episodes += self._in_episode
        self._in_episode = False
        left = self.settings.restarts - self._in_a_row
        wait = self.settings.wait_seconds(self._in_a_row)
        self._not_before = time.monotonic() + wait
        then = f"it is started again after {wait:g} s (restarts left: {left})" if left else "no restarts are left"
        logger.warning("Environment %d was lost: %s; %s.", self.number, why, then)
