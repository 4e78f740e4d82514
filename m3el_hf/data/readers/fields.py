"""What every reader does with the fields of a row: text, pictures, and reasons for what cannot be used."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from m3el_hf.data.schema import NIL, Report
from m3el_hf.errors import M3ELError

_LONGEST_LINE = 500  # characters of a report's line: it may quote a name of any length


class UnusableRowError(ValueError):
    """Why one instance or entity cannot be used."""


def skip_row(report: Report, place: str, reason: object) -> None:
    """Counts an instance as read and notes why it cannot be used, in one line that any terminal can show."""
    report.read += 1
    report.skipped.append(_line(place, reason))


def skip_entity(report: Report, place: str, reason: object) -> None:
    """The same for an entity of a knowledge base."""
    report.entities_read += 1
    report.entities_skipped.append(_line(place, reason))


def _line(place: str, reason: object) -> str:
    words = " ".join(f"{place}: {reason}".split())
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
        raise M3ELError(f"no folder to read: pass the folder that holds {holding}")
    if not folder.is_dir():
        raise M3ELError(f"no such folder: {folder}; pass the folder that holds {holding}")
    return folder


def note_unread(folder: Path, read: set[Path], report: Report, reason: str) -> None:
    """Counts the JSON files of a folder that are not read, by name."""
    for path in sorted(folder.glob("*.json*")):
        if path not in read:
            report.counts[f"file {path.name} not read: {reason}"] += 1


def check_unicode(text: str, what: str) -> str:
    """Returns ``text``, whatever characters it has.

    Raises:
        UnusableRowError: If it has half a character, as JSON can escape: no Parquet file holds it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableRowError(f"has text that is not Unicode ({what})") from error
    return text


def get_text(fields: dict[str, Any], key: str) -> str | None:
    """Returns a field as text: blanks at its ends are cut off, all other characters are kept as they are.

    Returns:
        The text; None where the field is absent, null or blank.

    Raises:
        UnusableRowError: If it has half a character.
    """
    value = fields.get(key)
    return None if value is None else check_unicode(str(value), f"field {key}").strip() or None


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
        return "has an impossible path"
    root = _resolve(os.path.join(os.getcwd(), folder))
    parent, last = os.path.split(name)
    if last != ".." and not os.path.islink(name) and _is_inside(_resolve(parent), root):
        return None
    return None if _is_inside(os.path.realpath(name), root) else "lies outside the source's folder"


def _is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(os.path.join(root, ""))


@lru_cache(maxsize=4096)  # many pictures stand in one folder, or in one folder a row
def _resolve(folder: str) -> str:
    return os.path.realpath(folder)
