"""The release format of M³EL (arXiv 2410.18096), re-released as DiffMEL with a `difficulty` field.

A folder of ``<topic>.json`` or ``<topic>_<split>.json`` files, each JSON, JSON lines or Python literals, beside
``<topic>_candidates_images/`` folders. The release gives no ids, and a mention's own name is the gold's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from m3el_hf.data.readers import works
from m3el_hf.data.readers.fields import (
    UnusableRowError,
    check_folder,
    check_text,
    find_path_flaw,
    get_fields,
    get_text,
    note_unread,
    read_row,
)
from m3el_hf.data.readers.parsing import parse_elements
from m3el_hf.data.schema import SPLITS, Entity, Picture, Reader, Record, Report
from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TOPICS

_SPLITS = {split: split for split in SPLITS} | {"dev": "validation", "val": "validation"}
_FILE_NAME = re.compile(rf"({'|'.join(TOPICS)})(?:_({'|'.join(_SPLITS)}))?\.json")
_FIELDS = frozenset({"Qid", "name", "description", "sentence", "image", "candidates", "difficulty"})
"""The fields of an instance; its description is that of the gold, which stands among the candidates."""

_CANDIDATE_FIELDS = frozenset({"Qid", "name", "description", "image"})


def read_m3el(folder: Path | None, report: Report) -> Iterator[Record]:
    """Yields the instances of a release folder, in the order of file name and row.

    An instance that cannot be used (no gold, gold not among its candidates, a field missing) is skipped and reported
    with its file, row and reason.

    Args:
        folder: The folder that holds the topic files.
        report: Counts what is read and lists what is skipped.

    Raises:
        M3ELError: If the folder does not exist, holds no topic file, or a file cannot be parsed at all.
    """
    folder = check_folder(folder, "the release's <topic>.json files")
    for path, topic, split in _topic_files(folder, report):
        for number, instance in parse_elements(path, report):
            place, id_ = f"{path.name} row {number}", f"{path.stem}-{number}"
            yield from read_row(partial(_record, instance, folder, topic, split, id_, place, report), report, place)


def _recognises(folder: Path) -> bool:
    return any(_FILE_NAME.fullmatch(path.name) for path in folder.iterdir())


def _topic_files(folder: Path, report: Report) -> list[tuple[Path, str, str | None]]:
    files = [
        (path, match[1], _SPLITS[match[2]] if match[2] else None)
        for path in sorted(folder.iterdir())
        if (match := _FILE_NAME.fullmatch(path.name))
    ]
    known = {path for path, _, _ in files}
    note_unread(folder, known, report, "its name is not <topic>.json or <topic>_<split>.json")
    if not files:
        raise M3ELError(
            f"{folder} holds no M3EL file: expected <topic>.json or <topic>_<split>.json with a topic of "
            f"{', '.join(TOPICS)} and a split of {', '.join(SPLITS)}"
        )
    return files


def _record(
    instance: Any, folder: Path, topic: str, split: str | None, id_: str, source: str, report: Report
) -> Record:
    fields = get_fields(instance, _FIELDS, report)
    qid, mention, _ = (get_text(fields, key) for key in ("Qid", "name", "description"))  # not read, yet to be text
    if qid is None:
        raise UnusableRowError("has no gold (field Qid)")
    if mention is None:
        raise UnusableRowError("has no mention name (field name)")
    candidates = _candidates(fields.get("candidates"), folder, report)
    if qid not in {candidate.qid for candidate in candidates}:
        raise UnusableRowError(f"its gold {qid} is not among its candidates")
    return Record(
        id=id_,
        source=source,
        topic=topic,
        split=split,
        mention=mention,
        context=get_text(fields, "sentence"),
        picture=_picture(fields.get("image"), folder),
        answer_qid=qid,
        candidates=candidates,
        difficulty=get_text(fields, "difficulty", integer=True),
    )


def _candidates(items: Any, folder: Path, report: Report) -> tuple[Entity, ...]:
    if not isinstance(items, list | tuple) or not items:
        raise UnusableRowError("has no candidates")
    candidates = []
    for place, item in enumerate(items):
        try:
            candidates.append(_candidate(item, folder, report))
        except UnusableRowError as reason:
            raise UnusableRowError(f"candidate {place}: {reason}") from None
    if len({candidate.qid for candidate in candidates}) < len(candidates):
        raise UnusableRowError("lists a candidate twice")
    return tuple(candidates)


def _candidate(item: Any, folder: Path, report: Report) -> Entity:
    fields = get_fields(item, _CANDIDATE_FIELDS, report, "candidate field")
    qid = get_text(fields, "Qid")
    if qid is None:
        raise UnusableRowError("has no Qid")
    picture = _picture(fields.get("image"), folder)
    return Entity(qid, get_text(fields, "name") or "", get_text(fields, "description"), picture)


def _picture(value: Any, folder: Path) -> Picture | None:
    """Turns ``[file name, url, /ROOT/path]`` into a picture; None where all of it is empty."""
    if value is None or value == "":
        return None
    if not isinstance(value, list | tuple):
        raise UnusableRowError(f"field image is of type {type(value).__name__}, not [file name, url, path]")
    parts = [None if part is None else check_text(part, "field image") or None for part in value[:3]]
    file, url, location = parts + [None] * (3 - len(parts))
    if not any((file, url, location)):
        return None
    place = Path((location or "").lstrip("/")).parts[1:]  # the root, /M3EL/ or /DiffMEL/, is the folder
    if not place:
        return Picture(path=None if url else Path(location or file or ""), url=url, flaw="has no path")
    path = folder.joinpath(*place)
    return Picture(path=path, url=url, flaw=find_path_flaw(path, folder))


M3EL = Reader(
    title="M³EL",
    records=read_m3el,
    recognises=_recognises,
    about="""The data is in the release format of M³EL, the dataset of
[arXiv 2410.18096](https://arxiv.org/abs/2410.18096): mentions of up to five topics (movies, common, person, books,
sports), each with its candidates, for nine linking tasks between text and picture. The published release has 79,625
mentions; DiffMEL is a re-release of it with a difficulty. M3EL, the matching network of
[arXiv 2412.10440](https://arxiv.org/abs/2412.10440), is another work that shares the name.""",
    caveats="""In the published sample of M³EL the mention's picture is the gold's own file, its name is the gold's
name, and the gold comes first among the candidates. Names, sentences and pictures were gathered automatically from
Wikidata, Wikipedia and Wikimedia Commons and lean towards what these cover well: English, recent, Western, male.""",
    licence="""The format has no place for a licence, and the release of M³EL states none, neither for its texts nor for
its pictures: ask the authors of the data before you redistribute anything built from it.""",
    citations=(works.M3EL,),
)
