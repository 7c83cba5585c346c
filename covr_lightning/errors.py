"""The error that a user can cause and mend, and those that end a run whose settings may be right."""

import math


class ConfigError(ValueError):
    """A setting that cannot work.

    The message is one sentence that names the value received, the valid choices and the YAML key to change.
    The command line prints it without a traceback and exits with status 2.
    """


class WrongResult(ConfigError):
    """A class of somebody's own gave something else than it should, and would again."""


def check_positive(name: str, value: float) -> float:
    """A number above 0, and neither NaN nor infinite.

    Args:
        name: Its YAML key.
        value: The number.

    Raises:
        ConfigError: It is none.
    """
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value}; it must be above 0, and a number.")
    return float(value)


def check_not_negative(name: str, value: float) -> float:
    """A number from 0 on, and neither NaN nor infinite.

    Args:
        name: Its YAML key.
        value: The number.

    Raises:
        ConfigError: It is none.
    """
    if not 0 <= value < math.inf:
        raise ConfigError(f"{name} is {value}; it must be 0 or more, and a number.")
    return float(value)


def described(value: object, array: type) -> str:
    """What somebody's class gave, in a few words.

    Args:
        value: What it gave.
        array: What it should have given, ``torch.Tensor`` or ``numpy.ndarray``: of one, type and shape are told.
    """
    if isinstance(value, array):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"  # type: ignore[attr-defined]
    return f"a {type(value).__name__}"


class RunFailed(Exception):
    """What ends a run although its settings may be right. What it has saved stays good. Exit status 3.

    Attributes:
        has_checkpoint: Whether the run has one to go on from, which is told where the run's folder is known.
    """

    has_checkpoint: bool = False


class NonFiniteError(RunFailed):
    """A reward, a loss or a gradient is NaN or infinite; the message names the step."""


class EnvironmentLost(RunFailed):
    """The process of an environment died or hung again and again; the message names the last reason."""
