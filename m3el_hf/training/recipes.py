"""A run's settings from a YAML file and from flags: the fields of `RunArguments`, read alike from either."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from m3el_hf.errors import M3ELError, one_line
from m3el_hf.training.arguments import RunArguments, TrainingArguments

TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOTHING = ("none", "null", "~", "")
NOUNS = {int: "a whole number", float: "a number", bool: "true or false"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the YAML file and a flag for each field; what is not given on the command line is not set."""
    parser.add_argument("config", nargs="?", type=Path, help="YAML file of these settings, which flags override")
    for field in _fields():
        flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
        says_something = field.default is not None and field.default is not False and field.default != ""
        options: dict[str, Any] = {
            "help": f"{text} (default: {field.default})" if says_something else text,
            "default": argparse.SUPPRESS,
        }
        if isinstance(field.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            parser.add_argument(flag, type=_parser(field.name), **options)


def run_arguments(options: argparse.Namespace) -> RunArguments:
    """Returns what the flags say and, where they say nothing, what the YAML file says.

    Raises:
        M3ELError: If the file cannot be used, or a value is out of its range.
    """
    flags = {field.name: getattr(options, field.name) for field in _fields() if hasattr(options, field.name)}
    return RunArguments(**(read_recipe(options.config) if options.config else {}) | flags)


def read_recipe(path: Path) -> dict[str, Any]:
    """Returns the fields of `RunArguments` that a YAML file sets.

    All scalars are read as text and then by their field's type, as flags are: YAML itself would make text of ``1e-5``
    and False of ``no``.

    Raises:
        M3ELError: If there is no such file, it is no YAML, or it has a key or a value that is not known.
    """
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except FileNotFoundError:
        raise M3ELError(f"no such file: {path}; pass a YAML file of settings") from None
    except (OSError, UnicodeDecodeError) as error:
        raise M3ELError(f"{path} cannot be read: {one_line(error)}") from error
    except yaml.YAMLError as error:
        raise M3ELError(f"{path} is no YAML: {one_line(error)}") from error
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise M3ELError(f"{path} holds no settings: write lines such as learning_rate: 1e-5")
    values: dict[str, Any] = {}
    for key, value in node.value if node is not None else ():
        place = f"{path}, line {key.start_mark.line + 1}"
        name = key.value if isinstance(key, yaml.ScalarNode) else ""
        if name in values:
            raise M3ELError(f"{place}: {name} is set twice: leave one out")
        values[name] = read_setting(name, value.value if isinstance(value, yaml.ScalarNode) else None, place)
    return values


def read_setting(name: str, text: Any, place: str) -> Any:
    """Returns the value of a setting that stands as text in a file.

    Args:
        name: The setting.
        text: As YAML's base loader has it; anything but text is a list, a mapping or another node.
        place: Where it stands, for the error.

    Raises:
        M3ELError: If there is no such setting, or this is no value of it.
    """
    if name not in RunArguments.defaults():
        raise M3ELError(f"{place}: there is no setting {name!r}{_nearest(name)}")
    if not isinstance(text, str):
        raise M3ELError(f"{place}: {name} is {NOUNS.get(_kind(name)[0], 'text')}, not a list or a mapping")
    try:
        return _parser(name)(text)
    except argparse.ArgumentTypeError as error:
        raise M3ELError(f"{place}: {name} is {error}") from None


def write_recipe(arguments: RunArguments, path: Path) -> None:
    """Writes all settings, so that ``m3el-hf train PATH`` is the same run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(arguments.to_dict(), sort_keys=False), encoding="utf-8")


def _fields() -> Iterator[Field[Any]]:
    """The fields, those that say what is trained on what before those that say how."""
    how = TrainingArguments.defaults()
    return iter(sorted(fields(RunArguments), key=lambda field: field.name in how))


def _kind(name: str) -> tuple[type, bool]:
    """The type of a field's values, and whether it may be None."""
    hint = _HINTS[name]
    kinds = [one for one in get_args(hint) if one is not type(None)]
    return (kinds[0], True) if kinds else (hint, False)


_HINTS: Mapping[str, Any] = get_type_hints(RunArguments)


def _parser(name: str) -> Any:
    """Returns what reads a field's value from text."""
    kind, optional = _kind(name)

    def parse(text: str) -> Any:
        if optional and text.lower() in NOTHING:
            return None
        try:
            return TRUTHS[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(f"{text!r}: give {NOUNS[kind]}") from None

    return parse


def _nearest(name: str) -> str:
    near = get_close_matches(name, RunArguments.defaults(), n=1, cutoff=0.5)
    return f": did you mean {near[0]}?" if near else "; m3el-hf train --help lists all"
