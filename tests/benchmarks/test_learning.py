"""Every method learns a small task from its own YAML, far better than at random; and the yardstick is a sound one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import learning
from benchmarks.learning import METHODS, PointingVLM, learn, needed, play, random_score, straight_score, towards_goal
from covr_lightning.config_files import bundled_configs
from covr_lightning.envs import PointReach
from covr_lightning.vlm.action_text import ActionText


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name == "SAC" else pytest.mark.slow) for name in METHODS]
)
def test_a_method_learns(method: str, tmp_path: Path) -> None:
    score = learn(method, 0, tmp_path)
    assert score.mean > needed(0, score.std), (score, random_score(0))


@pytest.mark.parametrize("action", [(x, y) for x in (-1.0, 0.0, 1.0) for y in (-1.0, 0.0, 1.0)])
def test_what_does_not_look_has_not_learnt(action: tuple[float, float]) -> None:
    blind = play(lambda pixels, **_: torch.tensor([action]), 0)
    assert blind.mean < needed(0, blind.std)


def test_random_and_straight_policies_by_hand() -> None:
    # At 0.4 a step and at most 1.6 away along an axis, the goal is reached by the fourth step: 6 of 10 rewards are 1.
    straight, random = straight_score(0), random_score(0)
    assert 6 < straight.mean < 10
    assert random.mean < 2
    # A third of the way is more than three standard errors of a score that does not vary, here of random's alone.
    third = random.mean + (straight.mean - random.mean) / 3
    assert needed(0, 0.0) == pytest.approx(max(third, random.mean + 3 * random.std / 20**0.5))


def test_the_rule_points_from_the_point_to_the_goal() -> None:
    env = PointReach().make(3)
    seen = 0
    for _ in range(50):
        frame = env.reset()["pixels"][-3:]
        way = torch.from_numpy(env.goal - env.point)
        if way.norm() < 0.5:  # one covers the other
            continue
        seen += 1
        expected = (way / 0.4).clamp(-1, 1)
        torch.testing.assert_close(towards_goal(frame[None])[0], expected, atol=0.06, rtol=0)
        engine, codec = PointingVLM(), ActionText((-1.0, -1.0), (1.0, 1.0))
        engine.open(SimpleNamespace(codec=codec))
        action, valid = codec.decode(engine.answers(frame[None])[0] or "")
        assert valid
        torch.testing.assert_close(action.double(), expected, atol=0.07, rtol=0)
    assert seen > 30


def test_every_shipped_method_is_in_the_list() -> None:
    listed = {config for method in METHODS.values() for config in method.configs}
    shipped = {name for name in bundled_configs() if name.startswith("dmc_")} - {"dmc_cartpole_swingup_cpu.yaml"}
    assert shipped <= listed
    assert learning.TASK in bundled_configs()
