"""dm_control by RAD's protocol, against dm_control itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dm_control import suite
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from covr_lightning.envs import ACTION_REPEAT, TASKS, DMControl, DMControlEnv
from covr_lightning.errors import ConfigError
from covr_lightning.evaluation import EpisodeResult, EpisodeStatistics, play_episode
from covr_lightning.vlm import dmc_prompt


def env(task: str = "cartpole-swingup", seed: int = 0, **settings) -> DMControlEnv:
    return DMControl(task, **{"size": 32, "rendering": "fast", **settings}).make(seed)


def step(e: DMControlEnv, action: torch.Tensor) -> TensorDict:
    return e.step(TensorDict({"action": action}))["next"]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_its_shapes_and_a_prompt_of_its_size(task: str) -> None:
    e = env(task)
    spec = e.env_spec
    raw = suite.load(*task.split("-")).action_spec()
    assert (spec.action_dim,) == raw.shape == tuple(e.action_spec.shape)
    assert (raw.minimum == -1).all()
    assert (raw.maximum == 1).all()
    assert dmc_prompt(task).action_size == spec.action_dim
    assert spec.action_repeat == ACTION_REPEAT[task]
    pixels = e.reset()["pixels"]
    assert pixels.shape == (9, 32, 32)
    assert pixels.dtype == torch.uint8
    assert pixels[-3:].float().std() > 1
    frame = e._env.physics.render(32, 32, camera_id=0, render_flag_overrides={"shadow": False, "reflection": False})
    assert torch.equal(pixels[-3:], torch.from_numpy(frame.copy()).permute(2, 0, 1))  # one camera for all pictures


def test_specs_are_torchrls() -> None:
    check_env_specs(env())


def test_rewards_are_summed_over_the_action_repeat_and_frames_are_the_last_ones() -> None:
    e = env("cheetah-run", seed=3)
    raw = suite.load("cheetah", "run", task_kwargs={"random": np.random.RandomState(3)})
    raw.physics.model.vis.quality.offsamples = 0
    flags = {"shadow": False, "reflection": False}
    raw.reset()
    e.reset()
    generator = np.random.default_rng(0)
    for _ in range(5):
        action = generator.uniform(-1, 1, 6).astype(np.float32)
        expected = sum(raw.step(action.astype(np.float64)).reward for _ in range(4))
        after = step(e, torch.from_numpy(action))
        assert float(after["reward"]) == pytest.approx(expected, rel=1e-5)
        frame = raw.physics.render(32, 32, camera_id=0, render_flag_overrides=flags)
        assert torch.equal(after["pixels"][-3:], torch.from_numpy(frame.copy()).permute(2, 0, 1))


def test_stack_repeats_the_first_frame_and_shifts() -> None:
    e = env()
    first = e.reset()["pixels"]
    assert torch.equal(first[:3], first[3:6])
    assert torch.equal(first[3:6], first[6:])
    second = step(e, torch.ones(1))["pixels"]
    assert torch.equal(second[:6], first[3:])
    assert not torch.equal(second[6:], first[6:])


def test_a_time_limit_truncates_and_does_not_terminate() -> None:
    e = env(action_repeat=100)
    e.reset()
    ends = [step(e, torch.zeros(1)) for _ in range(10)]
    assert [bool(x["done"]) for x in ends] == [False] * 9 + [True]
    assert bool(ends[-1]["truncated"])
    assert not bool(ends[-1]["terminated"])


def test_a_seed_repeats_an_episode_and_another_does_not() -> None:
    def first_rewards(seed: int) -> list[float]:
        e = env("reacher-easy", seed=seed)
        e.reset()
        return [e.reset()["pixels"].float().mean().item() for _ in range(3)]

    assert first_rewards(1) == first_rewards(1)
    assert first_rewards(1) != first_rewards(2)


def test_fast_rendering_differs_from_rads_pixels() -> None:
    frames = [env(rendering=r, size=84).reset()["pixels"][-3:].float() for r in ("rad", "fast")]
    assert not torch.equal(*frames)
    assert (frames[0] - frames[1]).abs().mean() < 30  # the same scene


def test_play_episode_seeds_itself_and_records() -> None:
    e = env(action_repeat=100)

    before: list[torch.Tensor | None] = []

    def policy(pixels: torch.Tensor, deterministic: bool, previous_action: torch.Tensor | None) -> torch.Tensor:
        assert deterministic
        before.append(previous_action)
        return torch.full((len(pixels), 1), 0.3 + len(before) % 10 / 100)

    first = play_episode(policy, e, seed=5, record=True)
    second = play_episode(policy, e, seed=5)
    assert first.episode_return == second.episode_return
    assert (first.agent_steps, len(first.frames), len(second.frames)) == (10, 11, 0)
    for episode in (before[:10], before[10:20]):
        assert episode[0] is None
        given = [float(action) for action in episode[1:] if action is not None and action.shape == (1, 1)]
        assert given == pytest.approx([0.31, 0.32, 0.33, 0.34, 0.35, 0.36, 0.37, 0.38, 0.39])
    assert play_episode(policy, e, seed=6).episode_return != first.episode_return


def test_episode_statistics_by_hand() -> None:
    metric = EpisodeStatistics()
    for value, distance in ((1.0, 10.0), (2.0, 10.0), (6.0, 40.0)):
        metric.update(EpisodeResult(value, agent_steps=5, metrics={"distance": distance}))
    result = metric.compute()
    # Mean 3; deviations −2, −1, 3: variance 14/3. Mean 20; deviations −10, −10, 20: variance 200.
    assert float(result["return"]) == 3.0
    assert float(result["return_std"]) == pytest.approx((14 / 3) ** 0.5)
    assert float(result["distance"]) == 20.0
    assert float(result["distance_std"]) == pytest.approx(200**0.5)
    assert int(result["episodes"]) == 3


@pytest.mark.parametrize(
    ("settings", "part"), [({"task": "walker-swim"}, "walker-walk"), ({"size": 0}, "data.env.size")]
)
def test_wrong_settings(settings: dict, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        DMControl(**settings)


def test_frames_larger_than_mujocos_buffer() -> None:
    e = DMControl("cartpole-swingup", size=500, rendering="fast").make(0)
    frame = e.reset()["pixels"][-3:]
    assert frame.shape == (3, 500, 500)
    assert frame[:, :20].float().std() > 0 or frame[:, -20:].float().std() > 0
