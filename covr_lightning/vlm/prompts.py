"""What the VLM is told: one prompt per dm_control task and that of the point; driving is in `driving_prompts`.

Each prompt says what the picture shows, what each action dimension does and its range, and the exact answer format.
The texts are short because a prompt's length decides the cost of labelling; they serve a general VLM as well.
Directions follow the picture of camera 0 and were read off the joint axes and gears of dm_control's models.
"""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from covr_lightning.errors import ConfigError
from covr_lightning.vlm.action_text import answer_format

if TYPE_CHECKING:
    from covr_lightning.envs.base import EnvSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One task's instructions to the VLM; the picture stands at the head of the user's turn.

    Attributes:
        system: the system turn.
        user: the user's turn after the picture; ends with the answer format.
        action_names: one name per action dimension, in the order of the environment's action.
    """

    system: str
    user: str
    action_names: tuple[str, ...]

    def of_moments(self, count: int) -> Prompt:
        """The same for a picture of several moments (:func:`~covr_lightning.vlm.pictures.side_by_side`)."""
        if count == 1:
            return self
        shows = f"The picture shows the last {count} moments side by side, the newest on the right."
        return replace(self, system=f"{self.system} {shows}".strip())

    @property
    def action_size(self) -> int:
        """Number of action dimensions the prompt asks for."""
        return len(self.action_names)


DMC_SYSTEM = "You control a simulated robot from one picture."

_CHEETAH_NAMES = (
    "back_thigh_torque",
    "back_shin_torque",
    "back_foot_torque",
    "front_thigh_torque",
    "front_shin_torque",
    "front_foot_torque",
)
_WALKER_NAMES = (
    "right_hip_torque",
    "right_knee_torque",
    "right_ankle_torque",
    "left_hip_torque",
    "left_knee_torque",
    "left_ankle_torque",
)
_WALKER_SHOWS = "a two-legged walker from the side, facing right"
_WALKER_ACTION = "Positive torques swing the limb forward, negative ones backward."

_DMC_TASKS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "cartpole-swingup": (
        "a pole hinged on a cart that slides along a rail",
        "Swing the pole up and keep it upright near the middle.",
        "Positive force pushes the cart right, negative left.",
        ("cart_force",),
    ),
    "reacher-easy": (
        "a two-link arm and a round target, seen from above",
        "Bring the fingertip onto the target.",
        "Positive torques turn the link counter-clockwise, negative ones clockwise.",
        ("shoulder_torque", "wrist_torque"),
    ),
    "cheetah-run": (
        "a two-legged cheetah from the side, its head to the right",
        "Run to the right as fast as possible.",
        "Positive torques swing the limb backward, negative ones forward.",
        _CHEETAH_NAMES,
    ),
    "walker-walk": (_WALKER_SHOWS, "Stand upright and walk to the right.", _WALKER_ACTION, _WALKER_NAMES),
    "finger-spin": (
        "a two-link finger on the left and a spinner on the right",
        "Hit the spinner so that it keeps spinning.",
        "Positive torques turn the link counter-clockwise, negative ones clockwise.",
        ("proximal_torque", "distal_torque"),
    ),
    "ball_in_cup-catch": (
        "a cup and a ball on a string",
        "Swing the ball up and catch it in the cup.",
        "Positive forces push the cup right and up, negative ones left and down.",
        ("cup_force_x", "cup_force_z"),
    ),
    "hopper-hop": (
        "a one-legged hopper from the side, its nose to the right",
        "Stay upright and hop to the right.",
        "Positive torques swing the limb backward, negative ones forward.",
        ("waist_torque", "hip_torque", "knee_torque", "ankle_torque"),
    ),
    "walker-run": (
        _WALKER_SHOWS,
        "Stay upright and run to the right as fast as possible.",
        _WALKER_ACTION,
        _WALKER_NAMES,
    ),
    "pendulum-swingup": (
        "a pendulum that turns about a fixed point",
        "Swing the pendulum up and keep it upright.",
        "Positive torque turns it clockwise, negative counter-clockwise.",
        ("hinge_torque",),
    ),
}


#: `spec.task` of :class:`covr_lightning.envs.PointReach`.
POINT_REACH = "point-reach"


def user_text(shows: str, instruction: str, names: tuple[str, ...]) -> str:
    """The skeleton of every prompt: what the picture shows, what is asked, the range and the answer format."""
    return (
        f"The picture shows {shows}. {instruction} Each value is in [-1, 1]. "
        f"Answer ONLY in this exact format: {answer_format(names)}"
    )


def dmc_tasks() -> tuple[str, ...]:
    """Names of the tasks that have a prompt."""
    return tuple(_DMC_TASKS)


def prompt_for(task: str) -> Prompt:
    """The prompt that comes with a task of any environment.

    Args:
        task: the environment's `spec.task`.

    Raises:
        ConfigError: if the task has no prompt; the message names the nearest ones.
    """
    from covr_lightning.vlm.driving_prompts import DRIVING_PROMPTS  # it needs this module's Prompt

    if task in DRIVING_PROMPTS:
        return DRIVING_PROMPTS[task]()
    if task in _DMC_TASKS:
        return dmc_prompt(task)
    if task == POINT_REACH:
        return point_reach_prompt()
    raise _no_prompt(task, (*_DMC_TASKS, *DRIVING_PROMPTS, POINT_REACH))


def check_prompt(prompt: Prompt, spec: EnvSpec) -> None:
    """Check that a prompt asks for the actions that an environment takes; say so if it does not tell how to answer.

    Args:
        prompt: The prompt.
        spec: The environment.

    Raises:
        ConfigError: It asks for more or fewer values.
    """
    if prompt.action_size != spec.action_dim:
        raise ConfigError(
            f"The prompt asks for {prompt.action_size} action values ({', '.join(prompt.action_names)}), but "
            f"{spec.task} takes {spec.action_dim} (YAML key vlm.prompt.action_names)."
        )
    from covr_lightning import processes  # Lightning comes with it, which prompts need not

    form = answer_format(prompt.action_names)
    told = "".join(f"{prompt.system} {prompt.user}".split())
    if "".join(form.split()) not in told and not processes.number():
        logger.warning(
            "The prompt (vlm.prompt) does not show the VLM how to answer, %s; an answer in other words is not used.",
            form,
        )


def point_reach_prompt() -> Prompt:
    """The prompt of reaching a goal with a point, in words that the embedded VLM knows; it was not trained with it."""
    return Prompt(
        "You control a point from one picture.",
        user_text(
            "a white point and a red round target, seen from above",
            "Bring the point onto the target. Positive values push the point right and up, negative ones left and "
            "down.",
            ("right", "up"),
        ),
        ("right", "up"),
    )


def dmc_prompt(task: str) -> Prompt:
    """The prompt of one dm_control task.

    Args:
        task: "domain-task", e.g. "cartpole-swingup".

    Raises:
        ConfigError: if the task has no prompt; the message names the nearest ones.
    """
    if task not in _DMC_TASKS:
        raise _no_prompt(task, tuple(_DMC_TASKS))
    shows, goal, action, names = _DMC_TASKS[task]
    return Prompt(DMC_SYSTEM, user_text(shows, f"{goal} {action}", names), names)


def _no_prompt(task: str, tasks: tuple[str, ...]) -> ConfigError:
    nearest = difflib.get_close_matches(task, tasks, n=3, cutoff=0.4)
    hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
    return ConfigError(f"no prompt for task {task!r}: valid tasks are {', '.join(tasks)}{hint} (YAML key vlm.prompt)")
