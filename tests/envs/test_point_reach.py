"""The point that must reach a goal: its motion, reward and pictures by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from covr_lightning.envs import PointReach, PointReachEnv
from covr_lightning.errors import ConfigError
from covr_lightning.vlm import prompt_for


def placed(point: tuple[float, float], goal: tuple[float, float], **settings: int) -> PointReachEnv:
    """An episode that begins with point and goal at given places."""
    env = PointReach(**settings).make(0)
    env.reset()
    env.point, env.goal = np.array(point), np.array(goal)
    return env


def step(env: PointReachEnv, x: float, y: float) -> TensorDict:
    return env.step(TensorDict({"action": torch.tensor([x, y])}))["next"]


def test_specs_and_prompt() -> None:
    from torchrl.envs.utils import check_env_specs

    env = PointReach(size=24, frame_stack=2).make(0)
    check_env_specs(env)
    assert env.reset()["pixels"].shape == (6, 24, 24)
    assert PointReach().spec.as_dict() == {
        "task": "point-reach", "frame_height": 32, "frame_width": 32, "frame_stack": 3, "action_dim": 2,
        "action_repeat": 1, "episode_env_steps": 10,
    }  # fmt: skip
    prompt = prompt_for("point-reach")
    assert prompt.action_size == 2
    assert prompt.user.endswith("action:[right, up]")


def test_motion_and_reward_by_hand() -> None:
    env = placed((0.0, 0.5), (0.5, 0.0))
    # A full action moves by 0.4: to (0.4, 0.3); 0.1 and 0.3 are left, √0.10 away.
    after = step(env, 1.0, -0.5)
    np.testing.assert_allclose(env.point, [0.4, 0.3])
    assert float(after["reward"]) == pytest.approx(1 - math.sqrt(0.10))
    assert not after["done"]
    # At the goal the reward is 1, as far away as can be it is 1 − 2√2; the point stops at the edge.
    env = placed((-0.1, 0.1), (0.3, 0.1))
    assert float(step(env, 1.0, 0.0)["reward"]) == pytest.approx(1.0)
    env = placed((0.9, -0.95), (-1.0, 1.0))
    assert float(step(env, 1.0, -1.0)["reward"]) == pytest.approx(1 - 2 * math.sqrt(2))
    np.testing.assert_allclose(env.point, [1.0, -1.0])


def test_rewards_are_summed_over_the_action_repeat_and_time_truncates() -> None:
    env = placed((-0.5, 0.0), (0.5, 0.0), action_repeat=2, episode_env_steps=5)
    # At −0.3 and −0.1 the goal is 0.8 and 0.6 away; then 0.4 and 0.2; then the fifth step alone, at the goal.
    steps = [step(env, 0.5, 0.0) for _ in range(3)]
    assert [float(s["reward"]) for s in steps] == pytest.approx([0.6, 1.4, 1.0])
    assert [bool(s["truncated"]) for s in steps] == [False, False, True]
    assert not any(bool(s["terminated"]) for s in steps)


def test_the_picture_pixel_by_pixel() -> None:
    env = placed((0.45, -0.3), (-0.5, 0.6))
    picture = step(env, 0.0, 0.0)["pixels"][-3:].permute(1, 2, 0).tolist()
    for row in range(32):
        for column in range(32):
            x, y = (column + 0.5) / 16 - 1, 1 - (row + 0.5) / 16  # 16 pixels are one unit
            expected = [20.0, 20.0, 40.0]
            for place, radius, colour in (((-0.5, 0.6), 0.25, (220, 40, 40)), ((0.45, -0.3), 0.15, (255, 255, 255))):
                share = min(1.0, max(0.0, (radius - math.dist((x, y), place)) * 16 + 0.5))
                expected = [share * c + (1 - share) * e for c, e in zip(colour, expected, strict=True)]
            assert picture[row][column] == pytest.approx(expected, abs=0.501), (row, column)
    # The goal is in the upper left, the point in the lower right, and nothing else is there.
    assert picture[6][8] == [220, 40, 40]
    assert picture[20][23] == [255, 255, 255]


def test_a_move_of_less_than_a_pixel_shows() -> None:
    env = placed((0.0, 0.0), (0.5, 0.5))
    frames = step(env, 0.1, 0.0)["pixels"], step(env, 0.1, 0.0)["pixels"]
    assert not torch.equal(frames[0][-3:], frames[1][-3:])
    assert torch.equal(frames[0][-3:], frames[1][-6:-3])  # the frame before


def test_a_seed_repeats_its_episodes_and_another_does_not() -> None:
    def starts(seed: int) -> torch.Tensor:
        env = PointReach().make(seed)
        return torch.stack([env.reset()["pixels"] for _ in range(4)])

    assert torch.equal(starts(3), starts(3))
    assert not torch.equal(starts(3), starts(4))
    assert len(starts(3).unique(dim=0)) == 4


def test_point_and_goal_begin_all_over_the_square() -> None:
    env, places = PointReach().make(0), []
    for _ in range(300):
        env.reset()
        places.append([*env.point, *env.goal])
    lowest, highest = np.min(places, 0), np.max(places, 0)
    assert (np.abs(places) <= 0.8).all()
    assert (lowest < -0.7).all()
    assert (highest > 0.7).all()


@pytest.mark.parametrize("name", ["size", "action_repeat", "frame_stack", "episode_env_steps"])
def test_wrong_settings(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.env\.{name} is 0; it must be at least 1"):
        PointReach(**{name: 0})
