"""Where a config's name leads: the working directory first, then the configs that come with the package."""

from __future__ import annotations

import difflib
import importlib.resources
from pathlib import Path

from covr_lightning.errors import ConfigError


def bundled_configs() -> dict[str, Path]:
    """Name → path of every shipped YAML."""
    folder = Path(str(importlib.resources.files("covr_lightning.configs")))
    return {path.name: path for path in sorted(folder.glob("*.yaml"))}


def resolve(name: str) -> Path:
    """Find a config.

    Args:
        name: A path, or a bare name with or without ``.yaml``.

    Raises:
        ConfigError: It is in neither place; the message names the nearest ones.
    """
    bundled = bundled_configs()
    for candidate in (Path(name).expanduser(), Path(f"{name}.yaml").expanduser()):
        if candidate.is_file():
            return candidate
        if candidate.name in bundled and candidate.parent == Path("."):
            return bundled[candidate.name]
    near = difflib.get_close_matches(Path(name).name, bundled, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(
        f"No config {name!r} in {Path.cwd()} or among the shipped ones (--config): {hint}"
        f"Shipped are {', '.join(bundled)}."
    )


def resolve_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """Replace the value of every ``--config`` (``-c``) by the path it leads to.

    Args:
        argv: Command line arguments.

    Returns:
        The arguments, and the stems of the configs named.
    """
    out: list[str] = []
    stems: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        name: str | None
        if argument in ("--config", "-c"):
            name = next(arguments, None)
            if name is None:
                raise ConfigError("--config needs the name of a YAML, e.g. --config quickstart.yaml.")
        elif argument.startswith("--config="):
            name = argument.removeprefix("--config=")
        else:
            out.append(argument)
            continue
        path = resolve(name)
        stems.append(path.stem)
        out += ["--config", str(path)]
    return out, stems
