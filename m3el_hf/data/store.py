"""Writes the dataset repository folder: Parquet that plain `load_dataset` reads without this package."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from filelock import FileLock, Timeout
from tqdm import tqdm

from m3el_hf.data.card import render_dataset_card
from m3el_hf.data.collection import Collection, Piece, Spool, collect
from m3el_hf.data.images import SHORT_SIDE, PictureStore
from m3el_hf.data.manifest import Manifest
from m3el_hf.data.previous import PreviousSplits
from m3el_hf.data.rows import Row, RowMaker, check_protocol
from m3el_hf.data.schema import ENTITY_FEATURES, IMAGE_COLUMNS, MENTION_FEATURES, ROW_FEATURES, SPLITS, Report
from m3el_hf.errors import M3ELError
from m3el_hf.sources import fingerprint, is_built

ROWS_PER_SHARD = 4000
"""About 200 MB of rows with four reduced pictures each."""

ROWS_PER_SHARD_OF_ORIGINALS = 250
"""The same with original pictures, of about 200 kB each."""

ROWS_PER_GROUP = 100
"""Rows of a Parquet row group, at most: what a streaming reader fetches at a time."""

BYTES_PER_GROUP = 1 << 25
"""Pictures of a row group, at most, in bytes before any is stored once: what a writer holds."""

_LOCK = ".lock"

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


def build(
    reader: str,
    folder: Path | None,
    output: Path,
    *,
    seed: int = 0,
    protocol: str = "as_released",
    short_side: int | None = SHORT_SIDE,
    previous: str | Path | None = None,
    num_proc: int = 1,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> Manifest:
    """Reads a source and writes the dataset repository folder of it.

    Everything is written beside ``output`` where `load_dataset` does not look, and renamed once it is complete, so an
    interrupted build leaves nothing that loads. The next one with the same source and settings goes on with it: what
    was finished is not done again, and the result has the same bytes as if nothing had happened.

    Args:
        reader: A name of `m3el_hf.data.readers.READERS`.
        folder: Where the source lies; None for a reader that needs none.
        output: The folder to write.
        seed: Seeds the splits (where the source has none) and the order of candidates.
        protocol: ``"as_released"``, or ``"deleaked"``: without a mention's picture where it is the gold's own.
        short_side: Larger pictures are reduced to this short side, in pixels; None keeps the originals.
        previous: A built folder, or a Hub id, of an earlier version: the rows that it had keep their splits.
        num_proc: Processes that open pictures and write.
        overwrite: Replace ``output`` if it exists.
        progress: Show progress bars.
        **options: The reader's own options.

    Returns:
        What was built, and what was skipped or missing.

    Raises:
        M3ELError: If ``output`` exists and is not to be overwritten, the source cannot be used, or the disk is full.
    """
    check_protocol(protocol)
    if num_proc < 1:
        raise M3ELError(f"{num_proc} processes cannot build anything: ask for 1 or more")
    _check_output(folder, output, overwrite)
    settings = Settings(seed, protocol, short_side)
    known = None if previous is None else PreviousSplits(previous)
    partial = output.with_name(output.name + ".partial")
    with _locked(partial), _Workers(_Writer(partial, settings), num_proc) as workers:
        _start(partial, fingerprint(folder, reader, settings, str(previous), options))
        try:
            collection = collect(
                reader, folder, seed, previous=known, work=partial / ".records", progress=progress, **options
            )
        except M3ELError:
            if not any((partial / ".reports").iterdir()):  # nothing is lost
                shutil.rmtree(partial)
            raise
        shards = _plan(collection, settings)
        workers.write(shards, progress)
        work = partial / ".build"
        reports = [_report(partial, shard) for shard in shards]
        manifest = _manifest(reader, folder, collection, settings, reports, _revision(work))
        _check_nothing_lost(manifest, work)
        manifest.save(work)
        (work / "README.md").write_text(render_dataset_card(manifest), encoding="utf-8")
        if output.exists():  # moved, not removed: half of it would still load
            os.rename(output, partial / ".replaced")
        os.rename(work, output)
        shutil.rmtree(partial)
    return manifest


def _check_output(folder: Path | None, output: Path, overwrite: bool) -> None:
    if folder is not None and folder.resolve().is_relative_to(output.resolve()):
        raise M3ELError(f"{output} holds the source: choose another --output")
    if output.exists() and not overwrite:
        raise M3ELError(f"{output} exists already: pass --overwrite to replace it, or choose another --output")
    if output.exists() and not is_built(output):
        raise M3ELError(f"{output} is no built dataset and is not replaced: choose another --output")


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Makes the folder, keeps a second build away from it, and says in one line why it cannot be written."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with FileLock(partial / _LOCK, timeout=0):
            yield
    except Timeout:
        raise M3ELError(f"another build is writing {partial}: wait for it, or choose another --output") from None
    except OSError as error:  # a full disk, no permission; what readers cannot read is a M3ELError already
        reason = os.strerror(error.errno) if error.errno else error
        advice = "mend that and run the same command again, what is finished is kept"
        raise M3ELError(f"{partial} cannot be written ({reason}): {advice}") from error


def _start(partial: Path, key: str) -> None:
    """Keeps what an interrupted build of the same source and settings has finished, and removes anything else."""
    mark = partial / ".key"
    same = mark.is_file() and mark.read_text() == key
    for path in partial.iterdir():
        if path.name != _LOCK and not (same and path.name in (".key", ".build", ".reports")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in (".build", ".reports", ".records", ".unfinished"):
        (partial / name).mkdir(exist_ok=True)
    mark.write_text(key)


def _plan(collection: Collection, settings: Settings) -> list[Shard]:
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


def _report(partial: Path, shard: Shard) -> Report:
    values = json.loads(_report_path(partial, shard).read_text(encoding="utf-8"))
    return Report(**(values | {"counts": Counter(values["counts"])}))


@dataclass
class _Writer:
    """Writes shards: one for each process, which keeps what its pictures were reduced to."""

    partial: Path
    settings: Settings

    def __post_init__(self) -> None:
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
    """Opens a file that holds a picture once a row group, cut so that the Hub holds it once for all files."""
    schema = features.arrow_schema
    return pq.ParquetWriter(
        path,
        schema,
        compression={leaf: "none" if leaf.endswith(".bytes") else "zstd" for leaf in _leaves(schema)},  # JPEG is dense
        dictionary_pagesize_limit=2 * BYTES_PER_GROUP,
        use_content_defined_chunking=True,
        write_page_index=True,
    )


def _leaves(schema: pa.Schema) -> list[str]:
    """The paths by which Parquet knows the columns."""
    buffer = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), buffer)
    return [column.path for column in pq.ParquetFile(buffer.getvalue()).schema]


class _Workers:
    """Writes shards, in this process or in others, which start while this one still reads the source."""

    def __init__(self, writer: _Writer, num_proc: int) -> None:
        self._writer = writer
        self._pool: ProcessPoolExecutor | None = None
        if num_proc > 1:
            context = get_context("forkserver")  # a fork of this process would copy its threads' locks
            context.set_forkserver_preload([__name__])  # imported once for all
            self._written = context.Value("Q", 0)
            self._pool = ProcessPoolExecutor(num_proc, context, _start_process, (writer, self._written))
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
            futures = {self._pool.submit(_write_in_process, shard) for shard in left}
            try:
                while futures:
                    done, futures = wait(futures, timeout=0.2, return_when=FIRST_EXCEPTION)
                    bar.update(total - missing + self._written.value - bar.n)
                    for future in done:
                        future.result()
            except BrokenProcessPool:
                advice = "run the same command again with a lower --num-proc"
                raise M3ELError(f"a process was killed, perhaps for memory: {advice}") from None


_process: tuple[_Writer, Any]


def _start_process(writer: _Writer, written: Any) -> None:
    global _process
    _process = writer, written
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt is for the parent to tell of
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


def _manifest(
    reader: str,
    folder: Path | None,
    collection: Collection,
    settings: Settings,
    reports: list[Report],
    revision: str,
) -> Manifest:
    report = collection.report
    unusable = dict(report.unusable_images)
    counts = Counter(report.counts)
    for one in reports:
        unusable |= one.unusable_images
        counts.update(one.counts)
    return Manifest(
        title=collection.reader.title,
        reader=reader,
        kind="knowledge_base" if collection.reader.entities else "candidates",
        **asdict(settings),
        source=None if folder is None else folder.resolve().name,
        released_splits=collection.released,
        rows={
            topic: {split: count for split in SPLITS if (count := collection.count(split, topic))}
            for topic in collection.topics
        },
        entities=collection.entities,
        revision=revision,
        read=report.read,
        skipped=report.skipped,
        entities_read=report.entities_read,
        entities_skipped=report.entities_skipped,
        unusable_images=dict(sorted(unusable.items())),
        counts=dict(sorted(counts.items())),
        software={package: version(package) for package in ("m3el-hf", "datasets", "pyarrow", "pillow")},
    )


def _revision(work: Path) -> str:
    """Returns a digest of all data files."""
    digest = hashlib.sha256()
    for path in sorted(work.rglob("*.parquet")):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(work)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _check_nothing_lost(manifest: Manifest, work: Path) -> None:
    """Checks that whatever was read is in the files or reported, and nothing else is.

    Raises:
        RuntimeError: If not; no input can be the reason.
    """
    kind = "mentions" if manifest.kind == "knowledge_base" else "data"
    rows, entities = (
        sum(pq.read_metadata(path).num_rows for path in (work / name).rglob("*.parquet")) for name in (kind, "entities")
    )
    if manifest.read != rows + len(manifest.skipped):
        raise RuntimeError(f"{manifest.read} instances read, but {rows} written and {len(manifest.skipped)} skipped")
    known = manifest.entities_read - len(manifest.entities_skipped) if kind == "mentions" else manifest.entities
    if entities != known:
        raise RuntimeError(f"{known} entities read, but {entities} written")
