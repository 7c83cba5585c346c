"""Wrong keys and values, from a YAML or the command line, in one sentence each.

jsonargparse tells what is wrong as a tree of indented lines: the keys on the way down, and a branch for each type that
it tried. Types are tried in the order of the annotation, so the first leaf of the tree is what the user meant.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import pydoc
import re
import traceback
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from covr_lightning.errors import ConfigError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

#: Arguments that the command line fills in itself (the links in training.py).
FILLED_IN = ("spec", "vlm")
#: Packages that export the classes a YAML may name.
PACKAGES = ("agent", "callbacks", "data", "envs", "finetune", "vlm")

_KEY = re.compile(r'Parser key "(.+?)"(?: element \d+)?:')
_SUBTYPES = re.compile(r"Subtypes: (.+)")
_CLASS = re.compile(r"Problem with given class_path '(.+)':")
_GIVEN = re.compile(r"Given value: (.*)")
_BETWEEN = re.compile(r"|Does not validate against any of the Union subtypes|Errors:|Expected a path but .*")
_PIECE = "if it is a piece to add to another one, put that before it (--config road_hw.yaml --config PIECE.yaml)"
# The leaves.
_NOT_OF_THE_PARSER = re.compile(r"Subcommand '.+' does not accept option '(.+)'|unrecognized arguments: --([\w.]+).*")
_NOT_OF_THE_CLASS = re.compile(r"Option '(.+)' is not accepted")
_ABSTRACT = re.compile(r"Expected an instantiatable class, but (?:(\S+) )?is abstract")
_CLASS_PATH = re.compile(r".*class_path['\"]?[:=] ?['\"]([\w.]+)['\"].*")
_NO_VALUE = re.compile(r"argument --([\w.]+)(?:/\S+)?: expected one argument")
_NO_MAPPING = re.compile(r"'(\w+)' object has no attribute 'keys'")
_MISSING = re.compile(r"the following arguments are required: (.+)")
_VALUE = re.compile(r"Expected an? (.+)\. Got value: (.*)")
_TYPE = re.compile(r"Expected an? (<class '.+'>|typing\..+|tuple with .+)")
_NO_CLASS = re.compile(r"module '.*' has no attribute .*|No module named .*")
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_NO_CLASS_PATH = re.compile(r"Expected a dot import path string: (.*)")
_OTHER_CLASS = re.compile(r"Import path (?:(\S+) )?does not correspond to a subclass of (\w+)")
_NO_SUBCLASS = re.compile(r"Not a valid subclass of (\w+)(?:\. Got value: .*)?")


def check_syntax(path: Path) -> None:
    """Check that a config is YAML and has keys, none of them twice in one place.

    Raises:
        ConfigError: It is not, or it has one twice; the message names file and line.
    """
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"The config {path} is no YAML{where}: {error.problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The config {path} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"The config {path} has no keys; a config has keys such as data, model, trainer and vlm.")
    _check_keys(path, node)


def _check_keys(path: Path, node: yaml.Node) -> None:
    """Refuse a key that stands twice in one mapping, of which YAML would take the last."""
    if isinstance(node, yaml.SequenceNode):
        for element in node.value:
            _check_keys(path, element)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines and name != "<<":
            raise ConfigError(
                f"The config {path} has the key {name} twice in one place, in lines {lines[name]} and {line}; put both "
                "under one."
            )
        lines[name] = line
        _check_keys(path, value)


def one_sentence(message: str, parser: ArgumentParser) -> str:
    """What is wrong, in one sentence.

    Args:
        message: jsonargparse's.
        parser: The subcommand's parser, for its keys.

    Returns:
        The sentence, or the message as it is where its shape is unknown.
    """
    lines = [line.strip().removeprefix("- ") for line in message.strip().splitlines()]
    keys: list[str] = []
    owner, expected = "", ""  # the class whose argument the last key is, and what jsonargparse says it should be
    for number, line in enumerate(lines):
        key = ".".join(keys)
        if found := _KEY.fullmatch(line):
            keys.append(found[1])
            expected = _annotation(owner, found[1])
        elif found := _SUBTYPES.fullmatch(line):
            expected = found[1]
        elif found := _CLASS.fullmatch(line):
            owner = found[1]
        elif (found := _NOT_OF_THE_PARSER.fullmatch(line)) and owner:
            return _no_key_of_the_class(key, found[1] or found[2], owner)
        elif found := _NOT_OF_THE_PARSER.fullmatch(line):
            return _no_key_of_the_parser(found[1] or found[2], parser)
        elif found := _NOT_OF_THE_CLASS.fullmatch(line):
            return _no_key_of_the_class(key, found[1], owner)
        elif found := _ABSTRACT.fullmatch(line):
            given = found[1] or _CLASS_PATH.sub(r"\1", _branches(lines[number:])[1])
            return _abstract(key, given)
        elif found := _NO_VALUE.fullmatch(line):
            return f"--{found[1]}, or a key below it, is given without a value."
        elif (found := _NO_MAPPING.fullmatch(line)) and keys:
            return f"{key}.init_args is {_phrase(found[1])}; it must have keys with their values."
        elif (found := _MISSING.fullmatch(line)) and not owner:
            missing = [name.split(".")[-1] for name in found[1].split(", ")]
            return f"The config has no {' and no '.join(missing)}; {_PIECE}."
        elif found := _MISSING.fullmatch(line):
            return f"{key} lacks what {_last(owner)} needs: {found[1]}."
        elif found := _VALUE.fullmatch(line):
            return _wrong_value(key, found[2], [found[1]], expected)
        elif _TYPE.fullmatch(line):
            kinds, value = _branches(lines[number:])
            return _wrong_value(key, value, kinds, expected)
        elif _NO_CLASS.fullmatch(line):
            return _no_class(key, owner, expected)
        elif found := _NO_CLASS_PATH.fullmatch(line):
            return _no_class(key, found[1], expected)
        elif found := _OTHER_CLASS.fullmatch(line):
            given = found[1] or _branches(lines[number:])[1]
            return f"{key} is {_quoted(given)}, which is no {found[2]}; this package has {_list(found[2])}."
        elif found := _NO_SUBCLASS.fullmatch(line):
            return f"{key} needs the class_path of a kind of {found[1]}; this package has {_list(found[1])}."
        elif keys and not _BETWEEN.fullmatch(line):
            given = _CLASS_PATH.sub(r"\1", _branches(lines[number:])[1])
            failed = _import_error(given)
            return f"{key} is {_quoted(given)}, but {failed}." if failed else f"{key}: {line}."
    return message.strip()


def check_nulls(config: Namespace) -> None:
    """Refuse null for an argument that is never null: jsonargparse takes it right below `model`, `data` and `vlm`.

    Args:
        config: A subcommand's.

    Raises:
        ConfigError: One is null, such as that of a key without a value.
    """
    for key in ("model", "data"):
        _check_nulls_of(key, config[key].class_path, config[key].init_args)
    _check_nulls_of("vlm", "covr_lightning.vlm.VLM", config.vlm)


def _check_nulls_of(key: str, path: str, given: Namespace) -> None:
    for name, parameter in _signature(path).items():
        if name in FILLED_IN or given.get(name, 0) is not None or parameter.default is None:
            continue
        kinds = _kinds(path, name)
        if not any(may in kind for kind in kinds for may in ("None", "Any", "inspect._empty")):
            raise ConfigError(_wrong_value(f"{key}.{name}", "None", kinds, ""))


def _kinds(path: str, argument: str) -> list[str]:
    """The types that an argument can be of, as jsonargparse writes them."""
    try:
        hint = typing.get_type_hints(getattr(pydoc.locate(path), "__init__"))[argument]  # noqa: B009
    except (NameError, KeyError):  # imported for type checkers alone, or not said
        return _annotation(path, argument).split(" | ")
    several = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return [str(kind) for kind in (typing.get_args(hint) if several else [hint])]


def _no_key_of_the_parser(key: str, parser: ArgumentParser) -> str:
    """For keys outside `model` and `data`, which the parser knows without any class, e.g. trainer.devicess."""
    known = [action.dest for action in parser._actions if action.dest not in ("help", "config", "print_config")]
    group: list[str] = []
    for part in key.split("."):
        prefix = "".join(f"{name}." for name in group)
        names = list(dict.fromkeys(k.removeprefix(prefix).split(".")[0] for k in known if k.startswith(prefix)))
        if part not in names:
            hint, keys = _did_you_mean(part, names), ", ".join(names)
            if not group:
                return f"{part} is no key{hint}; the keys are {keys}."
            return f"{prefix}{part} is no key of {'.'.join(group)}{hint}; its keys are {keys}."
        group.append(part)
    return f"{key} is no key that can be set."


def _no_key_of_the_class(key: str, option: str, owner: str) -> str:
    names = _arguments(owner)
    if not names:
        return f"{key} gives keys to a class of a config before it, but there is none; {_PIECE}."
    first = option.split(".")[0]
    wrong = option if first in names else first
    hint = _did_you_mean(wrong, names)
    return f"{key}.{wrong} is no key of {_last(owner)}{hint}; its keys are {', '.join(names)}."


def _wrong_value(key: str, value: str, kinds: Sequence[str], expected: str) -> str:
    phrases = list(dict.fromkeys(_phrase(kind) for kind in kinds))
    must = " or ".join(phrases)
    if re.match(r"(tuple|list|Sequence)\[", expected) and not phrases[0].startswith(("a list", "a tuple")):
        return f"{key} holds {_quoted(value)}; each of its elements must be {must}."
    return f"{key} is {_quoted(value)}; it must be {must}."


def _no_class(key: str, given: str, expected: str) -> str:
    """For a class path that leads nowhere, or for something else where a class is wanted."""
    for path in re.findall(r"\w+(?:\.\w+)+", expected):
        if dataclasses.is_dataclass(pydoc.locate(path)):
            return f"{key} is {_quoted(given)}; it must have keys of {_last(path)}: {', '.join(_arguments(path))}."
    if failed := _import_error(given):
        return f"{key} is {_quoted(given)}, but {failed}."
    by_name = {_last(path): path for path in _classes(expected)}
    if not by_name:
        return f"{key} is {_quoted(given)}, which is no class; it must be a full path, such as package.module.Class."
    near = difflib.get_close_matches(_last(given), by_name, n=1, cutoff=0.5)
    hint = f" (did you mean {by_name[near[0]]}?)" if near else ""
    return f"{key} is {_quoted(given)}, which is no class{hint}; this package has {', '.join(by_name.values())}."


def _abstract(key: str, given: str) -> str:
    """For one of the package's kinds of parts, or a class of somebody's own that is no whole part yet."""
    kind = pydoc.locate(given)
    if inspect.isclass(kind) and not kind.__module__.startswith("covr_lightning."):
        open_methods = sorted(vars(kind)["__abstractmethods__"])
        return f"{key} is {given}, which has yet to define {', '.join(open_methods)}."
    return f"{key} needs the class_path of a kind of {_last(given)}; this package has {_list(_last(given))}."


def _import_error(path: str) -> str:
    """Why a class's module cannot be imported; nothing if it can, or is not there."""
    if not _PATH.fullmatch(path):
        return ""
    module = path.rpartition(".")[0]
    try:
        importlib.import_module(module)
    except ImportError as error:
        if f"{module}.".startswith(f"{error.name}."):  # the module itself, or a package that it should be in
            return ""
        return f"the import of {module} failed: {error}"
    except Exception as error:  # whatever somebody's own module does when it is run
        return f"the import of {module} failed: {error}{_place(error)}"
    return ""


def _place(error: Exception) -> str:
    """Where an error was raised; nothing for wrong syntax, whose text tells it."""
    if isinstance(error, SyntaxError):
        return ""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({Path(last.filename).name}, line {last.lineno})"


def _branches(lines: Iterable[str]) -> tuple[list[str], str]:
    """The types that were tried for one value, and the value, which stands below them."""
    kinds: list[str] = []
    for line in lines:
        if found := _GIVEN.fullmatch(line):
            return kinds, found[1]
        if found := _TYPE.fullmatch(line):
            kinds.append(found[1])
    return kinds, ""


def _classes(expected: str) -> list[str]:
    """Paths of the exported, concrete classes that are one of the types named in a text such as an annotation."""
    wanted = set(re.findall(r"\w+", expected)) - {"object"}
    paths = []
    for package in PACKAGES:
        module = importlib.import_module(f"covr_lightning.{package}")
        for name in module.__all__:
            thing = getattr(module, name)
            if not inspect.isclass(thing) or inspect.isabstract(thing):
                continue
            if wanted & {base.__name__ for base in thing.__mro__}:
                paths.append(f"{module.__name__}.{name}")
    return paths


def _list(expected: str) -> str:
    return ", ".join(_classes(expected)) or "none"


def _arguments(path: str) -> list[str]:
    """The keys that a class has in a YAML."""
    return [name for name in _signature(path) if name not in FILLED_IN]


def _annotation(path: str, argument: str) -> str:
    parameter = _signature(path).get(argument)
    return "" if parameter is None else str(parameter.annotation)


def _signature(path: str) -> Mapping[str, inspect.Parameter]:
    thing = pydoc.locate(path) if path else None
    return inspect.signature(thing).parameters if callable(thing) else {}


def _did_you_mean(word: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, names, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _last(path: str) -> str:
    return path.split(".")[-1]


def _phrase(kind: str) -> str:
    """A type as jsonargparse writes it, in words."""
    if kind.startswith("typing.Literal["):
        return kind.removeprefix("typing.Literal[").removesuffix("]").replace(", ", " or ")
    name = _last(kind.removeprefix("<class '").removesuffix("'>")) if kind.startswith("<class") else kind
    if name == "NoneType":
        return "null"
    name = {"Sequence": "list"}.get(name, name)
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _quoted(value: str) -> str:
    """A value as one would write it: words in quotes, numbers and lists without."""
    plain = re.fullmatch(r"-?[\d.]+(e-?\d+)?|[\[{(].*|True|False", value)
    return "null" if value == "None" else value if plain else repr(value)
