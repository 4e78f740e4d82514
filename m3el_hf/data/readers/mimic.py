"""WikiMEL, RichpediaMEL and WikiDiverse as cleaned for MIMIC: a knowledge base with pictures, and mentions of it.

A folder holds one of the three: ``kb_entity.json``, ``<set>_train.json``, ``<set>_dev.json``, ``<set>_test.json``, and
pictures in ``kb_image/`` and ``mention_image/`` (or ``mention_images/``). ``qid2id.json`` follows from the knowledge
base and is not needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from m3el_hf.data.readers import works
from m3el_hf.data.readers.fields import (
    UnusableRowError,
    check_folder,
    check_text,
    find_path_flaw,
    get_fields,
    get_text,
    name_answer,
    note_unread,
    read_row,
    skip_entity,
)
from m3el_hf.data.readers.parsing import parse_elements
from m3el_hf.data.schema import Entity, Picture, Reader, Record, Report
from m3el_hf.errors import M3ELError

_FILE_NAME = re.compile(r"(wikimel|richpediamel|wiki_?diverse)_(train|dev|test)\.json", re.IGNORECASE)
_SETS = {"wikimel": "WikiMEL", "richpediamel": "RichpediaMEL", "wikidiverse": "WikiDiverse"}
_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_ENTITIES = "kb_entity.json"
_HOLDING = f"{_ENTITIES} and the <set>_train.json, <set>_dev.json and <set>_test.json of one set"
_FIELDS = frozenset({"id", "sentence", "mentions", "entities", "imgPath", "answer"})
_ENTITY_FIELDS = frozenset({"id", "qid", "entity_name", "desc", "attr", "image_list", "type"})


def read_mimic(folder: Path | None, report: Report) -> Iterator[Record]:
    """Yields the mentions of a set, in the order train, validation, test and row.

    A mention whose gold is ``nil`` is kept as `NIL`. One whose gold the knowledge base lacks is kept, too. The ids hold
    the rows' numbers, as the sets' own ids may hold the gold's Qid.

    Args:
        folder: The folder that holds the set.
        report: Counts what is read and lists what is skipped.

    Raises:
        M3ELError: If the folder does not exist, holds mentions of no set or of several, or one cannot be parsed at all.
    """
    folder = check_folder(folder, _HOLDING)
    name, files = _mention_files(folder, report)
    report.title = f"{name} (cleaned for MIMIC)" if name == "WikiDiverse" else name  # which is read as released, too
    for split, path in files.items():
        for row, mention in parse_elements(path, report):
            place, id_ = f"{path.name} row {row}", f"{name}-{split}-{row}"
            yield from read_row(partial(_record, mention, folder, split, id_, place, report), report, place)


def read_mimic_entities(folder: Path | None, report: Report) -> Iterator[Entity]:
    """Yields the knowledge base of a set, in its order; of entities with one Qid the first.

    Of an entity's pictures the first that is there is kept, or the first of all where none is; the others are counted.

    Args:
        folder: The folder that holds the set.
        report: Counts what is read and lists what is skipped.

    Raises:
        M3ELError: If the folder does not exist, holds no knowledge base, or that cannot be parsed at all.
    """
    folder = check_folder(folder, _HOLDING)
    for entity, files in _entities(folder, report):
        report.entities_read += 1
        if len(files) > 1:
            report.counts["further pictures of entities, not stored"] += len(files) - 1
        yield replace(entity, picture=_choose_picture(files, folder))


def _recognises(folder: Path) -> bool:
    return any(path.name == _ENTITIES or _FILE_NAME.fullmatch(path.name) for path in folder.iterdir())


def _mention_files(folder: Path, report: Report) -> tuple[str, dict[str, Path]]:
    """Returns the set's name and its file of each split."""
    files: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := _FILE_NAME.fullmatch(path.name):
            splits = files.setdefault(_SETS[match[1].lower().replace("_", "")], {})
            split = _SPLITS[match[2].lower()]
            if split in splits:
                raise M3ELError(f"{folder} holds {splits[split].name} and {path.name}: keep only one of them")
            splits[split] = path
    if not files:
        raise M3ELError(
            f"{folder} holds no mentions: expected {_HOLDING}, where <set> is WIKIMEL, RichpediaMEL or WikiDiverse"
        )
    if len(files) > 1:
        raise M3ELError(f"{folder} holds {' and '.join(files)}: put each into a folder of its own")
    ((name, splits),) = files.items()
    note_unread(
        folder,
        {*splits.values(), folder / _ENTITIES, folder / "qid2id.json"},
        report,
        f"it is not a file of {name}",
    )
    for file, split in _SPLITS.items():
        if split not in splits:
            report.counts[f"{name} has no {split} split here: no file ends in _{file}.json"] += 1
    return name, {split: splits[split] for split in _SPLITS.values() if split in splits}


def _entities(folder: Path, report: Report) -> Iterator[tuple[Entity, list[str]]]:
    """Yields each usable entity, still without a picture, and the names of its pictures; the others are reported."""
    path = folder / _ENTITIES
    if not path.exists():
        raise M3ELError(f"{folder} holds no {_ENTITIES}: expected {_HOLDING}")
    seen: set[str] = set()
    for row, item in parse_elements(path, report, skip_entity):
        try:
            fields = get_fields(item, _ENTITY_FIELDS, report, "entity field")
            entity, files = _entity(fields), _picture_files(fields)
            if entity.qid in seen:
                raise UnusableRowError(f"repeats the Qid {entity.qid}")
        except UnusableRowError as reason:
            skip_entity(report, f"{path.name} row {row}", reason)
            continue
        seen.add(entity.qid)
        yield entity, files


def _entity(fields: dict[str, Any]) -> Entity:
    qid = get_text(fields, "qid")
    if qid is None:
        raise UnusableRowError("has no Qid (field qid)")
    name = unquote(get_text(fields, "entity_name") or "").strip()
    description, attributes = get_text(fields, "desc"), get_text(fields, "attr")
    return Entity(qid, name, description or attributes)


def _picture_files(fields: dict[str, Any]) -> list[str]:
    value = fields.get("image_list")
    if value is None or value == "":
        return []
    if not isinstance(value, list | tuple):
        raise UnusableRowError(f"field image_list is of type {type(value).__name__}, not a list")
    return [name for file in value if file is not None and (name := check_text(file, "field image_list"))]


def _choose_picture(files: list[str], folder: Path) -> Picture | None:
    """The first of an entity's pictures that is there; where none is, the first, so that its absence is reported."""
    first = None
    for file in files:
        picture = _picture(Path("kb_image", file), folder)
        if picture.flaw is None and picture.path and os.path.isfile(picture.path):
            return picture
        first = first or picture
    return first


def _picture(part: Path, folder: Path, url: str | None = None) -> Picture:
    return Picture(path=folder / part, url=url, flaw=find_path_flaw(folder / part, folder))


def _record(item: Any, folder: Path, split: str, id_: str, source: str, report: Report) -> Record:
    fields = get_fields(item, _FIELDS, report)
    mention = unquote(get_text(fields, "mentions") or "").strip()
    if not mention:
        raise UnusableRowError("has no mention name (field mentions)")
    answer = get_text(fields, "answer")
    if answer is None:
        raise UnusableRowError("has no gold (field answer)")
    image = get_text(fields, "imgPath")
    return Record(
        id=id_,
        source=source,
        topic=None,
        split=split,
        mention=mention,
        context=get_text(fields, "sentence"),
        picture=None if image is None else _mention_picture(image, folder),
        answer_qid=name_answer(answer),
        candidates=(),
    )


def _mention_picture(image: str, folder: Path) -> Picture:
    """The file of a mention's picture: all were made JPEGs, named by what stands before the first dot."""
    url = image if image.startswith(("http://", "https://")) else None
    part = "mention_images" if (folder / "mention_images").is_dir() else "mention_image"
    return _picture(Path(part, image.rsplit("/", 1)[-1].split(".", 1)[0] + ".jpg"), folder, url)


MIMIC = Reader(
    title="WikiMEL, RichpediaMEL or WikiDiverse, cleaned for MIMIC",
    records=read_mimic,
    entities=read_mimic_entities,
    recognises=_recognises,
    about="""One of the three sets that were cleaned for [MIMIC](https://github.com/pengfei-luo/MIMIC) and serve its
successors: mentions of Wikidata entities in sentences with pictures, and a knowledge base with descriptions and
pictures, every entity of which is a candidate. WikiMEL and RichpediaMEL come from
[MELBench](https://github.com/seukgcode/MELBench), WikiDiverse from
[its own repository](https://github.com/wangxw5/wikiDiverse).""",
    caveats="""The sets share sentences and pictures between their splits: in WikiMEL 983 pairs of both stand in train
and in test. A mention's picture may also be one of the gold's. Names, sentences and pictures come from Wikipedia,
Wikidata and Wikinews and lean towards what these cover well: English, recent, Western, male.""",
    licence="""The cleaned sets state no licence here: check the source before redistributing. Of what they were made
from, MELBench states MIT and WikiDiverse CC BY-SA 4.0. The pictures' own licences are not stated.""",
    citations=(works.MIMIC, works.MELBENCH, works.WIKIDIVERSE),
)
