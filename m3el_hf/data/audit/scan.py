"""Reads a built folder once and keeps of each row only numbers and 8-byte digests: what an audit counts with."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Features
from numpy.typing import NDArray
from tqdm import tqdm

from m3el_hf.data.collection import MENTIONS
from m3el_hf.data.manifest import Manifest
from m3el_hf.data.perceptual import perceptual_hash
from m3el_hf.data.schema import ENTITY_FEATURES, MENTION_FEATURES, NIL, ROW_FEATURES, SPLITS
from m3el_hf.errors import M3ELError, one_line
from m3el_hf.modeling.decoding_clipnd import UnusableImageError, decode_image

Row = dict[str, Any]
Digests = NDArray[np.uint64]
Columns = dict[str, NDArray[Any]]

MISSING = 0
"""The digest of what is missing: null, or a text without a letter or sign."""

NAME_LENGTH = 100
"""A longer name, in characters, is a text that a source has put into the wrong field."""

_WORKERS = min(4, os.cpu_count() or 1)  # decoding lets other threads run; each holds a picture

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def digest(value: str | bytes | pa.Buffer | None) -> int:
    """Returns 8 bytes of a hash as a number; `MISSING` for what is missing."""
    if not value or (isinstance(value, str) and not value.strip()):
        return MISSING
    data = value.encode() if isinstance(value, str) else value
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) or 1


def excerpt(text: str | None, most: int = 160) -> str:
    """Returns text of the data as one line that is not too long to show and holds no control characters."""
    line = "".join(letter if letter.isprintable() else "\ufffd" for letter in one_line(text or ""))
    return line if len(line) <= most else line[: most - 1] + "…"


def fold(name: str | None) -> str | None:
    """Returns a name without its case and the space around it: what "the same name" means."""
    return None if name is None else name.casefold().strip()


@dataclass
class Pictures:
    """The distinct pictures of a folder.

    Attributes:
        hashes: The perceptual hash of each decodable picture by its digest; None where it has no structure.
        short_sides: Their short sides, in pixels.
        unusable: Where each other picture was met first, and why it cannot be decoded, by its digest.
        size: How many bytes the distinct pictures have.
        size_of_all: How many all pictures of all rows and entities have.
    """

    hashes: dict[int, int | None] = field(default_factory=dict)
    short_sides: list[int] = field(default_factory=list)
    unusable: dict[int, tuple[str, str]] = field(default_factory=dict)
    size: int = 0
    size_of_all: int = 0

    def add(self, images: pa.StructArray, places: Sequence[str]) -> Digests:
        """Decodes and hashes the pictures that are new, and returns the digest of each ``[images]``.

        ``places`` says of each image where it stands. The bytes stay where pyarrow has them, a shared picture's once.
        """
        stored = pc.struct_field(images, "bytes")
        buffers = [value.as_buffer() for value in stored.dictionary]
        keys = [digest(buffer) for buffer in buffers]
        numbers = np.asarray(stored.indices.fill_null(-1))
        new = {key: k for k, key in enumerate(keys) if key and key not in self.hashes and key not in self.unusable}
        with ThreadPoolExecutor(_WORKERS) as executor:
            measured = list(executor.map(_measure, (buffers[k] for k in new.values())))
        for (key, k), found in zip(new.items(), measured, strict=True):
            self.size += len(buffers[k])
            if isinstance(found, str):
                self.unusable[key] = places[int(np.argmax(numbers == k))], found
            else:
                side, self.hashes[key] = found
                self.short_sides.append(side)
        self.size_of_all += int(np.array([*map(len, buffers), 0])[numbers].sum())
        return np.array([*keys, MISSING], dtype=np.uint64)[numbers]  # number -1, the last, is of what is missing


def _measure(data: pa.Buffer) -> tuple[int, int | None] | str:
    """Returns short side and hash of a picture, or why it cannot be decoded."""
    try:
        image = decode_image(data.to_pybytes())
    except UnusableImageError as error:
        return str(error)
    return min(image.size), perceptual_hash(image)


class Scan:
    """A built folder as columns.

    Attributes:
        folder: The built folder.
        manifest: What the build says of itself.
        is_knowledge_base: Whether every entity is a candidate of every mention.
        rows: A column for each thing that is known of a row. Texts, ids and pictures are digests; ``name`` is that of
            the folded mention; ``split`` and ``topic`` are positions in `SPLITS` and in ``topics``; ``count`` is the
            number of candidates; ``answer`` and ``released`` are the gold's positions; flags are 1 or 0. -1: null.
        candidates: The candidates of all rows, one after the other; empty for a set with a knowledge base.
        entities: The entities, in the same columns.
        topics: The topics in the order in which they were met.
        pictures: The distinct pictures.
        texts: For mentions, contexts, and entities' names and descriptions: how many ``"texts"`` there are, how many
            are ``"long"`` for a name, and how many have ``"control"`` characters.
        licences: How many pictures of rows have which licence; None where it is not stated.
        urls: How many pictures of rows have an address.
    """

    def __init__(self, folder: Path, progress: bool = True) -> None:
        """Reads a built folder, a row group at a time.

        Args:
            folder: What `m3el-hf data build` wrote.
            progress: Show a progress bar.

        Raises:
            M3ELError: If it is none, or cannot be read.
        """
        self.folder = folder
        self.manifest = Manifest.load(folder)
        self.is_knowledge_base = self.manifest.kind == "knowledge_base"
        self.topics: list[str] = []
        self.pictures = Pictures()
        self.texts: dict[str, Counter[str]] = {
            kind: Counter() for kind in ("mention", "context", "entity name", "entity description")
        }
        self.licences: Counter[str | None] = Counter()
        self.urls = 0
        kind, features = ("mentions", MENTION_FEATURES) if self.is_knowledge_base else ("data", ROW_FEATURES)
        self._row_files = _files(folder, kind, features)
        self._entity_files = _files(folder, "entities", ENTITY_FEATURES)
        total = sum(file.count for file in [*self._entity_files, *self._row_files])
        with tqdm(total=total, unit=" rows", desc="auditing", disable=not progress) as bar:
            none = _entity_columns([], [], [], _digests([]))  # a knowledge base may be empty
            self.entities = _joined([none, *_each_group(self._entity_files, self._entities, bar)])
            rows, candidates = zip(*_each_group(self._row_files, self._rows, bar), strict=True)
        self.rows, self.candidates = _joined(rows), _joined(candidates)
        splits = [SPLITS.index(file.split) for file in self._row_files]
        self.rows["split"] = np.repeat(splits, [file.count for file in self._row_files])

    def row(self, position: int) -> Row:
        """Reads a row again, with its pictures."""
        return _read(self._row_files, position)

    def entity(self, position: int) -> Row:
        """Reads an entity again, with its picture."""
        return _read(self._entity_files, position)

    def _entities(self, table: pa.Table) -> Columns:
        qids, names, descriptions = (table[name].to_pylist() for name in ("qid", "name", "description"))
        self._count_texts({"entity name": names, "entity description": descriptions})
        places = [f"entity {qid}" for qid in qids]
        pictures = self.pictures.add(table["image"].combine_chunks(), places)
        return _entity_columns(qids, names, descriptions, pictures)

    def _rows(self, table: pa.Table) -> tuple[Columns, Columns]:
        """Returns the columns of some rows, and those of their candidates."""
        ids, topics, mentions, contexts, golds, groups = (
            table[name].to_pylist() for name in ("id", "topic", "mention", "context", "answer_qid", "split_group")
        )
        topics = [topic or MENTIONS for topic in topics]
        self.topics += [topic for topic in dict.fromkeys(topics) if topic not in self.topics]
        self._count_texts({"mention": mentions, "context": contexts})
        places = [f"mention of {one}" for one in ids]
        pictures = self.pictures.add(table["mention_image"].combine_chunks(), places)
        if self.is_knowledge_base:
            count, answer, released = np.zeros(len(ids), dtype=int), np.full(len(ids), -1), np.full(len(ids), -1)
            candidates = _entity_columns([], [], [], _digests([]))
        else:
            count = _numbers(pc.list_value_length(table["candidate_qids"]))
            answer, released = _numbers(table["answer"]), _numbers(table["gold_position_released"])
            candidates = self._candidates(table, np.repeat(ids, count))
        self._count_sources(table, pictures, np.split(candidates["picture"], np.cumsum(count)[:-1]))
        rows = {
            "topic": np.array([self.topics.index(topic) for topic in topics]),
            "id": _digests(ids),
            "mention": _digests(mentions),
            "name": _digests(map(fold, mentions)),
            "context": _digests(contexts),
            "picture": pictures,
            "gold": _digests(golds),
            "group": _digests(groups),
            "nil": np.array([gold == NIL for gold in golds]),
            "image_is_gold": _numbers(table["mention_image_is_gold"]),
            "name_is_gold": _numbers(table["mention_name_is_gold"]),
            "count": count,
            "answer": answer,
            "released": released,
        }
        return rows, candidates

    def _candidates(self, table: pa.Table, ids: Iterable[str]) -> Columns:
        qids, names, descriptions = (
            pc.list_flatten(table[f"candidate_{kind}"]).to_pylist() for kind in ("qids", "names", "descriptions")
        )
        places = [f"candidate {qid} of {one}" for qid, one in zip(qids, ids, strict=True)]
        images = table["candidate_images"].combine_chunks().flatten()
        return _entity_columns(qids, names, descriptions, self.pictures.add(images, places))

    def _count_texts(self, kinds: dict[str, list[str | None]]) -> None:
        for kind, texts in kinds.items():
            known = [text for text in texts if text is not None]
            self.texts[kind]["texts"] += len(known)
            self.texts[kind]["long"] += sum(len(text) > NAME_LENGTH for text in known)
            self.texts[kind]["control"] += sum(bool(_CONTROL.search(text)) for text in known)

    def _count_sources(self, table: pa.Table, mentions: Digests, candidates: Iterable[Digests]) -> None:
        sources = (table[name].to_pylist() for name in ("licences", "image_urls"))
        for mention, others, licences, urls in zip(mentions, candidates, *sources, strict=False):
            for picture, licence, url in zip_longest([mention, *others], licences or (), urls or ()):
                if picture:
                    self.licences[licence] += 1
                    self.urls += bool(url)


def _entity_columns(
    qids: list[str | None], names: list[str | None], descriptions: list[str | None], pictures: Digests
) -> Columns:
    return {
        "qid": _digests(qids),
        "label": _digests(names),
        "name": _digests(map(fold, names)),
        "description": _digests(descriptions),
        "picture": pictures,
    }


def _digests(values: Iterable[str | None]) -> Digests:
    return np.array([digest(value) for value in values], dtype=np.uint64)


def _numbers(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return np.asarray(column.cast(pa.int64()).fill_null(-1))


def _joined(parts: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class _File:
    """A Parquet file with its number of rows, its split (of entities: "train") and its columns of encoded pictures."""

    path: Path
    count: int
    split: str
    pictures: tuple[str, ...]

    def open(self) -> pq.ParquetFile:
        """Opens the file so that rows which share a picture share its bytes: it stands once in a row group."""
        return pq.ParquetFile(self.path, read_dictionary=self.pictures, buffer_size=1 << 20, pre_buffer=False)

    def row(self, position: int) -> Row:
        with _readable(self.path), self.open() as file:
            for group in range(file.num_row_groups):
                if position < (count := file.metadata.row_group(group).num_rows):
                    return dict(file.read_row_group(group).slice(position, 1).to_pylist()[0])
                position -= count
        raise IndexError(position)


def _each_group(files: Iterable[_File], take: Callable[[pa.Table], Any], bar: Any) -> list[Any]:
    """Returns what is taken of each row group, of which one at a time is in memory."""
    taken = []
    for one in files:
        with _readable(one.path), one.open() as file:
            for group in range(file.num_row_groups):
                taken.append(take(file.read_row_group(group)))
                bar.update(file.metadata.row_group(group).num_rows)
    return taken


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what pyarrow raises of a broken file into the one error that a user is meant to read."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise M3ELError(f"{path} cannot be read ({one_line(error)}): build the dataset again") from error


def _files(folder: Path, kind: str, features: Features) -> list[_File]:
    """Lists the Parquet files of ``data``, ``mentions`` or ``entities``.

    Raises:
        M3ELError: If there is none, or one is not of this version.
    """
    files = []
    for path in sorted((folder / kind).rglob("*.parquet")):
        with _readable(path), pq.ParquetFile(path) as file:
            missing = [name for name in features if name not in file.schema_arrow.names]
            pictures = tuple(column.path for column in file.schema if column.path.endswith(".bytes"))
            files.append(_File(path, file.metadata.num_rows, path.name.split("-")[0], pictures))
        if missing:
            raise M3ELError(f"{path} lacks the columns {', '.join(missing)}: build the dataset again")
        if files[-1].split not in SPLITS:
            raise M3ELError(f"{path} is of no split ({', '.join(SPLITS)}): build the dataset again")
    if not files or (kind != "entities" and not any(file.count for file in files)):
        raise M3ELError(f"{folder} holds no {kind}: build the dataset again")
    return sorted(files, key=lambda file: SPLITS.index(file.split))  # of what is doubled, the first is in train


def _read(files: Iterable[_File], position: int) -> Row:
    for file in files:
        if position < file.count:
            return file.row(position)
        position -= file.count
    raise IndexError(position)
