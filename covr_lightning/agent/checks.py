"""What the SAC module refuses before it goes wrong: sizes out of range, and checkpoints of another environment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer

from covr_lightning import processes
from covr_lightning.errors import ConfigError, check_positive
from covr_lightning.random_state import check_seed

if TYPE_CHECKING:
    from covr_lightning.agent.acting import Acting

#: Goes up when the networks' weights come to mean something else: 2 since features are flattened as (H′, W′, filter).
NETWORKS = 2

#: Of Lightning's precisions those that an agent trains in.
PRECISIONS = ("32-true", "bf16-mixed")


def check_sizes(arguments: dict[str, Any]) -> None:
    """Check the numbers that the SAC module is built with.

    Args:
        arguments: The module's arguments by name.

    Raises:
        ConfigError: One lies outside its range; the message names its YAML key.
    """
    for name in ("filters", "latent", "hidden", "actor_every_grad_steps", "target_every_grad_steps"):
        if arguments[name] < 1:
            raise ConfigError(f"model.{name} is {arguments[name]}; it must be at least 1.")
    check_seed("model.seed", arguments["seed"])
    for name in ("gamma", "critic_tau", "encoder_tau"):
        if not 0 <= arguments[name] <= 1:
            raise ConfigError(f"model.{name} is {arguments[name]}; it must lie in 0 to 1.")
    if not all(0 <= beta < 1 for beta in arguments["alpha_betas"]):
        raise ConfigError(
            f"model.alpha_betas is {list(arguments['alpha_betas'])}; both must lie in 0 to 1, 1 excluded."
        )
    for name in ("critic_lr", "actor_lr", "alpha_lr", "alpha_init"):
        check_positive(f"model.{name}", arguments[name])


def check_backend(backend: str | None) -> None:
    """Check the backend of torch.compile.

    Args:
        backend: Its name; None for none.

    Raises:
        ConfigError: PyTorch has no such backend.
    """
    if backend is None:
        return
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigError(f"model.torch_compile is {backend!r}; it can be null or one of {', '.join(known)}.")


def check_precision(trainer: Trainer) -> None:
    """Check that an agent's update can be computed as the Trainer is told to.

    Float16 needs its losses scaled, which optimizers that look at the gradients' size before a step would have to take
    back; with weights in bfloat16 or float64 the images would need their type, too.

    Args:
        trainer: What runs it.

    Raises:
        ConfigError: It is neither float32 nor bfloat16 with weights in float32.
    """
    if trainer.precision not in PRECISIONS:
        raise ConfigError(
            f"trainer.precision is {trainer.precision!r}; of an agent it can be {' or '.join(map(repr, PRECISIONS))}."
        )


def check_graphs(cuda_graphs: bool, trainer: Trainer) -> None:
    """Check that a run can make its updates by CUDA graphs.

    Args:
        cuda_graphs: Whether it is asked to.
        trainer: What runs it.

    Raises:
        ConfigError: It has several processes, or looks for anomalies.
    """
    if not cuda_graphs or trainer.strategy.root_device.type != "cuda":
        return
    if processes.count() > 1:
        raise ConfigError(
            f"model.cuda_graphs is true, and the run has {processes.count()} processes (trainer.devices); graphs are "
            "for runs of one."
        )
    if trainer._detect_anomaly:
        raise ConfigError(
            "model.cuda_graphs is true, and so is trainer.detect_anomaly, which reads every gradient back, as a graph "
            "cannot; with it, model.cuda_graphs can be false."
        )


def check_checkpoint(checkpoint: dict[str, Any], module: Acting) -> None:
    """Check that a checkpoint is of this run's environment and networks, and that its weights mean what they mean here.

    Args:
        checkpoint: What :class:`covr_lightning.agent.SACModule` saved: ``covr_spec``, ``covr_networks``,
            ``covr_architecture`` (not in those of before 28 November 2026).
        module: The agent that is to go on, with the shapes of this run's environment.

    Raises:
        ConfigError: They differ; the message names what.
    """
    saved, spec = checkpoint.get("covr_spec"), module.spec
    if saved is None:
        raise ConfigError("The file given as --ckpt_path is no checkpoint of this program (it names no task).")
    if saved["task"] != spec.task:
        raise ConfigError(
            f"The checkpoint given as --ckpt_path is of task {saved['task']!r}, this run's task is "
            f"{spec.task!r} (YAML key data.env.task)."
        )
    if saved != spec.as_dict():
        different = {k: (v, spec.as_dict()[k]) for k, v in saved.items() if v != spec.as_dict()[k]}
        raise ConfigError(
            "The checkpoint given as --ckpt_path was made with other environment settings (YAML key data.env): "
            + "; ".join(f"{k} was {a}, now is {b}" for k, (a, b) in different.items())
            + "."
        )
    if checkpoint.get("covr_networks", 1) != NETWORKS:
        raise ConfigError(
            "The checkpoint given as --ckpt_path was saved by another version of covr_lightning, whose networks read "
            "their features in another order; go on with that version, or train anew."
        )
    _check_networks(checkpoint, module)


def _check_networks(checkpoint: dict[str, Any], module: Acting) -> None:
    """Check that a checkpoint's weights are those of the networks that are to go on.

    Args:
        checkpoint: With ``state_dict`` and ``covr_architecture``.
        module: The agent.

    Raises:
        ConfigError: They are of other networks; the message names one.
    """
    there = {name: tuple(weights.shape) for name, weights in checkpoint.get("state_dict", {}).items()}
    here = {name: tuple(weights.shape) for name, weights in module.state_dict().items()}
    different = [name for name in [*here, *(n for n in there if n not in here)] if there.get(name) != here.get(name)]
    if there and different:
        shapes = [str(one.get(different[0], "missing")) for one in (there, here)]
        more = f" and {len(different) - 1} more" if len(different) > 1 else ""
        raise ConfigError(
            f"The checkpoint given as --ckpt_path is of other networks (YAML key model): {different[0]} is {shapes[0]} "
            f"there, {shapes[1]} here{more}; set model as the config.yaml in the run's folder has it."
        )
    for key, was in checkpoint.get("covr_architecture", {}).items():
        if was != (now := module.architecture.get(key)):
            raise ConfigError(
                f"The checkpoint given as --ckpt_path is of other networks with weights of the same shapes: {key} was "
                f"{was}, now is {now}; set model as the config.yaml in the run's folder has it."
            )
