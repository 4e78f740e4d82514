"""WikiDiverse in its original forms, as JSON lists: passages with their mentions, and mentions with their candidates.

A passage is ``[caption, image url, topic, [[mention, type, start, end, url], ...]]``; a mention with candidates is
``[caption, image url, mention, type, left context, right context, gold url, candidates, topic, start, end]``. Entities
are Wikipedia pages, so their ids here are the pages' addresses. The files name pictures by their addresses; the archive
of downloaded pictures that goes with them is read where it lies beside them, in ``wikinewsImgs/``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from m3el_hf.data.readers import works
from m3el_hf.data.readers.fields import (
    UnusableRowError,
    check_folder,
    check_text,
    get_text,
    name_answer,
    note_unread,
    read_row,
    skip_row,
)
from m3el_hf.data.readers.parsing import parse_elements
from m3el_hf.data.schema import NIL, Entity, Picture, Reader, Record, Report
from m3el_hf.errors import M3ELError

PASSAGE = ("caption", "image", "topic", "mentions")
MENTION = ("mention", "type", "start", "end", "url")
CANDIDATES = ("caption", "image", "mention", "type", "left", "right", "url", "candidates", "topic", "start", "end")
"""The fields of the three kinds of list, in their order."""

_WIKI = "https://en.wikipedia.org/wiki/"
_SPLITS = {"train": "train", "valid": "validation", "validation": "validation", "dev": "validation", "test": "test"}
_HOLDING = "WikiDiverse's .json files"


def read_passages(folder: Path | None, report: Report) -> Iterator[Record]:
    """Yields the mentions of all passages, in the order of file name, passage and mention.

    Args:
        folder: The folder that holds the files.
        report: Counts what is read and lists what is skipped.

    Raises:
        M3ELError: If the folder does not exist, holds no passages, or a file cannot be parsed at all.
    """
    return _with_own_ids(_passage_records(folder, report), report)


def read_passage_entities(folder: Path | None, report: Report) -> Iterator[Entity]:
    """Yields each page that some mention of a passage means, once, in the order of appearance.

    Args:
        folder: The folder that holds the files.
        report: Counts the entities.

    Raises:
        M3ELError: As for `read_passages`.
    """
    golds = dict.fromkeys(record.answer_qid for record in _passage_records(folder, Report()))
    for qid in golds:
        if qid != NIL:
            report.entities_read += 1
            yield _entity(qid)


def read_candidates(folder: Path | None, report: Report) -> Iterator[Record]:
    """Yields the mentions with candidates, in the order of file name and row.

    A candidate that comes twice is kept once. One that is the gold but for hyphens, which the candidates' names may
    lack, counts as the gold. A mention of no entity has no gold among its candidates, so it is skipped.

    Args:
        folder: The folder that holds the files.
        report: Counts what is read and lists what is skipped.

    Raises:
        M3ELError: If the folder does not exist, holds no mentions with candidates, or a file cannot be parsed at all.
    """
    return _with_own_ids(_candidate_records(folder, report), report)


def _with_own_ids(records: Iterator[Record], report: Report) -> Iterator[Record]:
    """Numbers the ids of mentions that share caption, picture and place, in the order in which they are read."""
    seen: Counter[str] = Counter()
    for record in records:
        seen[record.id] += 1
        if seen[record.id] > 1:
            report.counts["mentions with the same caption, picture and place as an earlier one"] += 1
            record = replace(record, id=f"{record.id}-{seen[record.id]}")
        yield record


def _passage_records(folder: Path | None, report: Report) -> Iterator[Record]:
    for path, split in _files(folder, report, PASSAGE):
        for row, item in parse_elements(path, report):
            source = f"{path.name} row {row}"
            try:
                passage = _fields(item, PASSAGE)
                mentions = passage["mentions"]
                if not isinstance(mentions, list | tuple) or not mentions:
                    raise UnusableRowError("has no mentions")
            except UnusableRowError as reason:
                skip_row(report, source, reason)
                continue
            for k, mention in enumerate(mentions):
                place = f"{source} mention {k}"
                make = partial(_record_of_passage, passage, mention, path.parent, split, place)
                yield from read_row(make, report, place)


def _candidate_records(folder: Path | None, report: Report) -> Iterator[Record]:
    for path, split in _files(folder, report, CANDIDATES):
        for row, item in parse_elements(path, report):
            place = f"{path.name} row {row}"
            make = partial(_record_with_candidates, item, path.parent, split, place, report)
            yield from read_row(make, report, place)


def _files(folder: Path | None, report: Report, form: tuple[str, ...]) -> list[tuple[Path, str | None]]:
    """The files whose rows have a form, with their split."""
    folder = check_folder(folder, _HOLDING)
    found = [(path, _split(path.stem)) for path in sorted(folder.glob("*.json")) if _has_form(path, form)]
    note_unread(folder, {path for path, _ in found}, report, f"its rows are not lists of {len(form)} fields")
    if not found:
        raise M3ELError(f"{folder} holds no .json file whose rows are [{', '.join(form)}]")
    return found


def _has_form(path: Path, form: tuple[str, ...]) -> bool:
    """Whether most of the first rows that can be parsed have a form; the others are for whoever reads it to report."""
    rows = [item for _, item in islice(parse_elements(path, Report()), 20)]
    fitting = sum(isinstance(item, list | tuple) and len(item) == len(form) for item in rows)
    return 2 * fitting > len(rows)


def _recognises(form: tuple[str, ...], folder: Path) -> bool:
    for path in sorted(folder.glob("*.json")):
        with suppress(M3ELError):
            if _has_form(path, form):
                return True
    return False


def _split(stem: str) -> str | None:
    """The split that a file name tells: ``valid_w_10cands`` is validation; None if it tells none, or several."""
    words = re.findall(r"[a-z]+", stem.lower())
    splits = {_SPLITS[word] for word in words if word in _SPLITS}
    return splits.pop() if len(splits) == 1 else None


def _fields(item: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(item, list | tuple):
        raise UnusableRowError(f"is of type {type(item).__name__}, not [{', '.join(names)}]")
    if len(item) != len(names):
        raise UnusableRowError(f"has {len(item)} fields, not {len(names)}: [{', '.join(names)}]")
    return dict(zip(names, item, strict=True))


def _record(fields: dict[str, Any], folder: Path, split: str | None, source: str) -> Record:
    """Makes a record without candidates of the fields that both forms share."""
    mention = get_text(fields, "mention")
    if mention is None:
        raise UnusableRowError("has no mention name (field mention)")
    address = get_text(fields, "url")
    if address is None:
        raise UnusableRowError("has no gold (field url)")
    image = get_text(fields, "image")
    context = get_text(fields, "caption")
    key = json.dumps([context, image, get_text(fields, "start", integer=True)])
    return Record(
        id=hashlib.sha256(key.encode()).hexdigest()[:16],
        source=source,
        topic=_slug(get_text(fields, "topic")),
        split=split,
        mention=mention,
        context=context,
        picture=None if image is None else _picture(_clean(image), folder),
        answer_qid=NIL if name_answer(address) == NIL else _page(address),
        candidates=(),
    )


def _picture(url: str, folder: Path) -> Picture:
    """The archive's name for a picture is the MD5 of its address's last part; drawings (SVG) are there as PNG."""
    name = url.rsplit("/", 1)[-1]
    ending = re.sub(r"(?i)^\.svg$", ".png", Path(name).suffix)
    return Picture(path=folder / "wikinewsImgs" / f"{hashlib.md5(name.encode()).hexdigest()}{ending}", url=url)


def _record_of_passage(passage: dict[str, Any], mention: Any, folder: Path, split: str | None, source: str) -> Record:
    return _record(passage | _fields(mention, MENTION), folder, split, source)


def _record_with_candidates(item: Any, folder: Path, split: str | None, source: str, report: Report) -> Record:
    fields = _fields(item, CANDIDATES)
    record = _record(fields, folder, split, source)
    if record.answer_qid == NIL:
        raise UnusableRowError("its answer is NIL: no candidate is right")
    items = fields["candidates"]
    if not isinstance(items, list | tuple) or not items:
        raise UnusableRowError("has no candidates")
    listed = [_candidate(item) for item in items]
    pages = list(dict.fromkeys(listed))
    if record.answer_qid not in pages:
        gold = _loose(record.answer_qid)
        place = next((place for place, page in enumerate(pages) if _loose(page) == gold), None)
        if place is None:
            raise UnusableRowError(f"its gold {record.answer_qid} is not among its candidates")
        pages[place] = record.answer_qid
    record = replace(
        record,
        topic=record.topic or "other",
        context=record.context or _join(fields, record.mention),
        candidates=tuple(_entity(page) for page in pages),
    )
    if len(pages) < len(listed):
        report.counts["candidates listed twice, kept once"] += len(listed) - len(pages)
    return record


def _candidate(item: Any) -> str:
    """The page of a candidate: its address or title, alone or as the first item of a list."""
    first = next(iter(item), None) if isinstance(item, list | tuple) else item
    address = get_text({"candidates": first}, "candidates") if isinstance(first, str) else None
    if address is None:
        raise UnusableRowError("has a candidate without an address")
    return _page(address)


def _join(fields: dict[str, Any], mention: str) -> str:
    """The mention between its contexts, which are texts or lists of words."""
    sides = [fields[side] if isinstance(fields[side], list | tuple) else [fields[side]] for side in ("left", "right")]
    left, right = (
        " ".join(check_text(word, "field left or right") for word in side if word not in (None, "")) for side in sides
    )
    return f"{left} {mention} {right}".strip()


def _clean(address: str) -> str:
    """An address without what some have before it by mistake: ``nhttps``, ``hhttps``, ``]https``, ``ttps``."""
    return re.sub(r"^.*?h?ttps?://", "https://", address, count=1, flags=re.DOTALL)


def _page(address: str) -> str:
    """The one address of a Wikipedia page, however it is written; a bare title is one of English Wikipedia."""
    page = unquote(_clean(address)).replace(" ", "_")
    return page if "://" in page else _WIKI + page


def _loose(page: str) -> str:
    return page.replace("-", "_")


def _entity(page: str) -> Entity:
    title = page.partition("/wiki/")[2] or page.rstrip("/").rpartition("/")[2]
    return Entity(page, title.replace("_", " "))


def _slug(topic: str | None) -> str | None:
    """A topic in lower case, with a hyphen for whatever is neither a letter of a to z nor a digit; None if empty."""
    return re.sub(r"[^a-z0-9]+", "-", (topic or "").lower()).strip("-") or None


_ABOUT = """WikiDiverse ([repository](https://github.com/wangxw5/wikiDiverse)): captions of Wikinews pictures, with
mentions of many types linked to English Wikipedia. """
_PICTURES = """The files name the pictures by their addresses; the pictures themselves are read from the folder
`wikinewsImgs/`, where it lies beside the files."""
_CAVEATS = """Captions and pictures are Wikinews': what made the news, in English. Several mentions share one caption
and one picture, so rows of a passage belong together."""
_LICENCE = """CC BY-SA 4.0, as its repository states. The pictures, which are not part of the files, stand under
licences of their own."""

WIKIDIVERSE = Reader(
    title="WikiDiverse",
    records=read_passages,
    entities=read_passage_entities,
    recognises=partial(_recognises, PASSAGE),
    about=f"{_ABOUT}These are the passages; all pages that some mention means are the knowledge base. {_PICTURES}",
    caveats=_CAVEATS,
    licence=_LICENCE,
    license_id="cc-by-sa-4.0",
    citations=(works.WIKIDIVERSE,),
)

WIKIDIVERSE_CANDIDATES = Reader(
    title="WikiDiverse with candidates",
    records=read_candidates,
    recognises=partial(_recognises, CANDIDATES),
    about=f"{_ABOUT}These are the mentions with retrieved candidates. {_PICTURES}",
    caveats=_CAVEATS,
    licence=_LICENCE,
    license_id="cc-by-sa-4.0",
    citations=(works.WIKIDIVERSE,),
)
