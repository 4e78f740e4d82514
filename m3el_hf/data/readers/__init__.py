"""One file a raw format: how it is read into records, and what is to be said of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from m3el_hf.data.readers import m3el, melbench, mimic, mini, wikidiverse
from m3el_hf.data.schema import Reader, Report
from m3el_hf.errors import M3ELError

READERS: dict[str, Reader] = {
    "m3el": m3el.M3EL,
    "mimic": mimic.MIMIC,
    "melbench": melbench.MELBENCH,
    "wikidiverse": wikidiverse.WIKIDIVERSE,
    "wikidiverse-candidates": wikidiverse.WIKIDIVERSE_CANDIDATES,
    "mini": mini.MINI,
}


def get_reader(name: str) -> Reader:
    """Looks a reader up by name. What it raises for a folder of another format also says how to read that folder.

    Raises:
        M3ELError: If there is no such reader.
    """
    if name not in READERS:
        raise M3ELError(f"unknown reader {name!r}: choose one of {', '.join(READERS)}")
    reader = READERS[name]
    entities = reader.entities and partial(_read, reader.entities, reader)
    return replace(reader, records=partial(_read, reader.records, reader), entities=entities)


def _read(
    read: Callable[..., Iterator[Any]], reader: Reader, folder: Path | None, report: Report, **options: Any
) -> Iterator[Any]:
    try:
        yield from read(folder, report, **options)
    except M3ELError as error:
        raise M3ELError(f"{error}{_advice(reader, folder)}") from error


def _advice(reader: Reader, folder: Path | None) -> str:
    """What to do about a folder that a reader does not recognise; empty where it does, or where nothing is known."""
    if folder is None or not folder.is_dir() or reader.recognises is None or reader.recognises(folder):
        return ""
    if fitting := [name for name, one in READERS.items() if one.recognises and one.recognises(folder)]:
        titles = " or ".join(READERS[name].title for name in fitting)
        return f"; it looks like {titles}: pass --reader {' or '.join(fitting)}"
    if lines := sorted(path.stem for path in folder.glob("*.jsonl")):
        return f"; rename {lines[0]}.jsonl to {lines[0]}.json: JSON lines are read from .json files"
    return ""
