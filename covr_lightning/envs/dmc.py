"""dm_control from pixels, by the protocol of RAD: action repeat below the renderer, camera 0, time limits truncate."""

from __future__ import annotations

import difflib
from typing import Any, Literal

import numpy as np

from covr_lightning.envs.base import EnvFactory, EnvSpec, PixelEnv
from covr_lightning.errors import ConfigError
from covr_lightning.random_state import set_twister_state, twister_state
from covr_lightning.rendering import INSTALL_HINT, choose_backend

#: Action repeat of each task (PlaNet's choice for the six common tasks, the paper's Table 8 for walker and the rest).
ACTION_REPEAT = {
    "cartpole-swingup": 8,
    "reacher-easy": 4,
    "cheetah-run": 4,
    "walker-walk": 4,
    "finger-spin": 2,
    "ball_in_cup-catch": 4,
    "hopper-hop": 4,
    "walker-run": 4,
    "pendulum-swingup": 4,
}
TASKS = tuple(ACTION_REPEAT)

_ACTION_DIM = {"cartpole": 1, "reacher": 2, "cheetah": 6, "walker": 6, "finger": 2, "ball_in_cup": 2, "hopper": 4}
_ACTION_DIM["pendulum"] = 1
EPISODE_ENV_STEPS = 1000


class DMControl(EnvFactory):
    """One of the nine dm_control tasks, seen through camera 0.

    Args:
        task: ``domain-task``, one of :data:`TASKS`.
        size: Height and width of the rendered frame in pixels. RAD renders 100 and crops to 84.
        action_repeat: Environment steps per agent step; the rewards of the repeats are summed. None takes the
            task's own (:data:`ACTION_REPEAT`).
        frame_stack: Frames in one observation.
        rendering: ``"rad"`` gives the pixels that RAD and its successors train on (shadows, reflections,
            multisampling). ``"fast"`` leaves these three out: other pixels, about five times the frames per second
            on a CPU.

    Raises:
        ConfigError: Unknown task, or a size, repeat or stack below 1.
    """

    def __init__(
        self,
        task: str = "cartpole-swingup",
        size: int = 100,
        action_repeat: int | None = None,
        frame_stack: int = 3,
        rendering: Literal["rad", "fast"] = "rad",
    ) -> None:
        if task not in TASKS:
            near = difflib.get_close_matches(task, TASKS, n=3, cutoff=0.3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ConfigError(
                f"Unknown task {task!r} (YAML key data.env.task): {hint}It can be one of {', '.join(TASKS)}."
            )
        for name, value in (("size", size), ("frame_stack", frame_stack), ("action_repeat", action_repeat)):
            if value is not None and value < 1:
                raise ConfigError(f"data.env.{name} is {value}; it must be at least 1.")
        self.task = task
        self.size = size
        self.action_repeat = ACTION_REPEAT[task] if action_repeat is None else action_repeat
        self.frame_stack = frame_stack
        self.rendering = rendering

    @property
    def spec(self) -> EnvSpec:
        """Shapes and units of this task; known without starting the simulator."""
        return EnvSpec(
            task=self.task,
            frame_height=self.size,
            frame_width=self.size,
            frame_stack=self.frame_stack,
            action_dim=_ACTION_DIM[self.task.split("-")[0]],
            action_repeat=self.action_repeat,
            episode_env_steps=EPISODE_ENV_STEPS,
        )

    def make(self, seed: int) -> DMControlEnv:
        """Build the environment.

        Args:
            seed: Seed of the task's initial states (and targets).
        """
        return DMControlEnv(self.spec, seed, self.rendering)


class DMControlEnv(PixelEnv):
    """The environment behind :class:`DMControl`."""

    def __init__(self, spec: EnvSpec, seed: int, rendering: Literal["rad", "fast"] = "rad") -> None:
        choose_backend()
        try:
            from dm_control import suite
        except ImportError as error:
            raise ConfigError(f"No rendering backend works ({error}); {INSTALL_HINT}.") from error

        domain, task = spec.task.split("-")
        self._env = suite.load(domain, task, task_kwargs={"random": seed})
        buffer = self._env.physics.model.vis.global_  # what pictures are drawn in: 640×480, unless they are larger
        buffer.offheight = max(buffer.offheight, spec.frame_height)
        buffer.offwidth = max(buffer.offwidth, spec.frame_width)
        self._render_flags: dict[str, bool] | None = None
        if rendering == "fast":
            self._env.physics.model.vis.quality.offsamples = 0
            self._render_flags = {"shadow": False, "reflection": False}
        self._camera: Any = None
        super().__init__(spec, seed)

    def simulator_seed(self, seed: int) -> None:
        """Seed the task's random state."""
        self._env.task._random = np.random.RandomState(seed % 2**32)

    def random_state(self) -> dict[str, Any]:
        """The task's random numbers."""
        return twister_state(self._env.task.random)

    def set_random_state(self, state: dict[str, Any]) -> None:
        """Set the task's random numbers."""
        set_twister_state(self._env.task.random, state)

    def simulator_reset(self) -> np.ndarray:
        """Start an episode and render its first frame."""
        self._env.reset()
        return self._render()

    def simulator_step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        """Repeat the action, sum the rewards, render once. A time limit (discount 1) truncates."""
        reward, terminated, truncated = 0.0, False, False
        for _ in range(self.env_spec.action_repeat):
            step = self._env.step(action)
            reward += step.reward
            if step.last():
                truncated = step.discount == 1.0
                terminated = not truncated
                break
        return self._render(), reward, terminated, truncated

    def _render(self) -> np.ndarray:
        try:
            with self.times("render"):
                if self._camera is None:
                    self._camera = self._new_camera()
                return self._camera.render(render_flag_overrides=self._render_flags).copy()
        except Exception as error:
            # dm_control raises whatever the OpenGL layer of the day raises; all mean the same to the user.
            raise ConfigError(f"No rendering backend works ({error}); {INSTALL_HINT}.") from error

    def _new_camera(self) -> Any:
        """One camera for all pictures; `physics.render` makes a new one for each, a third of a fast picture's time."""
        from dm_control.mujoco import Camera

        return Camera(self._env.physics, self.env_spec.frame_height, self.env_spec.frame_width, camera_id=0)
