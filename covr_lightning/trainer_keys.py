"""Keys below ``trainer`` in a YAML: those that a run has others for, and what Lightning says of the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from covr_lightning.errors import ConfigError

#: Those that are a share as a float and a count as an int.
_SHARES_OR_COUNTS = ("val_check_interval", "limit_train_batches", "limit_val_batches")


def refuse_trainer_keys(trainer: Any, own: Mapping[str, tuple[Any, str]]) -> None:
    """Refuse those of the Trainer's keys that this package has others for.

    Args:
        trainer: The Trainer's arguments.
        own: Key → its value when it is not given, and what to say if it is.

    Raises:
        ConfigError: One is given.
    """
    for key, (neutral, sentence) in own.items():
        given = trainer.get(key)
        is_count = key in _SHARES_OR_COUNTS and type(given) is int  # 1 is one batch, 1.0 is all of them
        if is_count or given not in (neutral, None):
            raise ConfigError(f"trainer.{key} is {given!r}{sentence}.")


@contextlib.contextmanager
def trainer_errors() -> Iterator[None]:
    """What Lightning says of a Trainer's arguments is of what stands below ``trainer``.

    Raises:
        ConfigError: It does not take them.
    """
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
