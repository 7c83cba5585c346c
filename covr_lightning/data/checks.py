"""What the data module refuses before it goes wrong."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from torchrl.data.replay_buffers.samplers import RandomSampler, Sampler, SamplerWithoutReplacement

from covr_lightning.agent.priors import Prior
from covr_lightning.envs.base import EnvSpec
from covr_lightning.errors import ConfigError
from covr_lightning.random_state import check_seed
from covr_lightning.vlm.vlm import VLM

log = logging.getLogger(__name__)

#: Those of TorchRL's samplers that draw single rows and leave them where they are.
_TORCHRL_SAMPLERS = (RandomSampler, SamplerWithoutReplacement)

_AT_LEAST_ONE = (
    "max_env_steps", "batch_size", "replay_capacity", "label_every_agent_steps", "label_batch_size",
    "warmup_agent_steps", "eval_every_env_steps", "eval_episodes", "relabel_batch_size", "num_envs",
)  # fmt: skip


def check_sampler(sampler: Sampler | None) -> None:
    """Refuse those of TorchRL's samplers that the replay cannot serve.

    They draw slices, take rows out of the storage, or want each row's error told in a way of their own.

    Args:
        sampler: ``data.sampler``.

    Raises:
        ConfigError: It is one of them.
    """
    if type(sampler).__module__.startswith("torchrl.") and type(sampler) not in _TORCHRL_SAMPLERS:
        names = ", ".join(kind.__name__ for kind in _TORCHRL_SAMPLERS)
        raise ConfigError(
            f"data.sampler is {type(sampler).__name__}; of TorchRL's it can be {names}, of this package's "
            "ProportionalSampler (prioritized replay), EmphasizingRecentSampler or ReturnSampler."
        )


def check_lengths(arguments: dict[str, Any], spec: EnvSpec) -> None:
    """Check the numbers that the data module is built with.

    Args:
        arguments: The module's arguments by name.
        spec: The environment's shapes.

    Raises:
        ConfigError: One lies outside its range, or two contradict each other; the message names their YAML keys.
    """
    for name in _AT_LEAST_ONE:
        if arguments[name] < 1:
            raise ConfigError(f"data.{name} is {arguments[name]}; it must be at least 1.")
    check_seed("data.seed", arguments["seed"])
    batch_size, warmup, capacity = (arguments[n] for n in ("batch_size", "warmup_agent_steps", "replay_capacity"))
    if batch_size > warmup:
        raise ConfigError(
            f"data.batch_size is {batch_size}, but the first update comes after data.warmup_agent_steps = "
            f"{warmup} transitions; the batch can be 1 to {warmup}."
        )
    if batch_size > capacity:
        raise ConfigError(f"data.batch_size is {batch_size}, but the replay holds data.replay_capacity = {capacity}.")
    if warmup * spec.action_repeat >= arguments["max_env_steps"]:
        raise ConfigError(
            f"data.max_env_steps is {arguments['max_env_steps']}, but the warm-up alone takes {warmup} agent steps "
            f"× {spec.action_repeat} environment steps (data.warmup_agent_steps); it must be above "
            f"{warmup * spec.action_repeat}."
        )
    if arguments["warmup_actions"] not in ("random", "vlm"):
        raise ConfigError(f"data.warmup_actions is {arguments['warmup_actions']!r}; it can be 'random' or 'vlm'.")
    if not 0 < arguments["updates_per_agent_step"] < math.inf:
        raise ConfigError(
            f"data.updates_per_agent_step is {arguments['updates_per_agent_step']}; it must be above 0 (1: an update "
            "per agent step, as in the paper)."
        )


def check_vlm(vlm: VLM | None, asks: bool, prior: Prior, callbacks: Sequence[Any], max_env_steps: int) -> None:
    """Check that a run has the VLM that it asks, and that what its prior waits for will come.

    Args:
        vlm: The VLM.
        asks: Whether the prior or the warm-up asks one.
        prior: The agent's.
        callbacks: The Trainer's; one with a true attribute ``measures_vlm`` makes rounds by its `schedule`, and
            measures the VLM's error in them.
        max_env_steps: The run's length; a prior that waits for more rounds than fit in it is warned of.

    Raises:
        ConfigError: It has not, or it will not.
    """
    if asks and vlm is None:
        raise ConfigError("This run asks a VLM for actions, but none is given (YAML key vlm).")
    making = _making_rounds(callbacks)
    rounds = _rounds(making, max_env_steps)
    wanted = getattr(prior, "after_rounds", 0)
    goes_by = (
        "VLM's error" if prior.needs_measure else "return of the VLM alone" if prior.needs_vlm_return else None
    )  # fmt: skip
    if wanted > rounds and goes_by is None:
        log.warning(
            "%s (model.prior) waits for %d fine-tune rounds (after_rounds), but this run has %s: the VLM never "
            "guides, unless a run goes on that has had them.",
            type(prior).__name__, wanted, f"{rounds} (data.max_env_steps, schedule)" if making else
            "no ProgressiveFineTune (trainer.callbacks) to make any",
        )  # fmt: skip
    if goes_by is not None and not making:
        raise ConfigError(
            f"{type(prior).__name__} (model.prior) goes by the {goes_by} that ProgressiveFineTune measures in each "
            "round, but trainer.callbacks has none."
        )


def check_labels(most: int, label_batch_size: int, prior: Prior, callbacks: Sequence[Any], max_env_steps: int) -> None:
    """Warn of a run whose VLM is never asked, as too few frames are ever due for it; those that wait are for a round.

    Args:
        most: Frames that come due in the whole run, in a process, if λ is above 0 from its beginning.
        label_batch_size: Frames asked about at once.
        prior: The agent's.
        callbacks: The Trainer's, as for :func:`check_vlm`.
        max_env_steps: The run's length.
    """
    if most < label_batch_size and prior.uses_vlm and not _rounds(_making_rounds(callbacks), max_env_steps):
        log.warning(
            "%d frames come due for the VLM in this run (data.max_env_steps, data.label_every_agent_steps), and it is "
            "asked about %d at once (data.label_batch_size): the VLM never guides.", most, label_batch_size,
        )  # fmt: skip


def _making_rounds(callbacks: Sequence[Any]) -> list[Any]:
    return [callback for callback in callbacks if getattr(callback, "measures_vlm", False)]


def _rounds(making: Sequence[Any], max_env_steps: int) -> int:
    """How many come before the run's end."""
    return sum(step < max_env_steps for one in making for step in one.schedule.rounds(max_env_steps))


def check_processes(batch_size: int, replay_capacity: int, envs: int, processes: int, at_once: int) -> None:
    """Check that a run's numbers can be shared out over its processes.

    Args:
        batch_size: Of the whole run.
        replay_capacity: Of the whole run.
        envs: Environments of the whole run.
        processes: Processes of the run.
        at_once: Transitions that a process's collection delivers at once.

    Raises:
        ConfigError: They cannot.
    """
    if batch_size % processes:
        raise ConfigError(
            f"data.batch_size is {batch_size}, which {processes} processes (trainer.devices, trainer.num_nodes) "
            f"cannot share evenly; it must be a multiple of {processes}."
        )
    if replay_capacity < max(processes * batch_size, envs):
        raise ConfigError(
            f"data.replay_capacity is {replay_capacity}, too few for {envs} environments and batches of {batch_size} "
            f"in {processes} processes; it must be at least {max(processes * batch_size, envs)}."
        )
    if replay_capacity < processes * at_once:
        raise ConfigError(
            f"data.replay_capacity is {replay_capacity}, but {processes * at_once} transitions come at once "
            f"(data.num_envs, data.collection.agent_steps_at_once); it must be at least {processes * at_once}."
        )
