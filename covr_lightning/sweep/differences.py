"""What differs between the configurations of runs, as their ``config.yaml`` has them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

#: A run's configuration, as in its config.yaml.
Configuration = dict[str, Any]

#: Keys that say where a run is written, what of it is shown, or where its simulators are, and change no result.
_NO_RESULT = re.compile(
    r"base|runs_dir|name|ckpt_path|weights_only|video|profile"
    r"|trainer\.(enable_progress_bar|log_every_n_steps|logger(\..*)?)"
    r"|data\.env\.(host|port|tm_port|carla_root|server_arguments|graphics_adapters|timeout_seconds|reconnects)"
)

#: Keys of ProgressiveFineTune that say what a round records beside its work, and change none of it.
_RECORDED = re.compile(r"trainer\.callbacks\.\d+\.(save_rows|samples|vlm_episodes)")

#: Priors that do not go by what the VLM returns alone; with any other one, ``vlm_episodes`` does change a result.
_NOT_BY_EPISODES = ("NoPrior", "ConstantPrior", "DelayedPrior", "SkilledPrior", "AnnealedPrior")

#: Keys that hold a run's seed.
SEEDS = ("seed_everything", "data.seed", "model.seed")


def read_configuration(path: Path) -> Configuration:
    """A run's ``config.yaml``; empty if it cannot be read."""
    try:
        configuration = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return configuration if isinstance(configuration, dict) else {}


def with_seed(config: Configuration, seed: int) -> Configuration:
    """The same configuration with another seed of everything: networks, environment, exploration, replay, update."""
    config = copy.deepcopy(config)
    config["seed_everything"] = seed
    for key in ("data", "model"):
        config[key]["init_args"]["seed"] = seed
    return config


def seed_arguments(seed: int) -> list[str]:
    """What gives a run of ``covr fit`` its seed; the seed of fine-tune rounds follows ``data.seed``."""
    return [part for key in SEEDS for part in (f"--{key}", str(seed))]


def result_settings(config: Configuration) -> dict[str, Any]:
    """The settings that can change a result, by their keys as the command line has them (without ``init_args``)."""
    settings = {key: value for key, value in _flat(config) if not _NO_RESULT.fullmatch(key)}
    prior = str(settings.get("model.prior.class_path", "NoPrior")).rpartition(".")[2]
    counts = prior not in _NOT_BY_EPISODES
    return {
        key: value
        for key, value in settings.items()
        if not _RECORDED.fullmatch(key) or (counts and key.endswith(".vlm_episodes"))
    }


def differences(there: Configuration, here: Configuration) -> list[str]:
    """The keys that differ, each as ``data.batch_size is 8 there, 16 here``; what changes no result is left out."""
    one, other = result_settings(there), result_settings(here)
    missing = object()
    return [
        f"{key} is {shown(one.get(key, '(missing)'))} there, {shown(other.get(key, '(missing)'))} here"
        for key in [*one, *(k for k in other if k not in one)]
        if one.get(key, missing) != other.get(key, missing)
    ]


def shown(value: Any) -> str:
    """A value as YAML has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by their keys."""
    if isinstance(value, list) and any(isinstance(element, dict) for element in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        yield key, value
        return
    for name, below in value.items():
        yield from _flat(below, key if name == "init_args" else f"{key}.{name}".lstrip("."))
