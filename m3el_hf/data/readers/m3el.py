"""The release format of M³EL (arXiv 2410.18096), re-released as DiffMEL with a `difficulty` field.

A folder of ``<topic>.json`` or ``<topic>_<split>.json`` files, each JSON, JSON lines or Python literals, beside
``<topic>_candidates_images/`` folders. The release gives no ids, and a mention's own name is the gold's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m3el_hf.data.readers import works
from m3el_hf.data.readers.fields import (
    UnusableRowError,
    check_folder,
    check_unicode,
    find_path_flaw,
    get_text,
    note_unread,
    skip_row,
)
from m3el_hf.data.readers.parsing import parse_elements
from m3el_hf.data.schema import SPLITS, Entity, Picture, Reader, Record, Report
from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TOPICS

_FILE_NAME = re.compile(rf"({'|'.join(TOPICS)})(?:_({'|'.join(SPLITS)}))?\.json")


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
            source = f"{path.name} row {number}"
            try:
                record = _record(instance, folder, topic, split, f"{path.stem}-{number}", source)
            except UnusableRowError as reason:
                skip_row(report, source, reason)
                continue
            report.read += 1
            if len(record.candidates) == 1:
                report.counts["rows with a single candidate: any model is right"] += 1
            yield record


def _topic_files(folder: Path, report: Report) -> list[tuple[Path, str, str | None]]:
    files = [
        (path, match[1], match[2]) for path in sorted(folder.iterdir()) if (match := _FILE_NAME.fullmatch(path.name))
    ]
    known = {path for path, _, _ in files}
    note_unread(folder, known, report, "its name is no <topic>.json or <topic>_<split>.json")
    if not files:
        raise M3ELError(
            f"{folder} holds no M3EL file: expected <topic>.json or <topic>_<split>.json with a topic of "
            f"{', '.join(TOPICS)} and a split of {', '.join(SPLITS)}"
        )
    return files


def _record(instance: Any, folder: Path, topic: str, split: str | None, id_: str, source: str) -> Record:
    if not isinstance(instance, dict):
        raise UnusableRowError(f"is a {type(instance).__name__}, not an object")
    qid = get_text(instance, "Qid")
    if qid is None:
        raise UnusableRowError("has no gold (field Qid)")
    mention = get_text(instance, "name")
    if mention is None:
        raise UnusableRowError("has no mention name (field name)")
    candidates = _candidates(instance, folder)
    if qid not in {candidate.qid for candidate in candidates}:
        raise UnusableRowError(f"its gold {qid} is not among its candidates")
    return Record(
        id=id_,
        source=source,
        topic=topic,
        split=split,
        mention=mention,
        context=get_text(instance, "sentence"),
        picture=_picture(instance.get("image"), folder),
        answer_qid=qid,
        candidates=candidates,
        difficulty=get_text(instance, "difficulty"),
    )


def _candidates(instance: dict[str, Any], folder: Path) -> tuple[Entity, ...]:
    items = instance.get("candidates")
    if not isinstance(items, list | tuple) or not items:
        raise UnusableRowError("has no candidates")
    candidates = []
    for item in items:
        qid = get_text(item, "Qid") if isinstance(item, dict) else None
        if qid is None:
            raise UnusableRowError("has a candidate without a Qid")
        picture = _picture(item.get("image"), folder)
        candidates.append(Entity(qid, get_text(item, "name") or "", get_text(item, "description"), picture))
    if len({candidate.qid for candidate in candidates}) < len(candidates):
        raise UnusableRowError("lists a candidate twice")
    return tuple(candidates)


def _picture(value: Any, folder: Path) -> Picture | None:
    """Turns ``[file name, url, /ROOT/path]`` into a picture; None where all of it is empty."""
    if not value:
        return None
    if not isinstance(value, list | tuple):
        raise UnusableRowError(f"has an image that is a {type(value).__name__}, not [file name, url, path]")
    parts = [check_unicode(str(part), "field image") if part else None for part in value[:3]]
    file, url, location = parts + [None] * (3 - len(parts))
    if location is None:
        return Picture(path=Path(file) if file else None, url=url, flaw="has no path") if file or url else None
    path = folder.joinpath(*Path(location.lstrip("/")).parts[1:])  # the root, /M3EL/ or /DiffMEL/, is the folder
    return Picture(path=path, url=url, flaw=find_path_flaw(path, folder))


M3EL = Reader(
    title="M³EL",
    records=read_m3el,
    about="""M³EL, the dataset of [arXiv 2410.18096](https://arxiv.org/abs/2410.18096): 79,625 mentions of five topics
(movies, common, person, books, sports), each with its candidates, and nine linking tasks between text and picture;
re-released as DiffMEL with a difficulty. M3EL, the matching network of
[arXiv 2412.10440](https://arxiv.org/abs/2412.10440), is another work that shares the name.""",
    licence="""The release states no licence, neither for its texts nor for its pictures: ask its authors before you
redistribute anything built from it.""",
    citation="\n\n".join([works.M3EL, works.MATCHING_NETWORK]),
)
