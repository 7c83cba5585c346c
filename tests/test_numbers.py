"""Numbers that a YAML can give and that are none, or far off, are refused where a part is made."""

from __future__ import annotations

import importlib
import inspect
import math
import typing
from typing import Any

import pytest
import torch

from covr_lightning.agent import (
    CURL,
    SPR,
    DeepMDP,
    GaussianActor,
    RandomCrop,
    RandomShift,
    ResidualActor,
    SACModule,
    SVEAViews,
)
from covr_lightning.agent.checks import check_sizes
from covr_lightning.data import ExperienceData
from covr_lightning.envs import Carla, PointReach
from covr_lightning.errors import ConfigError
from covr_lightning.finetune import FineTuneSettings, RandomWeight
from covr_lightning.vlm import Decoding
from covr_lightning.yaml_errors import PACKAGES

#: What takes decimal numbers, but not from a YAML.
NOT_OF_A_YAML = {
    "ActionText", "BatchViews", "EpisodeBuffer", "FrameStackStorage", "RoundReport", "SACModule", "SavedRows",
}  # fmt: skip
NEEDED: dict[str, dict[str, Any]] = {"ExperienceData": {"env": PointReach()}}


def numbers_of_parts() -> list[tuple[type, str, Any]]:
    """Every class of a package that a YAML names, and its arguments that are decimal numbers, with their types."""
    found = {}
    for package in PACKAGES:
        module = importlib.import_module(f"covr_lightning.{package}")
        for part in (getattr(module, name) for name in module.__all__):
            if not inspect.isclass(part) or inspect.isabstract(part) or part.__name__ in NOT_OF_A_YAML:
                continue
            for name, hint in typing.get_type_hints(part.__init__).items():
                if "float" in str(hint):
                    found[part.__qualname__, name] = (part, name, hint)
    return list(found.values())


@pytest.mark.parametrize(
    ("part", "name", "hint"), numbers_of_parts(), ids=lambda one: getattr(one, "__name__", str(one)[:20])
)
def test_no_part_takes_nan_or_infinity(part: type, name: str, hint: Any) -> None:
    for number in (math.nan, math.inf):
        given = (number, 1.0) if "tuple" in str(hint) else number
        with pytest.raises(ConfigError, match=name):
            part(**NEEDED.get(part.__name__, {}), **{name: given})


def test_there_are_such_numbers() -> None:
    named = {(part.__name__, name) for part, name, _ in numbers_of_parts()}
    assert {("CURL", "lr"), ("DeepMDP", "weight_decay"), ("Carla", "timeout_seconds"), ("SVEAViews", "beta")} <= named
    assert {("FineTuneSettings", "lr"), ("ExperienceData", "updates_per_agent_step")} <= named


def test_nor_does_the_agent() -> None:
    signature = inspect.signature(SACModule).parameters
    usual = {name: parameter.default for name, parameter in signature.items()}
    check_sizes(usual)
    hints = typing.get_type_hints(SACModule.__init__)
    numbers = [name for name in signature if hints[name] is float]
    assert {"critic_lr", "alpha_init", "gamma", "encoder_tau"} <= set(numbers)
    for name in numbers:
        for number in (math.nan, math.inf, -1.0):
            with pytest.raises(ConfigError, match=rf"model\.{name} is {number}; it must"):
                check_sizes({**usual, name: number})


@pytest.mark.parametrize("objective", [CURL, SPR, DeepMDP])
def test_what_trains_with_an_objective_does_not_go_uphill(objective: type) -> None:
    for lr in (-1e-3, 0.0):
        with pytest.raises(ConfigError, match=rf"lr of {objective.__name__} \(model\.objectives\) is {lr}; it must be"):
            objective(lr=lr)
    with pytest.raises(ConfigError, match=r"encoder_lr_multiplier of .* is -1"):
        objective(encoder_lr_multiplier=-1)
    assert objective(lr=0.5, encoder_lr_multiplier=0).encoder_lr_multiplier == 0


@pytest.mark.parametrize("head", [GaussianActor, ResidualActor])
def test_bounds_the_wrong_way_round(head: type) -> None:
    for bounds in ((2.0, -10.0), (1.0, 1.0)):
        with pytest.raises(ConfigError, match=r"model\.actor_head\.log_std_bounds is \[.*\]; it must be two numbers"):
            head(log_std_bounds=bounds)


def test_windows_of_no_pixel() -> None:
    for size in (0, -1):
        with pytest.raises(ConfigError, match=rf"size of RandomCrop is {size} \(model\.augmentation\)"):
            RandomCrop(size)
    with pytest.raises(ConfigError, match=r"pad of RandomShift is -1 \(model\.augmentation\)"):
        RandomShift(-1)
    images = torch.arange(48, dtype=torch.uint8).reshape(1, 3, 4, 4)
    assert torch.equal(RandomShift(0)(images), images)


def test_ports_and_attempts() -> None:
    for wrong in ({"port": 0}, {"port": [2000, 70000]}, {"tm_port": -4}):
        ((name, _),) = wrong.items()
        with pytest.raises(ConfigError, match=rf"data\.env\.{name} is (0|70000|-4); a port can be 1 to 65535"):
            Carla(**wrong)
    with pytest.raises(ConfigError, match=r"data\.env\.reconnects is -1"):
        Carla(reconnects=-1)


def test_seeds() -> None:
    keys = {FineTuneSettings: "settings.seed", RandomWeight: "weight.seed", Decoding: "vlm.decoding.seed"}
    for part, key in keys.items():
        for seed in (-1, 2**31):
            with pytest.raises(ConfigError, match=rf"{key} is {seed}; it can be 0 to 2147483647"):
                part(seed=seed)


def test_updates_for_a_step() -> None:
    with pytest.raises(ConfigError, match="updates_per_agent_step"):
        ExperienceData(PointReach(), updates_per_agent_step=-1)


def test_a_weight_of_zero_is_a_weight() -> None:
    assert SVEAViews(alpha=0, beta=1).alpha == 0
