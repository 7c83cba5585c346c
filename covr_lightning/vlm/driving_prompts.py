"""What the VLM is told when it drives. The paper prints its prompts for CARLA alone; the others here follow them."""

from __future__ import annotations

from collections.abc import Callable

from covr_lightning.vlm.prompts import Prompt, user_text

#: The paper's Fig. 10 in sense, not in words: who the assistant is, what it sees, what its numbers mean.
DRIVING_SYSTEM = (
    "You are a driving assistant in the CARLA driving simulator. You see one image from the front camera of the ego "
    "vehicle and decide its control. Steer is in [-1, 1]: below 0 turns left, above 0 turns right. Throttle is in "
    "[-1, 1]: above 0 accelerates, 0 and below slows down or brakes."
)
_DRIVING_NAMES = ("steer", "throttle")


def highway_prompt() -> Prompt:
    """The prompt of the highway scenarios."""
    return _driving_prompt(
        "a highway from the front camera of a car",
        "Other vehicles may be ahead: avoid collisions. Keep the lane: if the car deviates from it, steer against the "
        "deviation. When no danger is near, throttle should be above 0.5.",
    )


def ghost_pedestrian_prompt() -> Prompt:
    """The prompt of the ghost-pedestrian scenario."""
    return _driving_prompt(
        "a street from the front camera of a car",
        "Pedestrians may suddenly cross from behind parked vehicles: brake at once when one is near. Keep the lane. "
        "When no danger is near, throttle should be above 0.",
    )


def _driving_prompt(shows: str, instruction: str) -> Prompt:
    return Prompt(DRIVING_SYSTEM, user_text(shows, instruction, _DRIVING_NAMES), _DRIVING_NAMES)


CARRACING_SYSTEM = (
    "You are an assistant that drives a racing car, seen from above. You look at one picture and decide steer, gas and "
    "brake so that the car follows the road as fast as it can without leaving it."
)


def carracing_prompt() -> Prompt:
    """The prompt of CarRacing."""
    names = ("steer", "gas", "brake")
    return Prompt(
        CARRACING_SYSTEM,
        user_text(
            "a red racing car from above, heading up the picture; the road is grey, the grass green, and the black bar "
            "below shows the car's instruments",
            "Stay on the grey road and drive along it fast. Steer -1 is full left, 0 straight, 1 full right. Gas -1 is "
            "none, 1 full. Brake -1 is none, 1 full.",
            names,
        ),
        names,
    )


#: The prompt of each driving task, by the name in the environment's `spec.task`.
DRIVING_PROMPTS: dict[str, Callable[[], Prompt]] = {
    "highway": highway_prompt,
    "ghost-pedestrian": ghost_pedestrian_prompt,
    "carracing": carracing_prompt,
}
