"""The files of a dataset repository: which rows go where, and how they are written, in one process or several."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread, current_thread, main_thread
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from tqdm import tqdm

from m3el_hf.data.collection import Collection, Piece, Spool
from m3el_hf.data.images import SHORT_SIDE, PictureStore, keep_freed_memory
from m3el_hf.data.rows import Row, RowMaker
from m3el_hf.data.schema import ENTITY_FEATURES, IMAGE_COLUMNS, MENTION_FEATURES, ROW_FEATURES, SPLITS, Report
from m3el_hf.errors import M3ELError

ROWS_PER_SHARD = 4000
"""About 200 MB of rows with four reduced pictures each."""

ROWS_PER_SHARD_OF_ORIGINALS = 250
"""The same with original pictures, of about 200 kB each."""

ROWS_PER_GROUP = 100
"""Rows of a Parquet row group, at most: what a streaming reader fetches at a time."""

BYTES_PER_GROUP = 1 << 25
"""Pictures of a row group, at most, in bytes before any is stored once: what a writer holds."""

TEXT_FEATURES = Features({name: feature for name, feature in ROW_FEATURES.items() if name not in IMAGE_COLUMNS})


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a built folder, apart from the source.

    Attributes:
        seed: Seeds the splits (where the source has none) and the order of candidates.
        protocol: One of `m3el_hf.data.rows.PROTOCOLS`.
        short_side: Larger pictures are reduced to this short side, in pixels; None keeps the originals.
    """

    seed: int = 0
    protocol: str = "as_released"
    short_side: int | None = SHORT_SIDE


@dataclass(frozen=True)
class Shard:
    """What one process writes in one go: rows with the entities that they describe, or a part of a knowledge base.

    Attributes:
        content: The rows, or positions in the knowledge base.
        rows: Path of the rows' file in the built folder, or None.
        entities: Path of the entities' file, or None.
    """

    content: Piece | range
    rows: str | None
    entities: str | None

    @property
    def files(self) -> dict[str, Features]:
        """The files by their paths in the built folder, with the features of each."""
        found = {}
        if self.rows is not None:
            kind, _, rest = self.rows.partition("/")
            found[self.rows] = MENTION_FEATURES if kind == "mentions" else ROW_FEATURES
            if kind == "data":
                found[f"text/{rest}"] = TEXT_FEATURES
        if self.entities is not None:
            found[self.entities] = ENTITY_FEATURES
        return found

    @property
    def name(self) -> str:
        """A name that no other has."""
        return next(iter(self.files)).replace("/", ".")

    @property
    def size(self) -> int:
        """Number of rows, or of entities of a knowledge base."""
        return len(self.content) if isinstance(self.content, range) else len(self.content.rows)


def plan_shards(collection: Collection, settings: Settings) -> list[Shard]:
    """Lists what is to be written, the largest first, so that processes finish together."""
    size = ROWS_PER_SHARD if settings.short_side else ROWS_PER_SHARD_OF_ORIGINALS
    contents: list[tuple[Piece | range, str | None]] = [(part, None) for part in collection.base(size=size)]
    for topic in collection.topics:
        for split in SPLITS:
            stem = f"mentions/{split}" if collection.reader.entities else f"data/{topic}/{split}"
            pieces = collection.pieces(split, topic, size=size)
            contents += [(piece, _file(stem, k, len(pieces))) for k, piece in enumerate(pieces)]
    describing = [k for k, (content, _) in enumerate(contents) if isinstance(content, range) or content.entities]
    entities = {k: _file("entities/train", number, len(describing)) for number, k in enumerate(describing)}
    shards = [Shard(content, rows, entities.get(k)) for k, (content, rows) in enumerate(contents)]
    return sorted(shards, key=lambda shard: -shard.size)


def _file(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number:05d}-of-{count:05d}.parquet"


def _report_path(partial: Path, shard: Shard) -> Path:
    return partial / ".reports" / f"{shard.name}.json"


def read_report(partial: Path, shard: Shard) -> Report:
    """Returns what the writer of a finished shard reported."""
    values = json.loads(_report_path(partial, shard).read_text(encoding="utf-8"))
    return Report(**(values | {"counts": Counter(values["counts"])}))


@dataclass
class Writer:
    """Writes shards: one for each process, which keeps what its pictures were reduced to."""

    partial: Path
    settings: Settings

    def __post_init__(self) -> None:
        keep_freed_memory()
        self._spool = Spool(self.partial / ".records")
        self._pictures = PictureStore(self.settings.short_side)

    def is_done(self, shard: Shard) -> bool:
        """Whether an interrupted build has finished it."""
        files = [self.partial / ".build" / name for name in shard.files]
        return all(path.is_file() for path in [*files, _report_path(self.partial, shard)])

    def write(self, shard: Shard, advance: Callable[[], object]) -> None:
        """Writes a shard where it is not seen, and moves it into place once it is whole.

        Args:
            shard: What to write.
            advance: Called after each row.
        """
        maker = RowMaker(self._spool, self._pictures, self.settings.seed, self.settings.protocol)
        paths = {name: self._unfinished(name) for name in shard.files}
        with ExitStack() as stack:
            files: dict[str | None, _File] = {
                name: stack.enter_context(_File(paths[name], features)) for name, features in shard.files.items()
            }
            for rows, entities in _contents(shard, maker):
                for row in rows:
                    for name in files.keys() - {shard.entities}:
                        files[name].add(row)
                for entity in entities:
                    files[shard.entities].add(entity)
                advance()
        for name, path in paths.items():
            target = self.partial / ".build" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        # The report comes last: it says that the rest is there.
        self._move_into_place(_report_path(self.partial, shard), json.dumps(vars(maker.report)).encode())

    def _unfinished(self, name: str) -> Path:
        """A file of this process alone."""
        return self.partial / ".unfinished" / f"{os.getpid()}.{name.replace('/', '.')}"

    def _move_into_place(self, target: Path, data: bytes) -> None:
        path = self._unfinished(target.name)
        path.write_bytes(data)
        os.replace(path, target)


def _contents(shard: Shard, maker: RowMaker) -> Iterator[tuple[list[Row], list[Row]]]:
    """Yields a row with the entities that it describes, while their pictures are at hand; or an entity by itself."""
    if isinstance(shard.content, range):
        yield from (([], [entity]) for entity in maker.base(shard.content))
    else:
        pairs = zip(maker.rows(shard.content), maker.described(shard.content), strict=True)
        yield from (([row], entities) for row, entities in pairs)


class _File:
    """A Parquet file to which rows are appended, in groups of `ROWS_PER_GROUP`, or of `BYTES_PER_GROUP` of pictures."""

    def __init__(self, path: Path, features: Features) -> None:
        self._names = list(features)
        self._writer = _parquet_writer(path, features)
        self._group: list[Row] = []
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()

    def add(self, row: Row) -> None:
        """Appends a row, of which only the file's columns count."""
        row = {name: row[name] for name in self._names}
        self._group.append(row)
        self._bytes += sum(len(image["bytes"]) for image in _images(row))
        if len(self._group) == ROWS_PER_GROUP or self._bytes >= BYTES_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._group:
            self._writer.write_table(pa.Table.from_pylist(self._group, schema=self._writer.schema))
            self._group, self._bytes = [], 0


def _images(row: Row) -> list[Row]:
    images = [row.get("image"), row.get("mention_image"), *row.get("candidate_images", ())]
    return [image for image in images if image is not None]


def _parquet_writer(path: Path, features: Features) -> pq.ParquetWriter:
    """Opens a file that holds a picture once a row group, whole, so that the Hub holds it once for all files.

    The Hub cuts files where their bytes say so and keeps equal pieces once. Compressed pages would hide equal pictures
    from it; long texts are compressed, in pages that are cut likewise.
    """
    schema = features.arrow_schema
    leaves = _leaves(schema)
    return pq.ParquetWriter(
        path,
        schema,
        compression={leaf: "none" if leaf.endswith(".bytes") else "zstd" for leaf in leaves},  # JPEG is dense
        use_dictionary=[leaf for leaf in leaves if leaf != "context"],  # sentences seldom come twice
        dictionary_pagesize_limit=2 * BYTES_PER_GROUP,
        use_content_defined_chunking=True,
        write_page_index=True,
    )


def _leaves(schema: pa.Schema) -> list[str]:
    """The paths by which Parquet knows the columns."""
    buffer = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), buffer)
    return [column.path for column in pq.ParquetFile(buffer.getvalue()).schema]


class Workers:
    """Writes shards, in this process or in others, which start while this one still reads the source."""

    def __init__(self, writer: Writer, num_proc: int) -> None:
        self._writer = writer
        self._pool: ProcessPoolExecutor | None = None
        if num_proc > 1:
            context = get_context("forkserver")  # a fork of this process would copy its threads' locks
            context.set_forkserver_preload([__name__])  # imported once for all
            self._written = context.Value("Q", 0)
            interruptible = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
            arguments = (writer.partial, writer.settings, self._written, interruptible)
            self._pool = ProcessPoolExecutor(num_proc, context, _start_process, arguments)
            with _interrupts_wait():
                for _ in range(num_proc):
                    self._pool.submit(int)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def write(self, shards: list[Shard], progress: bool) -> None:
        """Writes the shards that are not done.

        Raises:
            M3ELError: If a process was killed.
        """
        left = [shard for shard in shards if not self._writer.is_done(shard)]
        total, missing = (sum(shard.size for shard in one) for one in (shards, left))
        with tqdm(total=total, initial=total - missing, unit=" rows", desc="writing", disable=not progress) as bar:
            if self._pool is None:
                for shard in left:
                    self._writer.write(shard, bar.update)
                return
            try:
                futures = {self._pool.submit(_write_in_process, shard) for shard in left}
                while futures:
                    done, futures = wait(futures, timeout=0.2, return_when=FIRST_EXCEPTION)
                    bar.update(total - missing + self._written.value - bar.n)
                    for future in done:
                        future.result()
            except BrokenProcessPool:
                raise M3ELError(
                    "a process ended, perhaps for memory: run the same again with fewer processes, "
                    "and in a script call build under `if __name__ == '__main__':`"
                ) from None


_process: tuple[Writer, Any]


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Puts an interrupt off, which would leave a process half started; those that start meanwhile put it off, too."""
    came: list[object] = []
    is_main = current_thread() is main_thread()  # no other may have handlers
    before = signal.getsignal(signal.SIGINT)
    if is_main and before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: came.append(None))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_main:
            signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def _start_process(partial: Path, settings: Settings, written: Any, interruptible: bool) -> None:
    global _process
    # An interrupt is for the parent to tell of; one that came while this process was starting ends it now.
    signal.signal(signal.SIGINT, signal.SIG_DFL if interruptible else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _process = Writer(partial, settings), written
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when the one that started it is killed; it would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _write_in_process(shard: Shard) -> None:
    writer, written = _process

    def advance() -> None:
        with written.get_lock():
            written.value += 1

    writer.write(shard, advance)
