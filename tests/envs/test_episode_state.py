"""Episodes that are saved in the middle and continued elsewhere, bit for bit."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from covr_lightning.envs import DMControl, PointReach
from covr_lightning.envs.base import EnvFactory, PixelEnv
from covr_lightning.envs.carracing import CarRacing
from covr_lightning.envs.dmc import TASKS
from covr_lightning.envs.driving import Road

FACTORIES: dict[str, tuple[EnvFactory, int]] = {
    # With the agent steps of one episode; so few that the second episode begins within the test.
    **{task: (DMControl(task, size=32, action_repeat=50, rendering="fast"), 20) for task in TASKS},
    **{f"road {name}": (Road(name, action_repeat=50), 20) for name in ("highway", "highway_b", "ghost_pedestrian")},
    "carracing": (CarRacing(action_repeat=50), 20),
    "point-reach": (PointReach(), 10),
}


def play(env: PixelEnv, steps: int, generator: torch.Generator) -> list[TensorDict]:
    """Steps with random actions; a new episode follows an ended one."""
    seen = []
    for _ in range(steps):
        action = torch.rand(env.env_spec.action_dim, generator=generator) * 2 - 1
        step, _ = env.step_and_maybe_reset(TensorDict({"action": action}))
        seen.append(step["next"])
    return seen


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", FACTORIES)
def test_a_restored_episode_and_those_after_it_go_on_as_if_nothing_had_happened(name: str) -> None:
    factory, length = FACTORIES[name]
    env = factory.make(7)
    env.reset()
    generator = torch.Generator().manual_seed(0)
    play(env, length + length // 2, generator)  # into the middle of the second episode
    state, then = through_a_file(env.episode_state()), generator.get_state()
    expected = play(env, length, generator)  # into the third
    env.close()

    other = factory.make(8)
    assert other.restore_episode(state)
    assert torch.equal(other.reset()["pixels"], state["pixels"])
    generator.set_state(then)
    for t, (mine, theirs) in enumerate(zip(play(other, length, generator), expected, strict=True)):
        for key in ("pixels", "reward", "terminated", "truncated"):
            assert torch.equal(mine[key], theirs[key]), (t, key)
    other.close()


def test_right_after_an_episodes_end_the_next_ones_start_is_restored() -> None:
    factory, length = FACTORIES["pendulum-swingup"]
    env, other = factory.make(1), factory.make(2)
    env.reset()
    last = play(env, length, torch.Generator().manual_seed(0))[-1]
    assert bool(last["truncated"])
    state = env.episode_state()
    assert len(state["actions"]) == 0
    assert other.restore_episode(state)
    assert torch.equal(other.reset()["pixels"], state["pixels"])
    assert not torch.equal(state["pixels"], last["pixels"])


def test_an_environment_that_never_began_is_restored_to_its_first_episode() -> None:
    factory, _ = FACTORIES["pendulum-swingup"]
    env, other = factory.make(1), factory.make(2)
    assert not other.restore_episode(env.episode_state())
    assert torch.equal(other.reset()["pixels"], env.reset()["pixels"])


def test_what_does_not_repeat_itself_begins_the_next_episode() -> None:
    factory, _ = FACTORIES["pendulum-swingup"]
    env, other, third = factory.make(1), factory.make(2), factory.make(1)
    env.reset()
    play(env, 5, torch.Generator().manual_seed(0))
    state = env.episode_state()
    state["actions"][2] += 0.5  # as if the simulator had done something else
    assert not other.restore_episode(state)
    third.reset()
    expected = third.reset()["pixels"]  # of the second episode
    assert torch.equal(other.reset()["pixels"], expected)
    other = factory.make(2)
    other.repeatable = False
    assert not other.restore_episode(env.episode_state())
    assert torch.equal(other.reset()["pixels"], expected)


def test_of_two_restored_episodes_the_second_counts() -> None:
    factory, _ = FACTORIES["pendulum-swingup"]
    env, other = factory.make(1), factory.make(2)
    generator = torch.Generator().manual_seed(0)
    states = []
    for _ in range(2):
        env.reset()
        play(env, 3, generator)
        states.append(env.episode_state())
    for state in states:
        assert other.restore_episode(state)
        assert torch.equal(other.reset()["pixels"], state["pixels"])
    assert not other.restore_episode({**states[0], "pixels": None})
    env.set_random_state(states[1]["drawn_from"])  # the second episode, which followed the first
    assert torch.equal(other.reset()["pixels"], env.reset()["pixels"])


def test_a_new_seed_ends_what_was_restored() -> None:
    factory, _ = FACTORIES["pendulum-swingup"]
    env, other = factory.make(1), factory.make(2)
    env.reset()
    play(env, 5, torch.Generator().manual_seed(0))
    assert other.restore_episode(env.episode_state())
    other.set_seed(5)
    assert torch.equal(other.reset()["pixels"], factory.make(5).reset()["pixels"])
