"""Writes the dataset repository folder: Parquet that plain `load_dataset` reads without this package."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from tqdm import tqdm

from m3el_hf.data.card import render_dataset_card
from m3el_hf.data.rows import Collection, Row, collect
from m3el_hf.data.schema import ENTITY_FEATURES, IMAGE_COLUMNS, ROW_FEATURES, SPLITS
from m3el_hf.errors import M3ELError
from m3el_hf.sources import is_built

ROWS_PER_SHARD = 4000
"""About 200 MB of rows with four pictures each."""

ROWS_PER_GROUP = 100
"""Rows of a Parquet row group: what a streaming reader fetches at a time."""

TEXT_FEATURES = Features({name: feature for name, feature in ROW_FEATURES.items() if name not in IMAGE_COLUMNS})


def build(
    reader: str,
    folder: Path | None,
    output: Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> Collection:
    """Reads a source and writes the dataset repository folder of it.

    Everything is written beside ``output`` where `load_dataset` does not look, and renamed once it is complete, so an
    interrupted build leaves nothing that loads.

    Args:
        reader: A name of `m3el_hf.data.readers.READERS`.
        folder: Where the source lies; None for a reader that needs none.
        output: The folder to write.
        seed: Seeds the splits (where the source has none) and the order of candidates.
        overwrite: Replace ``output`` if it exists.
        progress: Show a progress bar.
        **options: The reader's own options.

    Returns:
        What was read, with the report of what was skipped or missing.

    Raises:
        M3ELError: If ``output`` exists and is not to be overwritten, or the source cannot be used.
    """
    if folder is not None and folder.resolve().is_relative_to(output.resolve()):
        raise M3ELError(f"{output} holds the source: choose another --output")
    if output.exists() and not overwrite:
        raise M3ELError(f"{output} exists already: pass --overwrite to replace it, or choose another --output")
    if output.exists() and not is_built(output):
        raise M3ELError(f"{output} is no built dataset and is not replaced: choose another --output")
    collection = collect(reader, folder, seed, **options)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    work = partial / ".build"  # load_dataset passes over hidden folders
    work.mkdir(parents=True)
    with tqdm(total=len(collection.records), unit=" rows", desc=f"writing {output}", disable=not progress) as bar:
        for topic in collection.topics:
            for split in SPLITS:
                if count := collection.count(split, topic):
                    _write_rows(work, f"{topic}/{split}", count, _watched(collection.rows(split, topic), bar))
    _write_shard(work / "entities" / "train-00000-of-00001.parquet", ENTITY_FEATURES, collection.entities())
    (work / "README.md").write_text(render_dataset_card(collection, reader), encoding="utf-8")
    if output.exists():  # moved, not removed: half of it would still load
        os.rename(output, partial / ".replaced")
    os.rename(work, output)
    shutil.rmtree(partial)
    return collection


def _watched(rows: Iterator[Row], bar: tqdm) -> Iterator[Row]:
    for row in rows:
        yield row
        bar.update()


def _write_rows(work: Path, name: str, count: int, rows: Iterator[Row]) -> None:
    """Writes ``data/<name>-*`` with the pictures and ``text/<name>-*`` without."""
    shards = -(-count // ROWS_PER_SHARD)
    for shard in range(shards):
        file = f"{name}-{shard:05d}-of-{shards:05d}.parquet"
        kept: list[Row] = []
        _write_shard(work / "data" / file, ROW_FEATURES, _keep_text(islice(rows, ROWS_PER_SHARD), kept))
        _write_shard(work / "text" / file, TEXT_FEATURES, kept)


def _keep_text(rows: Iterable[Row], kept: list[Row]) -> Iterator[Row]:
    for row in rows:
        kept.append({name: row[name] for name in TEXT_FEATURES})
        yield row


def _write_shard(path: Path, features: Features, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = iter(rows)
    schema = features.arrow_schema
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(islice(rows, ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
