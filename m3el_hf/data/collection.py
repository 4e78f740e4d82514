"""The records of a source on disk, with the group and split of each: what a build reads its rows from.

A source is read once, record by record, and spooled to Arrow files, so that memory does not grow with it and several
processes can fetch any row. Pictures that lie in files stay there.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import pyarrow as pa
from tqdm import tqdm

from m3el_hf.data.configs import RESERVED
from m3el_hf.data.previous import PreviousSplits
from m3el_hf.data.readers import get_reader
from m3el_hf.data.schema import Entity, Picture, Reader, Record, Report
from m3el_hf.data.splits import Grouping, assign_splits
from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TOPICS

MENTIONS = "mentions"
"""Stands for the topic where a source has none."""

RELEASED = "rows whose split is the source's own"
"""Counted where other rows have none."""

_RECORDS, _ENTITIES = "records.arrow", "entities.arrow"
_BATCH = 32  # rows of a spooled batch: to fetch one is to read them all

_PICTURE = pa.struct([("data", pa.binary()), *((name, pa.string()) for name in ("path", "url", "licence", "flaw"))])
_ENTITY_SCHEMA = pa.schema(
    [("qid", pa.string()), ("name", pa.string()), ("description", pa.string()), ("picture", _PICTURE)]
)
_RECORD_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "source", "topic", "split", "mention", "context")),
        ("picture", _PICTURE),
        ("answer_qid", pa.string()),
        ("candidates", pa.list_(pa.struct(list(_ENTITY_SCHEMA)))),
        ("difficulty", pa.string()),
    ]
)


class RowPlan(NamedTuple):
    """What a row is made of, beside its record.

    Attributes:
        position: Of its record, in the spool.
        group: The group that it belongs to.
        gold: Position of its gold in the knowledge base; None where that has it not, or the source has none.
        described: Which of its candidates, counted as the source lists them, are to be described as entities here.
    """

    position: int
    group: str
    gold: int | None
    described: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Some rows of one topic and split, in the order in which they are written; small enough to send to a process."""

    topic: str
    split: str
    rows: list[RowPlan]

    @property
    def entities(self) -> int:
        """How many entities are described here."""
        return sum(len(plan.described) for plan in self.rows)


class Spool:
    """Reads what a `_SpoolWriter` wrote into a folder: any row, without keeping the others in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, pa.ipc.RecordBatchFileReader] = {}
        self._batches: dict[str, tuple[int, pa.RecordBatch]] = {}  # the last of each file

    def record(self, position: int) -> Record:
        """Returns a record by its position."""
        return _record(self._row(_RECORDS, position))

    def entity(self, position: int) -> Entity:
        """Returns an entity of the knowledge base by its position."""
        return _entity(self._row(_ENTITIES, position))

    def _row(self, name: str, position: int) -> dict[str, Any]:
        if name not in self._files:  # read, not mapped: what is mapped counts as memory
            self._files[name] = pa.ipc.open_file(pa.OSFile(str(self._folder / name)))
        number, row = divmod(position, _BATCH)
        if name not in self._batches or self._batches[name][0] != number:
            self._batches[name] = number, self._files[name].get_batch(number)
        return dict(self._batches[name][1].slice(row, 1).to_pylist()[0])


class _SpoolWriter:
    """Appends rows to one Arrow file, a batch at a time."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self._writer = pa.ipc.new_file(pa.OSFile(str(path), "wb"), schema)
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._rows:
            self._flush()
        self._writer.close()

    def add(self, row: dict[str, Any]) -> int:
        """Appends a row and returns its position."""
        self._rows.append(row)
        if len(self._rows) == _BATCH:
            self._flush()
        self._count += 1
        return self._count - 1

    def _flush(self) -> None:
        self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=self._schema))
        self._rows.clear()


def _picture_row(picture: Picture | None) -> dict[str, Any] | None:
    if picture is None:
        return None
    row = {field.name: getattr(picture, field.name) for field in _PICTURE}
    return row | {"path": None if picture.path is None else str(picture.path)}


def _entity_row(entity: Entity) -> dict[str, Any]:
    return {
        "qid": entity.qid,
        "name": entity.name,
        "description": entity.description,
        "picture": _picture_row(entity.picture),
    }


def _record_row(record: Record) -> dict[str, Any]:
    row = {name: getattr(record, name) for name in _RECORD_SCHEMA.names}
    row["picture"] = _picture_row(record.picture)
    row["candidates"] = [_entity_row(candidate) for candidate in record.candidates]
    return row


def _picture(row: dict[str, Any] | None) -> Picture | None:
    if row is None:
        return None
    return Picture(**(row | {"path": None if row["path"] is None else Path(row["path"])}))


def _entity(row: dict[str, Any]) -> Entity:
    return Entity(**(row | {"picture": _picture(row["picture"])}))


def _record(row: dict[str, Any]) -> Record:
    candidates = tuple(_entity(candidate) for candidate in row["candidates"])
    return Record(**(row | {"picture": _picture(row["picture"]), "candidates": candidates}))


@dataclass
class Collection:
    """The records of a source, spooled, with the group and split of each.

    Attributes:
        reader: The raw format.
        folder: Where the spool lies.
        topics: The topics that have rows, M³EL's in the order of `TOPICS`; `MENTIONS` where the source has none.
        released: How many rows have the split that their source gives them.
        report: What was read and skipped.
        entities: Number of entities, of the knowledge base or of all candidates.
    """

    reader: Reader
    folder: Path
    topics: list[str]
    released: int
    report: Report
    entities: int
    _pieces: dict[tuple[str, str], Piece]
    _owned: tempfile.TemporaryDirectory[str] | None = None  # removes the spool together with the collection

    def count(self, split: str, topic: str | None = None) -> int:
        """Returns the number of rows of a split, of one topic or (None) of all."""
        return sum(
            len(piece.rows) for (own, one), piece in self._pieces.items() if one == split and topic in (None, own)
        )

    def pieces(self, split: str, topic: str | None = None, *, size: int) -> list[Piece]:
        """Cuts the rows of a split, of one topic or (None) of all, into pieces of one topic and at most ``size`` rows.

        The rows of a group stand together, so that what they share is stored once.
        """
        return [
            replace(piece, rows=piece.rows[start : start + size])
            for own in self.topics
            if topic in (None, own) and (piece := self._pieces.get((own, split)))
            for start in range(0, len(piece.rows), size)
        ]

    def base(self, *, size: int) -> list[range]:
        """Cuts the positions in the knowledge base, where there is one, into ranges of at most ``size``."""
        if self.reader.entities is None:
            return []
        starts = range(0, max(1, self.entities), size)  # of an empty one, too, there is a file
        return [range(start, min(start + size, self.entities)) for start in starts]


def collect(
    reader: str,
    folder: Path | None,
    seed: int = 0,
    *,
    previous: PreviousSplits | None = None,
    work: Path | None = None,
    progress: bool = False,
    **options: Any,
) -> Collection:
    """Reads a source once, spools its records and decides the split of each.

    Args:
        reader: A name of `READERS`.
        folder: Where the source lies; None for a reader that needs none.
        seed: Seeds the splits.
        previous: The splits of an earlier version, which the rows that it had keep.
        work: An empty folder for the spool; None for a temporary one that goes with the collection.
        progress: Show how many records were read.
        **options: The reader's own options.

    Raises:
        M3ELError: If the reader is unknown, or the source is absent, unreadable or without a single usable instance.
    """
    source, report, grouping = get_reader(reader), Report(), Grouping()
    owned = tempfile.TemporaryDirectory(prefix="m3el-") if work is None else None
    spool = work or Path(owned.name if owned else "")
    base = _spool_base(source.entities(folder, report), spool) if source.entities and folder else None
    described, released = _Described(), 0
    topics: list[str] = []
    golds: list[int | None] = []
    with _SpoolWriter(spool / _RECORDS, _RECORD_SCHEMA) as writer:
        records = _unique(source.records(folder, report, **options), report)
        for record in tqdm(records, desc="reading", unit=" rows", disable=not progress, delay=1):
            released += record.split is not None
            if previous is not None:
                record = previous.apply(record)
            described.add(writer.add(_record_row(record)), record)
            topics.append(_place(record.topic) if record.topic and base is None else MENTIONS)
            golds.append(None if base is None else base.get(record.answer_qid))
            grouping.add(record, record.topic or MENTIONS)
    if not topics:
        first = f"; the first was skipped because: {report.skipped[0]}" if report.skipped else ""
        raise M3ELError(f"{folder} holds {report.read} instances, none of them usable{first}")
    if previous is not None and released == len(topics):
        raise M3ELError("every row has a split of the source's own, which is kept: leave --previous out")
    if previous is not None and not previous.rows:
        raise M3ELError(
            f"none of these rows stands in {previous.name}, whose splits they were to keep: pass an earlier version of "
            "the same data, or leave --previous out"
        )
    if 0 < released < len(topics):
        report.counts[RELEASED] = released
    groups = grouping.groups()
    splits = assign_splits(grouping.topics, grouping.released, groups, seed)
    if base is None:
        for split, count in grouping.shared_candidates(splits).items():
            report.counts[f"{split} rows with a candidate that also stands in train"] = count
    plans = [
        RowPlan(position, group, gold, described.places(position))
        for position, (group, gold) in enumerate(zip(groups, golds, strict=True))
    ]
    return Collection(
        reader=source,
        folder=spool,
        topics=sorted(set(topics), key=lambda topic: (TOPICS.index(topic) if topic in TOPICS else len(TOPICS), topic)),
        released=released,
        report=report,
        entities=len(described) if base is None else len(base),
        _pieces=_pieces(topics, splits, plans),
        _owned=owned,
    )


def _place(topic: str) -> str:
    """Returns the topic as the name of a folder and a config: none that means something else, none too long."""
    return f"topic-{topic}" if topic in RESERVED else topic[:60]


def _unique(records: Iterator[Record], report: Report) -> Iterator[Record]:
    """Passes each record on whose id is new; the others are reported."""
    seen: set[int] = set()
    for record in records:
        key = int.from_bytes(hashlib.blake2b(record.id.encode(), digest_size=8).digest())
        if key in seen:
            report.skipped.append(f"{record.source}: its id {record.id} is that of an earlier row")
        else:
            seen.add(key)
            yield record


def _spool_base(entities: Iterator[Entity], spool: Path) -> dict[str, int]:
    """Spools a knowledge base and returns the position of each entity."""
    with _SpoolWriter(spool / _ENTITIES, _ENTITY_SCHEMA) as writer:
        return {entity.qid: writer.add(_entity_row(entity)) for entity in entities}


class _Described:
    """Which row describes which candidate: the first that has most of a name, a picture and a description."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[int, int]] = {}
        self._ranks: dict[str, tuple[bool, ...]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: int, record: Record) -> None:
        """Notes the candidates of the next row."""
        for place, candidate in enumerate(record.candidates):
            rank = (bool(candidate.name), candidate.picture is not None, candidate.description is not None)
            known = self._ranks.get(candidate.qid)
            if known is not None and rank <= known:
                continue
            rank = (rank[0], _is_there(candidate.picture), rank[2])  # a look at the disk, for the few that may be best
            if known is None or rank > known:
                self._rows[candidate.qid], self._ranks[candidate.qid] = (row, place), rank

    @cached_property
    def _places(self) -> dict[int, tuple[int, ...]]:
        places: dict[int, tuple[int, ...]] = {}
        for row, place in self._rows.values():
            places[row] = (*places.get(row, ()), place)
        return places

    def places(self, row: int) -> tuple[int, ...]:
        """Returns the candidates that a row describes, once all rows are noted."""
        return self._places.get(row, ())


def _is_there(picture: Picture | None) -> bool:
    if picture is None or picture.flaw is not None:
        return False
    return picture.data is not None or (picture.path is not None and picture.path.is_file())


def _pieces(topics: list[str], splits: list[str], plans: list[RowPlan]) -> dict[tuple[str, str], Piece]:
    """Gathers the rows of each topic and split, group by group in the order in which they appear."""
    rows: dict[tuple[str, str], dict[str, list[RowPlan]]] = defaultdict(lambda: defaultdict(list))
    for topic, split, plan in zip(topics, splits, plans, strict=True):
        rows[topic, split][plan.group].append(plan)
    return {
        (topic, split): Piece(topic, split, [plan for group in groups.values() for plan in group])
        for (topic, split), groups in rows.items()
    }
