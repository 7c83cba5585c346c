"""What every environment here gives: stacked uint8 frames, a bounded action, reward, and honest ends of episodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from covr_lightning.errors import ConfigError, WrongResult, described
from covr_lightning.step_times import StepTimes


@dataclass(frozen=True)
class EnvSpec:
    """What the agent and the VLM must know of an environment before it is built.

    Attributes:
        task: Name that a checkpoint is tied to, e.g. ``"cartpole-swingup"``.
        frame_height: Height of one frame in pixels.
        frame_width: Width of one frame in pixels.
        frame_stack: Frames stacked into one observation, oldest first.
        action_dim: Number of action dimensions A.
        action_repeat: Environment steps (simulator control steps, "frames") per agent step.
        episode_env_steps: Environment steps after which an episode is truncated.

    Raises:
        ConfigError: A number is below 1.
    """

    task: str
    frame_height: int
    frame_width: int
    frame_stack: int
    action_dim: int
    action_repeat: int
    episode_env_steps: int

    def __post_init__(self) -> None:
        """Refuse what cannot be an environment."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "task" and value < 1:
                raise ConfigError(
                    f"{field.name} of {self.task}'s EnvSpec (data.env) is {value}; it must be at least 1."
                )

    @property
    def episode_agent_steps(self) -> int:
        """Agent steps in which `episode_env_steps` are over."""
        return -(-self.episode_env_steps // self.action_repeat)

    @property
    def channels(self) -> int:
        """Channels of one observation: three per stacked frame."""
        return 3 * self.frame_stack

    @property
    def action_low(self) -> tuple[float, ...]:
        """Lower action bounds: every environment takes actions in [−1, 1]."""
        return (-1.0,) * self.action_dim

    @property
    def action_high(self) -> tuple[float, ...]:
        """Upper action bounds: every environment takes actions in [−1, 1]."""
        return (1.0,) * self.action_dim

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, for a checkpoint."""
        return asdict(self)


class EnvFactory(ABC):
    """A description of an environment that can be written in YAML and built any number of times."""

    @property
    @abstractmethod
    def spec(self) -> EnvSpec:
        """The environment's shape, known without building it where possible."""

    @property
    def idle_action(self) -> tuple[float, ...]:
        """The action (A,) that does nothing, taken where a VLM that acts cannot be understood: all zero by default."""
        return (0.0,) * self.spec.action_dim

    @abstractmethod
    def make(self, seed: int) -> PixelEnv:
        """Build the environment.

        Args:
            seed: Seed of everything random in the environment.
        """

    def placed(self, number: int | None, envs: int, together: bool) -> EnvFactory:
        """The description of one of a run's environments, where they cannot all act in the same place.

        Args:
            number: Of an environment that collects, among all of the run; None for this process's that evaluates.
            envs: Environments that collect, of the whole run.
            together: Whether those that collect live in the process of the one that evaluates.

        Returns:
            This one, unless a subclass has places to give away.
        """
        return self


class PixelEnv(EnvBase, ABC):
    """A TorchRL environment that shows stacks of RGB frames.

    Observations are ``pixels`` (3·k, H, W) uint8, the k newest frames channels first, oldest frame first; a reset
    repeats its first frame k times. Actions lie in [−1, 1]^A. ``truncated`` marks a time limit, ``terminated`` a true
    end; only the latter cuts the bootstrap.

    A subclass simulates: it implements :meth:`simulator_reset` and :meth:`simulator_step`, the latter with the action
    repeat inside, so that only the last frame of an agent step is rendered. What it gives is checked at each step,
    and an episode that it has not ended by the spec's `episode_env_steps` is truncated there.

    A running episode is saved as what it was drawn from and the actions since, and restored by playing these again:
    with a simulator that is deterministic this gives back its whole state, whatever that consists of.

    A step has two halves, :meth:`send_action` and :meth:`receive`, so that several environments can be under way at
    once (:class:`~covr_lightning.envs.batch.EnvBatch`); here all of it happens in the second.
    """

    #: Episodes that were cut because the simulator died or hung.
    lost_episodes: int = 0
    #: Whether the newest step was not carried out to its end, because the simulator was lost or taken in it. The
    #: transition is then none to learn from: its frame is the one before, and its reward not all of it.
    step_lost: bool = False
    #: Whether the simulator does the same again from the same random state and actions.
    repeatable: bool = True

    def __init__(self, spec: EnvSpec, seed: int) -> None:
        super().__init__(device=torch.device("cpu"), batch_size=torch.Size([]))
        #: Where the seconds of rendering are added up; a run puts its own here.
        self.times = StepTimes()
        self.env_spec = spec
        self._stack: deque[torch.Tensor] = deque(maxlen=spec.frame_stack)
        self._drawn_from: dict[str, Any] = {}  # random state before the running episode's reset
        self._actions: list[torch.Tensor] = []  # its actions so far
        self._restored = False
        self._sent = np.zeros(spec.action_dim)  # the action under way
        self.observation_spec = Composite(
            pixels=Bounded(
                0, 255, (spec.channels, spec.frame_height, spec.frame_width), dtype=torch.uint8, device="cpu"
            ),
            lost=Categorical(2, (1,), dtype=torch.bool),
        )
        self.action_spec = Bounded(-1.0, 1.0, (spec.action_dim,), dtype=torch.float32)
        self.reward_spec = Unbounded((1,), dtype=torch.float32)
        flag = Categorical(2, (1,), dtype=torch.bool)
        self.done_spec = Composite(done=flag, terminated=flag.clone(), truncated=flag.clone())
        self.set_seed(seed)

    @abstractmethod
    def simulator_seed(self, seed: int) -> None:
        """Seed everything random in the simulator; the next reset starts from it."""

    @abstractmethod
    def simulator_reset(self) -> np.ndarray:
        """Start an episode.

        Returns:
            The first frame, (H, W, 3) uint8.
        """

    @abstractmethod
    def simulator_step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        """Repeat one action for `action_repeat` environment steps.

        Args:
            action: (A,) in [−1, 1].

        Returns:
            The last frame (H, W, 3) uint8, the summed reward, terminated, truncated.
        """

    def simulator_send(self, action: np.ndarray) -> None:
        """Begin what :meth:`simulator_step` does, where the simulator can work beside this process."""
        self._sent = action

    def simulator_receive(self) -> tuple[np.ndarray, float, bool, bool]:
        """Finish what :meth:`simulator_send` began; returns what :meth:`simulator_step` returns."""
        return self.simulator_step(self._sent)

    @abstractmethod
    def random_state(self) -> dict[str, Any]:
        """What the next reset draws from, as plain values and tensors."""

    @abstractmethod
    def set_random_state(self, state: dict[str, Any]) -> None:
        """Let the next reset draw from what :meth:`random_state` gave."""

    def episode_metrics(self) -> dict[str, float]:
        """What the environment measures of the running episode beside its return, by name; the same names always."""
        return {}

    def episode_state(self) -> dict[str, Any]:
        """The running episode: the random state it began from, its actions (T, A), and its observation."""
        return {
            "drawn_from": self._drawn_from,
            "actions": torch.stack(self._actions) if self._actions else torch.zeros(0, self.env_spec.action_dim),
            "pixels": self._pixels() if self._stack else None,
            "next_episode": self.random_state(),
        }

    def restore_episode(self, state: dict[str, Any]) -> bool:
        """Continue an episode: play it again; the next reset gives its observation instead of a new episode's.

        Args:
            state: What :meth:`episode_state` gave.

        Returns:
            Whether the episode is back, bit for bit. If not (the simulator does not repeat itself), the next reset
            begins the episode that would have come next.
        """
        self._restored = False
        if self.repeatable and state["pixels"] is not None:
            self.set_random_state(state["drawn_from"])
            self._reset()
            for action in state["actions"]:
                self._step(TensorDict({"action": action}))
            self._restored = torch.equal(self._pixels(), state["pixels"])
        next_episode = state["next_episode"]
        if not self._restored and "restart_seed" in next_episode:  # saved while the environment's process was down
            self.simulator_seed(next_episode["restart_seed"])
        elif not self._restored:
            self.set_random_state(next_episode)
        return self._restored

    def send_reset(self) -> None:
        """Say that a reset comes, for an environment that can begin with it beside this process."""

    def draw_episode(self) -> tuple[dict[str, Any], np.ndarray]:
        """Start an episode: the random state that it is drawn from, and its first frame (H, W, 3) uint8.

        Raises:
            WrongResult: The subclass has given no state, so that the episode could not be resumed.
        """
        state = self.random_state()
        if not isinstance(state, dict):
            raise WrongResult(
                f"{type(self).__name__}.random_state (data.env) gave a {type(state).__name__}; it must be a dict of "
                "what the next reset draws from, which set_random_state takes ({} where nothing is random)."
            )
        return state, self.simulator_reset()

    def send_action(self, action: torch.Tensor) -> None:
        """Begin an agent step; :meth:`receive` must follow.

        Args:
            action: (A,) in [−1, 1].
        """
        self._restored = False
        self._actions.append(action.detach().cpu().clone())
        self.simulator_send(self._actions[-1].numpy().astype(np.float64))

    def receive(self) -> TensorDict:
        """Finish the agent step that :meth:`send_action` began.

        Returns:
            ``pixels``, ``reward`` (1,) float32, and ``done``, ``terminated``, ``truncated``, ``lost``, each (1,) bool.

        Raises:
            WrongResult: The subclass has given something else than it should.
        """
        frame, reward, terminated, truncated = self.checked_step(self.simulator_receive())
        truncated = truncated or self.time_is_up
        self._stack.append(_channels_first(frame))
        return TensorDict(
            {
                "pixels": self._pixels(),
                "reward": torch.tensor([reward], dtype=torch.float32),
                "done": torch.tensor([terminated or truncated]),
                "terminated": torch.tensor([terminated]),
                "truncated": torch.tensor([truncated and not terminated]),
                "lost": torch.tensor([self.step_lost]),
            }
        )

    @property
    def time_is_up(self) -> bool:
        """Whether the running episode's actions have taken it to the spec's `episode_env_steps`."""
        return len(self._actions) >= self.env_spec.episode_agent_steps

    def check_frame(self, frame: Any, source: str) -> None:
        """Check a frame, which a class of somebody's own may have drawn.

        Args:
            frame: What the simulator gave.
            source: The method that it is from.

        Raises:
            WrongResult: It is not (H, W, 3) uint8, H and W as in the spec.
        """
        shape = (self.env_spec.frame_height, self.env_spec.frame_width, 3)
        if isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.shape == shape:
            return
        raise WrongResult(
            f"{type(self).__name__}.{source} (data.env) gave {described(frame, np.ndarray)} as a frame; it must be "
            f"uint8 of shape {shape}."
        )

    def checked_step(self, given: Any) -> tuple[np.ndarray, float, bool, bool]:
        """What :meth:`simulator_step` gave, in plain types.

        Args:
            given: A frame, the reward, terminated, truncated.

        Raises:
            WrongResult: It is something else.
        """
        try:
            frame, reward, terminated, truncated = given
            reward = float(reward)
            for flag in (terminated, truncated):  # what older environments give beside them is true or false, too
                if not isinstance(flag, bool | np.bool_):
                    raise TypeError(f"a {type(flag).__name__} where a bool should be")
        except (TypeError, ValueError, RuntimeError) as error:
            raise WrongResult(
                f"{type(self).__name__}.simulator_step (data.env) must give a frame, the reward as a number, "
                f"and the bools terminated and truncated; what it gave is something else ({error})."
            ) from error
        self.check_frame(frame, "simulator_step")
        return frame, reward, bool(terminated), bool(truncated)

    @property
    def previous_action(self) -> torch.Tensor:
        """The running episode's newest action (A,); 0 at its beginning."""
        return self._actions[-1] if self._actions else torch.zeros(self.env_spec.action_dim)

    def _pixels(self) -> torch.Tensor:
        return torch.cat(tuple(self._stack))

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._restored = False
            self.simulator_seed(int(seed))

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        if not self._restored:
            self._drawn_from, first = self.draw_episode()
            self.check_frame(first, "simulator_reset")
            self._actions = []
            self._stack.extend([_channels_first(first)] * self.env_spec.frame_stack)
        flag = torch.zeros(1, dtype=torch.bool)
        return TensorDict(
            {
                "pixels": self._pixels(),
                "done": flag,
                "terminated": flag.clone(),
                "truncated": flag.clone(),
                "lost": flag.clone(),
            }
        )

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self.send_action(tensordict["action"])
        return self.receive()


def _channels_first(frame: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1)))
