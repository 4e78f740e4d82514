"""The splits of an earlier version, so that a new one keeps them for every row that both have."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from m3el_hf.data.manifest import FILE_NAME, Manifest
from m3el_hf.data.schema import Record
from m3el_hf.errors import M3ELError
from m3el_hf.sources import check_source

_COLUMNS = ["answer_qid", "mention", "context"]
"""What a row is known by: its id may hold its place in the source, which moves."""


class PreviousSplits:
    """Knows the split that a row had in an earlier version.

    Args:
        source: A folder that `m3el-hf data build` wrote, or a Hub id.

    Attributes:
        revision: Which version it is: `Manifest.revision`.

    Raises:
        M3ELError: If it cannot be read.
    """

    def __init__(self, source: str | Path) -> None:
        folder = _fetch(check_source(source))
        self.revision = Manifest.load(folder).revision
        self._splits: dict[bytes, str] = {}
        for path in _row_files(folder):
            split = path.name.partition("-")[0]
            for batch in pq.ParquetFile(path).iter_batches(columns=_COLUMNS):
                for row in batch.to_pylist():
                    self._splits[_key(*(row[name] for name in _COLUMNS))] = split

    def apply(self, records: Iterator[Record]) -> Iterator[Record]:
        """Gives each record that has no released split the one that it had."""
        for record in records:
            split = self._splits.get(_key(record.answer_qid, record.mention, record.context))
            yield record if record.split is not None else replace(record, split=split)


def _key(*values: str | None) -> bytes:
    return hashlib.blake2b(repr(values).encode(), digest_size=8).digest()


def _fetch(source: str) -> Path:
    if Path(source).is_dir():
        folder = Path(source)
    else:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        patterns = [FILE_NAME, "text/**", "mentions/**"]
        try:
            folder = Path(snapshot_download(source, repo_type="dataset", allow_patterns=patterns))
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise M3ELError(f"{source} cannot be fetched: {' '.join(str(error).split())}") from error
    return folder


def _row_files(folder: Path) -> list[Path]:
    return [*(folder / "text").rglob("*.parquet"), *(folder / "mentions").glob("*.parquet")]
