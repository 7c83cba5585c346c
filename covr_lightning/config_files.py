"""Where a config's name leads: the working directory first, then the configs that come with the package."""

from __future__ import annotations

import difflib
import importlib.resources
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from covr_lightning.errors import ConfigError
from covr_lightning.yaml_errors import check_syntax

#: Negative numbers that argparse does not know as such.
_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)e[-+]?\d+|-\d+\.|-\.?inf", re.IGNORECASE)


def bundled_configs() -> dict[str, Path]:
    """Name → path of every shipped YAML; one in a folder is named ``folder/name.yaml``."""
    root = _bundled_root()
    paths = yamls_in(root) + [path for folder in sorted(root.glob("*/")) for path in yamls_in(folder)]
    return {path.relative_to(root).as_posix(): path for path in paths}


def bundled_folders() -> dict[str, Path]:
    """Name → path of every shipped folder of YAMLs."""
    return {path.parent.name: path.parent for name, path in bundled_configs().items() if "/" in name}


def yamls_in(folder: Path) -> list[Path]:
    """The YAMLs of a folder, m2 before m10."""

    def by_number(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.stem)]

    return sorted(folder.glob("*.yaml"), key=by_number)


def _bundled_root() -> Path:
    return Path(str(importlib.resources.files("covr_lightning.configs")))


def resolve(name: str, beside: Path | None = None) -> Path:
    """Find a config.

    Args:
        name: A path, or the name of a shipped config, with or without ``.yaml``.
        beside: A folder to look in first.

    Raises:
        ConfigError: It is in neither place; the message names the nearest ones.
    """
    bundled = bundled_configs()
    for candidate in (Path(name).expanduser(), Path(f"{name}.yaml").expanduser()):
        for place in (beside / candidate if beside is not None else candidate, candidate):
            if place.is_file():
                return place
        if candidate.as_posix() in bundled:
            return bundled[candidate.as_posix()]
    raise no_config("config", name, bundled, "--config")


def resolve_folder(name: str) -> Path:
    """Find a folder of configs.

    Args:
        name: A path, or the name of a shipped folder.

    Raises:
        ConfigError: It is in neither place; the message names the nearest ones.
    """
    bundled, folder = bundled_folders(), Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.as_posix() in bundled:
        return bundled[folder.as_posix()]
    raise no_config("folder of configs", name, bundled, "covr sweep")


def no_config(kind: str, name: str, bundled: dict[str, Path], option: str) -> ConfigError:
    """The error of a name that leads nowhere."""
    by_stem = {Path(path).stem: path for path in bundled}
    if kind == "config" and Path(name).name == "config.yaml":  # a run's own
        return ConfigError(f"{name} ({option}) is no file: there is no such run in {Path.cwd()}.")
    if kind == "config" and Path(name).as_posix() in bundled_folders():
        inside = [one for one in bundled if one.startswith(f"{Path(name).as_posix()}/")]
        return ConfigError(
            f"{name} is a folder of configs ({option}): give one of {', '.join(inside)}, or run all by `covr sweep "
            f"{name}`."
        )
    near = [by_stem[stem] for stem in difflib.get_close_matches(Path(name).stem, by_stem, n=3, cutoff=0.6)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return ConfigError(
        f"No {kind} {name!r} in {Path.cwd()} or among the shipped ones ({option}): {hint}"
        "`covr configs` lists those that are shipped."
    )


def with_bases(path: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """A config behind the configs it builds on (its top-level key ``base``: a name or a list of names), theirs first.

    A base is looked for beside the config, then as :func:`resolve` does.

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
    found = list[Path]()
    for name in names:
        try:
            base_path = resolve(name, path.parent)
        except ConfigError as error:
            raise ConfigError(f"In {path} (YAML key base): {error}") from error
        found += with_bases(base_path, (*above, path.resolve()))
    return [*found, path]


def read_config(value: str) -> dict[str, Any]:
    """The keys of a config as :func:`resolve_arguments` hands it on: a path, or YAML text, which has several lines."""
    text = value if "\n" in value else Path(value).read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    return content if isinstance(content, dict) else {}


def resolve_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """Replace the value of every ``--config`` (``-c``) by the path it leads to, behind the configs it builds on.

    A base that an earlier config built on already is not applied again: it would undo what came after it.

    A YAML may have a mapping at ``trainer.callbacks`` instead of a list. It changes the last callback of the list so
    far, as ``--trainer.callbacks.KEY`` does on the command line, and is handed on as such arguments.

    Args:
        argv: Command line arguments.

    Returns:
        The arguments, and the stems of the configs named.

    Raises:
        ConfigError: A config is in no known place, or no YAML.
    """
    out: list[str] = []
    stems: list[str] = []
    applied: set[Path] = set()
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
        *bases, own = with_bases(path)
        for base in bases:
            if base.resolve() not in applied:  # two bases of one config may build on a third
                out += _as_arguments(base)
                applied.add(base.resolve())
        out += _as_arguments(own)
        applied.add(own.resolve())
    return _with_negative_numbers(out), stems


def _with_negative_numbers(arguments: list[str]) -> list[str]:
    """A flag and a value such as -1e-3, which argparse would take for another flag, as one argument."""
    out: list[str] = []
    for argument in arguments:
        if _NEGATIVE.fullmatch(argument) and out and out[-1].startswith("--") and "=" not in out[-1]:
            out[-1] += f"={argument}"
        else:
            out.append(argument)
    return out


def _as_arguments(path: Path) -> list[str]:
    """A config as ``--config``, with a mapping at ``trainer.callbacks`` behind it, key by key."""
    trainer = read_config(str(path)).get("trainer")
    changes = trainer.get("callbacks") if isinstance(trainer, dict) else None
    if not isinstance(changes, dict):
        return ["--config", str(path)]
    # Nodes keep how each value is written: a plain 1e-3 is a number to the parser, and text to YAML 1.1.
    root: Any = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    trainer_node = next(value for key, value in root.value if key.value == "trainer")
    trainer_node.value = [(key, value) for key, value in trainer_node.value if key.value != "callbacks"]
    rest = yaml.serialize(root, Dumper=yaml.SafeDumper) + "\n"
    return ["--config", rest, *(part for setting in _flat("--trainer.callbacks", changes) for part in setting)]


def _flat(flag: str, value: Any) -> Iterator[tuple[str, str]]:
    """Keys below `flag` as flags with their values; a class comes before its arguments."""
    if not isinstance(value, dict):
        yield flag, value if isinstance(value, str) else json.dumps(value)
        return
    if "class_path" in value:
        yield flag, value["class_path"]
    for key, below in value.items():
        if key == "init_args":
            yield from _flat(flag, below)
        elif key != "class_path":
            yield from _flat(f"{flag}.{key}", below)
