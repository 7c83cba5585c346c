"""The `carla` package, imported when it is needed."""

from __future__ import annotations

import re
import socket
from typing import Any

from covr_lightning.errors import ConfigError


def import_carla() -> Any:
    """The `carla` module.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import carla
    except ImportError as error:
        raise ConfigError(
            f'CARLA\'s client is not installed ({error}): pip install "covr_lightning[carla]" installs it.'
        ) from error
    return carla


def weather(name: str) -> Any:
    """A weather preset by its name.

    Raises:
        ConfigError: There is none of that name.
    """
    presets = import_carla().WeatherParameters
    names = [n for n in dir(presets) if isinstance(getattr(presets, n), presets)]
    if name not in names:
        raise ConfigError(
            f"The scenario's weather is {name!r} (its YAML key weather); CARLA knows {', '.join(sorted(names))}."
        )
    return getattr(presets, name)


def check_versions(client: Any) -> None:
    """Refuse a server of another release: its messages have other layouts, which abort the client's process.

    Raises:
        ConfigError: The releases differ.
    """
    ours, theirs = client.get_client_version(), client.get_server_version()
    if _release(ours) != _release(theirs):
        raise ConfigError(
            f"The CARLA server is {theirs}, but the client is {ours}: install the server's release with "
            f"pip install carla=={_release(theirs)}, or start a server of release {_release(ours)}."
        )


def _release(version: str) -> str:
    found = re.search(r"\d+\.\d+\.\d+", version)
    return found.group() if found else version


def answers(host: str, port: int, timeout_seconds: float = 1.0) -> bool:
    """Whether anything listens there."""
    try:
        socket.create_connection((host, port), timeout_seconds).close()
    except OSError:
        return False
    return True


def free_ports_at(first: int, count: int) -> bool:
    """Whether `count` consecutive ports from `first` on are free."""
    return all(_is_free(port) for port in range(first, first + count))


def free_port(first: int, tries: int = 500) -> int:
    """The first free port from `first` upwards.

    Raises:
        ConfigError: There is none among `tries`.
    """
    for port in range(first, min(first + tries, 65535)):
        if _is_free(port):
            return port
    raise ConfigError(f"There is no free port from {first} upwards: end what listens there.")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
