"""Where a config's name leads: the working directory first, then the configs that come with the package."""

from __future__ import annotations

import difflib
import importlib.resources
from pathlib import Path

import yaml

from covr_lightning.errors import ConfigError
from covr_lightning.yaml_errors import check_syntax


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


def with_bases(path: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """A config behind the configs it builds on (its top-level key ``base``: a name or a list of names), theirs first.

    Args:
        path: The config.
        above: The configs that led here.

    Raises:
        ConfigError: A base is in no known place, or a config builds on itself.
    """
    check_syntax(path)
    if path.resolve() in above:
        raise ConfigError(f"The config {path} builds on itself (YAML key base): {' → '.join(p.name for p in above)}.")
    content = yaml.safe_load(path.read_text()) or {}
    base = content.get("base") if isinstance(content, dict) else None
    names = [] if base is None else [base] if isinstance(base, str) else base
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"base is {base!r} in {path}; it can be the name of a config or a list of names.")
    return [below for name in names for below in with_bases(resolve(name), (*above, path.resolve()))] + [path]


def resolve_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """Replace the value of every ``--config`` (``-c``) by the path it leads to, behind the configs it builds on.

    Args:
        argv: Command line arguments.

    Returns:
        The arguments, and the stems of the configs named.

    Raises:
        ConfigError: A config is in no known place, or no YAML.
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
        for each in with_bases(path):
            out += ["--config", str(each)]
    return out, stems
