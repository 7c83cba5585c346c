"""CarRacing against gymnasium itself, step by step."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from covr_lightning.envs import CarRacing, CarRacingEnv
from covr_lightning.errors import ConfigError
from covr_lightning.vlm import prompt_for


def env(seed: int = 0, **settings: int) -> CarRacingEnv:
    pytest.importorskip("Box2D", reason='Box2D is not installed: pip install "covr_lightning[carracing]"')
    return CarRacing(**settings).make(seed)


def gymnasiums(seed: int) -> tuple[Any, np.ndarray]:
    import gymnasium

    raw = gymnasium.make("CarRacing-v3")
    frame, _ = raw.reset(seed=seed)
    return raw, frame


def step(e: CarRacingEnv, *action: float) -> TensorDict:
    return e.step(TensorDict({"action": torch.tensor(action, dtype=torch.float32)}))["next"]


def newest(pixels: torch.Tensor) -> np.ndarray:
    return pixels[-3:].permute(1, 2, 0).numpy()


def without_score(frame: np.ndarray) -> np.ndarray:
    """gymnasium draws a step's picture before it counts the step's −0.1; the rounded score can differ by one."""
    frame = frame.copy()
    frame[85:, :13] = 0
    return frame


def test_specs_and_prompt() -> None:
    from torchrl.envs.utils import check_env_specs

    e = env(size=64, action_repeat=2)
    check_env_specs(e)
    pixels = e.reset()["pixels"]
    assert (pixels.shape, pixels.dtype) == ((9, 64, 64), torch.uint8)
    assert pixels[-3:].float().std() > 1
    assert CarRacing().spec.task == "carracing"
    prompt = prompt_for("carracing")
    assert prompt.action_names == ("steer", "gas", "brake")
    assert prompt.action_size == e.env_spec.action_dim
    assert prompt.user.endswith("action:[steer, gas, brake]")


def test_actions_rewards_and_frames_are_gymnasiums() -> None:
    e = env(seed=3)
    raw, first = gymnasiums(3)
    assert np.array_equal(newest(e.reset()["pixels"]), first)
    # steer, gas, brake here; gymnasium's gas and brake are (a + 1) / 2.
    pairs = [
        ((0.0, 1.0, -1.0), (0.0, 1.0, 0.0)),
        ((-1.0, 0.5, -1.0), (-1.0, 0.75, 0.0)),
        ((1.0, -1.0, 1.0), (1.0, 0.0, 1.0)),
        ((0.25, 0.0, -0.5), (0.25, 0.5, 0.25)),
        (CarRacing().idle_action, (0.0, 0.0, 0.0)),
    ] * 4  # fmt: skip
    collected = 0.0
    for ours, theirs in pairs:
        total = 0.0
        for _ in range(4):
            frame, reward, *_ = raw.step(np.array(theirs))
            total += reward
        after = step(e, *ours)
        assert float(after["reward"]) == pytest.approx(total, rel=1e-6)
        assert np.array_equal(without_score(newest(after["pixels"])), without_score(frame))
        collected += total
    assert collected > -0.1 * 4 * len(pairs)  # tiles were reached, so more than the time's cost was compared


def test_another_size_is_the_same_picture() -> None:
    small, large = env(seed=1).reset()["pixels"], env(seed=1, size=192).reset()["pixels"]
    halved = torch.nn.functional.avg_pool2d(large[-3:].float(), 2)
    assert (halved - small[-3:].float()).abs().mean() < 2


def test_a_seed_repeats_a_sequence_of_tracks_and_another_does_not() -> None:
    def tracks(seed: int) -> list[list[tuple[float, ...]]]:
        e = env(seed=seed)
        made = []
        for _ in range(3):
            e.reset()
            made.append(list(e._env.unwrapped.track))
        return made

    first = tracks(1)
    assert first == tracks(1)
    assert first != tracks(2)
    assert first[0] != first[1] != first[2]
    e = env(seed=5)
    e.reset()
    e.set_seed(1)
    e.reset()
    assert list(e._env.unwrapped.track) == first[0]


def test_the_time_limit_truncates() -> None:
    e = env(action_repeat=300)
    e.reset()
    ends = [step(e, 0.0, -1.0, -1.0) for _ in range(4)]  # standing still: 300, 600, 900, 1000
    assert [bool(x["done"]) for x in ends] == [False] * 3 + [True]
    assert bool(ends[-1]["truncated"])
    assert not bool(ends[-1]["terminated"])
    # −0.1 for each environment step, of which the last agent step has only 100; a tile is not touched.
    assert float(ends[2]["reward"]) == pytest.approx(-30, abs=1e-3)
    assert float(ends[3]["reward"]) == pytest.approx(-10, abs=1e-3)


def test_leaving_the_playfield_terminates() -> None:
    e = env()
    e.reset()
    after = step(e, 0.0, -1.0, -1.0)
    assert not bool(after["done"])
    e._env.unwrapped.car.hull.position = (400.0, 0.0)  # the playfield ends at 333
    after = step(e, 0.0, -1.0, -1.0)
    assert bool(after["terminated"])
    assert not bool(after["truncated"])
    assert float(after["reward"]) == -100  # the repeat stops there


def test_without_box2d_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "Box2D":
            raise ImportError("No module named 'Box2D'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r'pip install "covr_lightning\[carracing\]" \(No module named \'Box2D\'\)'):
        CarRacing().make(0)


@pytest.mark.parametrize("name", ["size", "action_repeat", "frame_stack"])
def test_wrong_settings(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.env\.{name} is 0; it must be at least 1"):
        CarRacing(**{name: 0})


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="nearest: carracing"):
        prompt_for("carracng")
    assert prompt_for("walker-walk").action_size == 6
