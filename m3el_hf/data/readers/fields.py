"""What every reader does with a row: its fields, text, pictures, and reasons for what cannot be used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from m3el_hf.data.schema import NIL, Record, Report
from m3el_hf.errors import M3ELError

_LONGEST_LINE = 500  # characters of a report's line: it may quote a name of any length
_MOST_FIELDS = 20  # unknown fields that a report names


class UnusableRowError(ValueError):
    """Why one instance or entity cannot be used."""


def read_row(make: Callable[[], Record], report: Report, place: str) -> Iterator[Record]:
    """Yields the record of a row, or notes why there is none; the row is counted either way.

    Args:
        make: Makes the record; it raises `UnusableRowError` where there can be none.
        report: Counts the row.
        place: The row, for people.
    """
    try:
        record = make()
    except UnusableRowError as reason:
        skip_row(report, place, reason)
        return
    report.read += 1
    if len(record.candidates) == 1:
        report.counts["rows with a single candidate: any model is right"] += 1
    yield record


def skip_row(report: Report, place: str, reason: object) -> None:
    """Counts an instance as read and notes why it cannot be used, in one line that any terminal can show."""
    report.read += 1
    report.skipped.append(_line(f"{place}: {reason}"))


def skip_entity(report: Report, place: str, reason: object) -> None:
    """The same for an entity of a knowledge base."""
    report.entities_read += 1
    report.entities_skipped.append(_line(f"{place}: {reason}"))


def _line(text: str) -> str:
    words = " ".join(text.split())
    shown = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in words)
    return shown if len(shown) <= _LONGEST_LINE else f"{shown[:_LONGEST_LINE]}…"


def check_folder(folder: Path | None, holding: str) -> Path:
    """Returns the folder to read.

    Args:
        folder: What the user passed.
        holding: What it should hold, for the message.

    Raises:
        M3ELError: If it is None or no folder.
    """
    if folder is None:
        raise M3ELError(f"no --input: pass the folder that holds {holding}")
    if folder.is_file():
        raise M3ELError(f"{folder} is a file: pass the folder that holds {holding}")
    if not folder.is_dir():
        raise M3ELError(f"no such folder: {folder}; pass the folder that holds {holding}")
    return folder


def note_unread(folder: Path, read: set[Path], report: Report, reason: str) -> None:
    """Counts the JSON files of a folder that are not read, by name."""
    for path in sorted(folder.glob("*.json*")):
        if path not in read:
            report.counts[f"file {path.name} not read: {reason}"] += 1


def get_fields(row: Any, known: frozenset[str], report: Report, kind: str = "field") -> dict[str, Any]:
    """Returns a row with its fields, and counts by name those that its format does not have.

    Args:
        row: What was parsed.
        known: The fields of the format, read or not.
        report: Counts the other fields; it names only so many, as their names may be data.
        kind: What it calls them.

    Raises:
        UnusableRowError: If the row is not an object.
    """
    if not isinstance(row, dict):
        raise UnusableRowError(f"is of type {type(row).__name__}, not an object")
    for name in row:
        if name not in known:
            line = _line(f"{kind} {repr(name)[:80]} not read")
            named = sum(one.endswith(" not read") for one in report.counts)
            report.counts[line if line in report.counts or named < _MOST_FIELDS else "other fields, not read here"] += 1
    return row


def check_text(value: Any, what: str) -> str:
    """Returns ``value`` if it is text, whatever characters it has.

    Raises:
        UnusableRowError: If it is anything else, or has an unpaired surrogate, as JSON can escape: no Parquet file
            holds that.
    """
    if not isinstance(value, str):
        raise UnusableRowError(f"{what} is of type {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UnusableRowError(f"{what} has an unpaired surrogate (not Unicode)") from error
    return value


def get_text(fields: dict[str, Any], key: str, *, integer: bool = False) -> str | None:
    """Returns a field's text: blanks at its ends are cut off, all other characters are kept as they are.

    Args:
        fields: The fields of a row.
        key: The field's name.
        integer: Whether an integer is taken as text, as offsets and levels are often written as one.

    Returns:
        The text; None where the field is absent, null or blank.

    Raises:
        UnusableRowError: If it is anything else.
    """
    value = fields.get(key)
    if value is None:
        return None
    if integer and type(value) is int:  # True is an int, too
        return str(value)
    return check_text(value, f"field {key}").strip() or None


def name_answer(answer: str) -> str:
    """Returns the gold's id, or `NIL` for however a source writes that there is none."""
    return NIL if answer.upper() == NIL else answer


def find_path_flaw(path: Path, folder: Path) -> str | None:
    """Says why a path that a source names is not to be opened: one that leads out of its folder, by itself or by links.

    Returns:
        The reason, or None. Whether there is such a file is left open.
    """
    name = os.path.join(os.getcwd(), path)
    if "\0" in name:
        return "has a null character in its path"
    root = _root(_resolve(os.path.join(os.getcwd(), folder)))
    parent, last = os.path.split(name)
    if last != ".." and not os.path.islink(name) and _is_inside(_resolve(parent), root):
        return None
    return None if _is_inside(os.path.realpath(name), root) else "lies outside the source's folder"


@lru_cache(maxsize=4)
def _root(folder: str) -> str:
    """The folder that links may not leave; of a snapshot in the Hub's cache, made of links, that of its repository."""
    above = (parent.parent for parent in Path(folder).parents if parent.name == "snapshots")
    return next((str(one) for one in above if (one / "blobs").is_dir()), folder)


def _is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(os.path.join(root, ""))


@lru_cache(maxsize=4096)  # many pictures stand in one folder, or in one folder a row
def _resolve(folder: str) -> str:
    return os.path.realpath(folder)
