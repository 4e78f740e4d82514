"""Writes the dataset repository folder: Parquet that plain `load_dataset` reads without this package."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from m3el_hf.data.card import render_dataset_card
from m3el_hf.data.collection import Collection, collect
from m3el_hf.data.images import SHORT_SIDE
from m3el_hf.data.manifest import Manifest, save_unusable_images
from m3el_hf.data.previous import PreviousSplits
from m3el_hf.data.rows import check_protocol
from m3el_hf.data.schema import SPLITS, Report
from m3el_hf.data.shards import Settings, Workers, Writer, plan_shards, read_report
from m3el_hf.errors import M3ELError, one_line
from m3el_hf.sources import fingerprint, is_built

_LOCK = ".lock"


def build(
    reader: str,
    folder: Path | None,
    output: Path,
    *,
    seed: int = 0,
    protocol: str = "as_released",
    short_side: int | None = SHORT_SIDE,
    title: str | None = None,
    license_id: str | None = None,
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
        title: What the data is called; None for what the reader calls it.
        license_id: Its licence, as the Hub abbreviates it (``"cc-by-4.0"``); None for what the reader knows of it.
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
    if license_id is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license_id):
        raise M3ELError(f"{license_id!r} is no licence as the Hub abbreviates it: pass one such as cc-by-4.0")
    output = output.resolve()
    _check_output(folder, output, overwrite)
    settings = Settings(seed, protocol, short_side)
    partial = output.with_name(output.name + ".partial")
    writer = Writer(partial, settings)
    with _locked(partial, folder), Workers(writer, num_proc) as workers:
        if (partial / ".replaced").exists() and not output.exists():  # killed between the two moves below
            os.rename(partial / ".replaced", output)
        try:
            known = None if previous is None else PreviousSplits(previous)
            _start(partial, fingerprint(folder, reader, settings, known and known.revision, options, _software()))
            collection = collect(
                reader, folder, seed, previous=known, work=partial / ".records", progress=progress, **options
            )
        except M3ELError:
            if not any(partial.glob(".reports/*")):  # nothing is lost
                shutil.rmtree(partial)
            raise
        shards = plan_shards(collection, settings)
        workers.write(shards, progress)
        work = partial / ".build"
        reports = [read_report(partial, shard) for shard in shards]
        unusable = _unusable_images([collection.report, *reports], folder)
        manifest = _manifest(reader, folder, collection, settings, known, reports, unusable, _revision(work))
        manifest = replace(
            manifest, title=one_line(title or manifest.title), license_id=license_id or manifest.license_id
        )
        _check_nothing_lost(manifest, work)
        manifest.save(work)
        save_unusable_images(work, unusable)
        (work / "README.md").write_text(render_dataset_card(manifest), encoding="utf-8")
        if output.exists():  # moved, not removed: half of it would still load
            os.rename(output, partial / ".replaced")
        os.rename(work, output)
        shutil.rmtree(partial)
    return manifest


def _check_output(folder: Path | None, output: Path, overwrite: bool) -> None:
    if folder is not None and folder.resolve().is_relative_to(output):
        raise M3ELError(f"{output} holds the source: choose another --output")
    if folder is not None and output.is_relative_to(folder.resolve()):
        raise M3ELError(f"{output} lies in the source, which is only read: choose another --output")
    if folder is not None and is_built(folder):
        raise M3ELError(f"{folder} is a built dataset: pass the folder of the raw release that it was built from")
    if re.search(r"[][*?]", str(output)):
        raise M3ELError(f"{output} has a bracket, a * or a ? in it, which load_dataset takes for a pattern: rename it")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not is_built(output):
        raise M3ELError(f"{output} is no built dataset and is never replaced: choose another --output, or remove it")
    if not overwrite:
        raise M3ELError(f"{output} exists already: pass --overwrite to replace it, or choose another --output")


@contextmanager
def _locked(partial: Path, source: Path | None) -> Iterator[None]:
    """Makes the folder, keeps a second build away from it, and says in one line what cannot be written, or read."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with FileLock(partial / _LOCK, timeout=0):
            yield
    except Timeout:
        raise M3ELError(f"another build is writing {partial}: wait for it, or choose another --output") from None
    except OSError as error:  # a full disk, no permission
        reason = os.strerror(error.errno) if error.errno else error
        name = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
        what = f"{partial} cannot be written"
        if name and source and name.is_relative_to(source):
            what = f"{name} cannot be read"
        raise M3ELError(
            f"{what} ({reason}): fix that and run the same command again, what is finished is kept"
        ) from error


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


def _manifest(
    reader: str,
    folder: Path | None,
    collection: Collection,
    settings: Settings,
    previous: PreviousSplits | None,
    reports: list[Report],
    unusable: dict[str, str],
    revision: str,
) -> Manifest:
    report = collection.report
    counts = Counter(report.counts)
    for one in reports:
        counts.update(one.counts)
    return Manifest(
        title=collection.report.title or collection.reader.title,
        license_id=collection.reader.license_id,
        reader=reader,
        kind="knowledge_base" if collection.reader.entities else "candidates",
        **asdict(settings),
        source=None if folder is None else folder.resolve().name,
        released_splits=collection.released == report.read - len(report.skipped),
        rows={
            topic: {split: count for split in SPLITS if (count := collection.count(split, topic))}
            for topic in collection.topics
        },
        entities=collection.entities,
        revision=revision,
        read=report.read,
        previous=None if previous is None else previous.provenance(),
        skipped=report.skipped,
        entities_read=report.entities_read,
        entities_skipped=report.entities_skipped,
        unusable_image_count=len(unusable),
        counts=dict(sorted(counts.items())),
        software=_software(),
    )


def _software() -> dict[str, str]:
    """The versions of what decides the bytes of a built folder."""
    return {package: version(package) for package in ("m3el-hf", "datasets", "pyarrow", "pillow")}


def _unusable_images(reports: list[Report], folder: Path | None) -> dict[str, str]:
    """The reason by the file's path in the source: where that lies on this machine is nobody's business."""
    reasons = {file: reason for report in reports for file, reason in report.unusable_images.items()}
    start = "" if folder is None else f"{folder}{os.sep}"
    return {file.removeprefix(start): reason for file, reason in sorted(reasons.items())}


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
