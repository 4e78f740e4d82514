"""MELBench: Wikidata-MEL and Richpedia-MEL, each one file that maps ids to sentences with their mentions.

``Wikidata-MEL.json`` has lists of mentions, entities and answers, one item a mention; ``Richpedia-MEL.json`` has one
mention an entry, as strings. The files name no pictures. All entities that are the answer of some mention are the
knowledge base: there is no other list of them, and nothing but a name to describe them by.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from m3el_hf.data.readers import works
from m3el_hf.data.readers.fields import (
    UnusableRowError,
    check_folder,
    get_fields,
    get_text,
    name_answer,
    note_unread,
    read_row,
    skip_row,
)
from m3el_hf.data.readers.parsing import parse_entries
from m3el_hf.data.schema import NIL, Entity, Reader, Record, Report
from m3el_hf.errors import M3ELError

FILES = ("Richpedia-MEL.json", "Wikidata-MEL.json")

_COLUMNS = ("mentions", "entities", "answer")
_FIELDS = frozenset({"id", "sentence", *_COLUMNS})


def read_melbench(folder: Path | None, report: Report) -> Iterator[Record]:
    """Yields the mentions of either file or both, in the order of file name, entry and mention.

    Args:
        folder: The folder that holds the files.
        report: Counts what is read and lists what is skipped.

    Raises:
        M3ELError: If the folder does not exist, holds neither file, or a file cannot be parsed at all.
    """
    for record, _ in _mentions(folder, report):
        yield record


def read_melbench_entities(folder: Path | None, report: Report) -> Iterator[Entity]:
    """Yields each entity that is some mention's answer, once, in the order of appearance, by its first name.

    Args:
        folder: The folder that holds the files.
        report: Counts the entities.

    Raises:
        M3ELError: As for `read_melbench`.
    """
    names: dict[str, str] = {}
    for record, name in _mentions(folder, Report()):
        if record.answer_qid != NIL and not names.get(record.answer_qid):
            names[record.answer_qid] = name
    for qid, name in names.items():
        report.entities_read += 1
        yield Entity(qid, name)


def _mentions(folder: Path | None, report: Report) -> Iterator[tuple[Record, str]]:
    """Yields each mention's record and its entity's name, which may be empty.

    The ids hold the rows' numbers, as a key of ``Richpedia-MEL.json`` is the gold's Qid.
    """
    for path in _files(check_folder(folder, " or ".join(FILES)), report):
        seen: set[str] = set()
        for row, key, entry in parse_entries(path, report):
            source = f"{path.name} row {row}"
            try:
                if key in seen:
                    raise UnusableRowError(f"repeats the key {key}")
                seen.add(key)
                fields = get_fields(entry, _FIELDS, report)
                columns = _columns(fields)
            except UnusableRowError as reason:
                skip_row(report, source, reason)
                continue
            for k, values in enumerate(zip(*columns, strict=True)):
                found = fields | dict(zip(_COLUMNS, values, strict=True))
                place, id_ = f"{source} mention {k}", f"{path.stem}-{row}-{k}"
                for record in read_row(partial(_record, found, id_, place), report, place):
                    yield record, get_text(found, "entities") or ""


def _recognises(folder: Path) -> bool:
    return any((folder / name).exists() for name in FILES)


def _files(folder: Path, report: Report) -> list[Path]:
    files = [folder / name for name in FILES if (folder / name).exists()]
    if not files:
        raise M3ELError(f"{folder} holds no MELBench file: expected {' or '.join(FILES)}")
    note_unread(folder, set(files), report, f"its name is not {' or '.join(FILES)}")
    return files


def _columns(fields: dict[str, Any]) -> list[list[Any]]:
    """The mentions, entity names and answers of an entry, as lists of one length."""
    values = [fields.get(key) for key in _COLUMNS]
    columns = [list(value) if isinstance(value, list | tuple) else [value] for value in values]
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise UnusableRowError("has {} mentions, {} entities and {} answers".format(*lengths))
    if not lengths[0]:
        raise UnusableRowError("has no mentions")
    return columns


def _record(found: dict[str, Any], id_: str, source: str) -> Record:
    mention, _, answer = (get_text(found, key) for key in _COLUMNS)  # all are text, or the mention is unusable
    if mention is None:
        raise UnusableRowError("has no mention name (field mentions)")
    if answer is None:
        raise UnusableRowError("has no gold (field answer)")
    return Record(
        id=id_,
        source=source,
        topic=None,
        split=None,
        mention=mention,
        context=get_text(found, "sentence"),
        picture=None,
        answer_qid=name_answer(answer),
        candidates=(),
    )


MELBENCH = Reader(
    title="MELBench",
    records=read_melbench,
    entities=read_melbench_entities,
    recognises=_recognises,
    about="""Wikidata-MEL, Richpedia-MEL or both, of [MELBench](https://github.com/seukgcode/MELBench): mentions in
sentences, linked to Wikidata. The files name no pictures and describe no entities; those that are some mention's answer
are the knowledge base.""",
    caveats="""The knowledge base holds only entities that some mention means: linking is easier than among all of
Wikidata. Names and sentences lean towards what Wikipedia covers well: English, recent, Western, male.""",
    licence="MIT, as MELBench states.",
    license_id="mit",
    citations=(works.MELBENCH,),
)
