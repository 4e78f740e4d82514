"""Reads a built folder once and keeps of each row only numbers and 8-byte digests: what an audit counts with."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from numpy.typing import NDArray
from tqdm import tqdm

from m3el_hf.data.audit.perceptual import perceptual_hash
from m3el_hf.data.manifest import Manifest
from m3el_hf.data.schema import ENTITY_FEATURES, MENTION_FEATURES, NIL, ROW_FEATURES, SPLITS
from m3el_hf.errors import M3ELError
from m3el_hf.modeling.decoding_clipnd import UnusableImageError, decode_image

Row = dict[str, Any]
Digests = NDArray[np.uint64]

MISSING = 0
"""The digest of what is missing: null, or a text without a letter or sign."""

NO_TOPIC = "mentions"
"""Stands for the topic of rows that have none."""

SMALL_SIDE = 64
"""A shorter side, in pixels, shows little to an encoder that reads 224."""

LONG_RATIO = 3
"""A square cut from the middle of a picture that is longer shows less than a third of it."""

_BATCH = 32  # rows held at a time, with their pictures

_ROW_COLUMNS = {
    "split": "b", "topic": "h", "id": "Q", "mention": "Q", "name": "Q", "context": "Q", "picture": "Q", "gold": "Q",
    "group": "Q", "nil": "b", "image_is_gold": "b", "name_is_gold": "b",
    "first": "q", "count": "q", "gold_candidate": "q", "answer": "q", "released": "q",
}  # fmt: skip
_ENTITY_COLUMNS = {"qid": "Q", "label": "Q", "name": "Q", "description": "Q", "picture": "Q"}


def digest(value: str | bytes | None) -> int:
    """Returns 8 bytes of a hash as a number; `MISSING` for what is missing."""
    if not value or (isinstance(value, str) and not value.strip()):
        return MISSING
    data = value.encode() if isinstance(value, str) else value
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) or 1


def one_line(text: str | None, most: int = 160) -> str:
    """Returns text of the data as one line that is not too long to show and holds no control characters."""
    words = " ".join((text or "").split())
    line = "".join(letter if letter.isprintable() else "\ufffd" for letter in words)
    return line if len(line) <= most else line[: most - 1] + "…"


def fold(name: str | None) -> str | None:
    """Returns a name without its case and the space around it: what "the same name" means."""
    return None if name is None else name.casefold().strip()


class _Columns:
    """Grows column by column; hands out arrays."""

    def __init__(self, kinds: dict[str, str]) -> None:
        self._columns = {name: array(kind) for name, kind in kinds.items()}

    def add(self, **values: int) -> None:
        for name, column in self._columns.items():
            column.append(values[name])

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getattr__(self, name: str) -> NDArray[Any]:
        try:
            column = self.__dict__["_columns"][name]
        except KeyError:
            raise AttributeError(name) from None
        return np.array(column, dtype=column.typecode)


@dataclass
class TextFacts:
    """What is known of the texts of one kind.

    Attributes:
        lengths: How many texts have how many characters.
        shortest: The first of the shortest texts.
        longest: The first of the longest texts.
        control: Texts with control characters, or with signs that turn the direction of writing.
        right_to_left: Texts with a letter of a right-to-left script.
    """

    lengths: Counter[int] = field(default_factory=Counter)
    shortest: str = ""
    longest: str = ""
    control: int = 0
    right_to_left: int = 0

    def add(self, text: str | None) -> None:
        """Counts a text; None is no text."""
        if text is None:
            return
        if not self.lengths or len(text) < len(self.shortest):
            self.shortest = text
        if not self.lengths or len(text) > len(self.longest):
            self.longest = text
        self.lengths[len(text)] += 1
        if text.isascii() and text.isprintable():
            return
        kinds = {unicodedata.bidirectional(letter) for letter in text}
        self.right_to_left += bool(kinds & {"R", "AL"})
        self.control += bool(kinds & _TURNING) or any(
            unicodedata.category(letter) == "Cc" and letter not in "\t\n\r" for letter in text
        )


_TURNING = {"LRE", "LRO", "RLE", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


@dataclass
class Pictures:
    """The distinct pictures of a folder, in the order in which they were met.

    Attributes:
        hashes: The perceptual hash of each picture by its digest; None where it has no structure.
        sizes: Width and height of each decodable picture, in pixels.
        places: Where each was met first: ``("mention" | "candidate" | "entity", position)``.
        unusable: Why a picture cannot be decoded, by its digest.
        size: How many bytes the distinct pictures have.
        size_of_all: How many all pictures of all rows and entities have.
    """

    hashes: dict[int, int | None] = field(default_factory=dict)
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    places: dict[int, tuple[str, int]] = field(default_factory=dict)
    unusable: dict[int, str] = field(default_factory=dict)
    size: int = 0
    size_of_all: int = 0

    @property
    def small(self) -> list[int]:
        """The pictures with a short side under `SMALL_SIDE`."""
        return [key for key, size in self.sizes.items() if min(size) < SMALL_SIDE]

    @property
    def long(self) -> list[int]:
        """The pictures with a long side over `LONG_RATIO` times the short one."""
        return [key for key, size in self.sizes.items() if max(size) > LONG_RATIO * min(size)]

    @property
    def flat(self) -> list[int]:
        """The pictures without structure."""
        return [key for key, found in self.hashes.items() if found is None]

    def add(self, found: dict[int, tuple[bytes, str, int]], executor: Executor) -> None:
        """Decodes and hashes pictures: encoded bytes and place by digest."""
        new = {key: value for key, value in found.items() if key not in self.places}
        for key, (result, (data, kind, position)) in zip(
            new,
            zip(executor.map(_measure, [data for data, _, _ in new.values()]), new.values(), strict=True),
            strict=True,
        ):
            self.places[key] = (kind, position)
            self.size += len(data)
            if isinstance(result, str):
                self.unusable[key] = result
            else:
                self.sizes[key], self.hashes[key] = result


def _measure(data: bytes) -> tuple[tuple[int, int], int | None] | str:
    """Returns size and hash of a picture, or why it cannot be decoded."""
    try:
        image = decode_image(data)
    except UnusableImageError as error:
        return str(error)
    return image.size, perceptual_hash(image)


class Scan:
    """A built folder as columns.

    Attributes:
        manifest: What the build says of itself.
        rows: A column for each thing that is known of a row. Texts, ids and pictures are digests; ``name`` is that of
            the folded mention; ``split`` and ``topic`` are positions in `SPLITS` and in ``topics``; ``first`` and
            ``count`` say which candidates are the row's, ``gold_candidate`` which of all candidates is its gold (-1:
            none); ``answer`` and ``released`` are the gold's positions (-1: null); flags are 1, 0, or -1 for null.
        candidates: The candidates of all rows, one after the other; empty for a set with a knowledge base.
        entities: The entities.
        topics: The topics in the order in which they were met.
        pictures: The distinct pictures.
        texts: Facts about mentions, contexts, and entities' names and descriptions.
        licences: How many pictures of rows have which licence; None where it is not stated.
        urls: How many pictures of rows have an address.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self.rows, self.candidates, self.entities = (
            _Columns(kinds) for kinds in (_ROW_COLUMNS, _ENTITY_COLUMNS, _ENTITY_COLUMNS)
        )
        self.topics: list[str] = []
        self.pictures = Pictures()
        self.texts = {name: TextFacts() for name in ("mention", "context", "entity name", "entity description")}
        self.licences: Counter[str | None] = Counter()
        self.urls = 0
        kind, features = ("mentions", MENTION_FEATURES) if self.is_knowledge_base else ("data", ROW_FEATURES)
        self._row_files = _files(folder, kind, features)
        self._entity_files = _files(folder, "entities", ENTITY_FEATURES)

    @property
    def is_knowledge_base(self) -> bool:
        """Whether every entity is a candidate of every mention."""
        return self.manifest.kind == "knowledge_base"

    @classmethod
    def of(cls, folder: Path, progress: bool = True) -> Scan:
        """Reads a built folder.

        Args:
            folder: What `m3el-hf data build` wrote.
            progress: Show a progress bar.

        Raises:
            M3ELError: If it is none, or cannot be read.
        """
        scan = cls(folder, Manifest.load(folder))
        files = [*scan._entity_files, *scan._row_files]
        workers = min(4, os.cpu_count() or 1)  # decoding lets other threads run; each holds a picture
        with (
            tqdm(total=sum(file.count for file in files), unit=" rows", desc="auditing", disable=not progress) as bar,
            ThreadPoolExecutor(workers) as executor,
        ):
            for add, some in ((scan._add_entity, scan._entity_files), (scan._add_row, scan._row_files)):
                for file in some:
                    for batch in file.batches():
                        found: dict[int, tuple[bytes, str, int]] = {}
                        for row in batch:
                            add(row, file, found)
                        scan.pictures.add(found, executor)
                        bar.update(len(batch))
        return scan

    def row(self, position: int) -> Row:
        """Reads a row again, with its pictures."""
        return _read(self._row_files, position)

    def entity(self, position: int) -> Row:
        """Reads an entity again, with its picture."""
        return _read(self._entity_files, position)

    def _picture(self, image: Row | None, kind: str, position: int, found: dict[int, tuple[bytes, str, int]]) -> int:
        if image is None or not image["bytes"]:
            return MISSING
        key = digest(image["bytes"])
        found.setdefault(key, (image["bytes"], kind, position))
        self.pictures.size_of_all += len(image["bytes"])
        return key

    def _add_entity(self, row: Row, file: _File, found: dict[int, tuple[bytes, str, int]]) -> None:
        self.texts["entity name"].add(row["name"])
        self.texts["entity description"].add(row["description"])
        picture = self._picture(row["image"], "entity", len(self.entities), found)
        _add_entity(self.entities, row["qid"], row["name"], row["description"], picture)

    def _add_row(self, row: Row, file: _File, found: dict[int, tuple[bytes, str, int]]) -> None:
        self.texts["mention"].add(row["mention"])
        self.texts["context"].add(row["context"])
        first = len(self.candidates)
        qids = row.get("candidate_qids", [])
        for place, qid in enumerate(qids):
            name, description, image = (row[f"candidate_{kind}"][place] for kind in ("names", "descriptions", "images"))
            picture = self._picture(image, "candidate", first + place, found)
            _add_entity(self.candidates, qid, name, description, picture)
        answer, released = (-1 if row.get(name) is None else row[name] for name in ("answer", "gold_position_released"))
        if (topic := row["topic"] or NO_TOPIC) not in self.topics:
            self.topics.append(topic)
        self.rows.add(
            split=SPLITS.index(file.split),
            topic=self.topics.index(topic),
            id=digest(row["id"]),
            mention=digest(row["mention"]),
            name=digest(fold(row["mention"])),
            context=digest(row["context"]),
            picture=self._picture(row["mention_image"], "mention", len(self.rows), found),
            gold=digest(row["answer_qid"]),
            group=digest(row["split_group"]),
            nil=row["answer_qid"] == NIL,
            image_is_gold=_flag(row["mention_image_is_gold"]),
            name_is_gold=_flag(row["mention_name_is_gold"]),
            first=first,
            count=len(qids),
            gold_candidate=first + answer if 0 <= answer < len(qids) else -1,
            answer=answer,
            released=released,
        )
        self._count_sources(row)

    def _count_sources(self, row: Row) -> None:
        shown = [row["mention_image"], *row.get("candidate_images", [])]
        for place, image in enumerate(shown):
            if image is not None:
                self.licences[_at(row["licences"], place)] += 1
                self.urls += bool(_at(row["image_urls"], place))


def _at(values: list[str | None] | None, place: int) -> str | None:
    return values[place] if values is not None and place < len(values) else None


def _flag(value: bool | None) -> int:
    return -1 if value is None else int(value)


def _add_entity(columns: _Columns, qid: str | None, name: str | None, description: str | None, picture: int) -> None:
    columns.add(
        qid=digest(qid), label=digest(name), name=digest(fold(name)), description=digest(description), picture=picture
    )


@dataclass(frozen=True)
class _File:
    """A Parquet file with its number of rows and its split (of entities: "train")."""

    path: Path
    count: int
    split: str

    def batches(self) -> Iterator[list[Row]]:
        with _readable(self.path), pq.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as file:
            for batch in file.iter_batches(_BATCH):
                yield batch.to_pylist()

    def row(self, position: int) -> Row:
        with _readable(self.path), pq.ParquetFile(self.path) as file:
            for group in range(file.num_row_groups):
                if position < (count := file.metadata.row_group(group).num_rows):
                    return dict(file.read_row_group(group).slice(position, 1).to_pylist()[0])
                position -= count
        raise IndexError(position)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what pyarrow raises of a broken file into the one error that a user is meant to read."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise M3ELError(f"{path} cannot be read ({reason}): build the dataset again") from error


def _files(folder: Path, kind: str, features: Features) -> list[_File]:
    """Lists the Parquet files of ``data``, ``mentions`` or ``entities``.

    Raises:
        M3ELError: If there is none, or one is not of this version.
    """
    files = []
    for path in sorted((folder / kind).rglob("*.parquet")):
        with _readable(path), pq.ParquetFile(path) as file:
            missing = [name for name in features if name not in file.schema_arrow.names]
            files.append(_File(path, file.metadata.num_rows, path.name.split("-")[0]))
        if missing:
            raise M3ELError(f"{path} lacks the columns {', '.join(missing)}: build the dataset again")
        if files[-1].split not in SPLITS:
            raise M3ELError(f"{path} is of no split ({', '.join(SPLITS)}): build the dataset again")
    if not files:
        raise M3ELError(f"{folder} holds no {kind}: build the dataset again")
    return sorted(files, key=lambda file: SPLITS.index(file.split))  # of what is doubled, the first is in train


def _read(files: Iterable[_File], position: int) -> Row:
    for file in files:
        if position < file.count:
            return file.row(position)
        position -= file.count
    raise IndexError(position)
