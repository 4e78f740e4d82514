"""The splits of an earlier version, so that a new one keeps them for every row that both have."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from m3el_hf.data.manifest import Manifest
from m3el_hf.data.schema import SPLITS, Record
from m3el_hf.errors import M3ELError, one_line
from m3el_hf.sources import fetch_built

_COLUMNS = ["answer_qid", "mention", "context"]
"""What a row is known by: its id may hold its place in the source, which moves."""


class PreviousSplits:
    """Knows the split that a row had in an earlier version.

    Args:
        source: A folder that `m3el-hf data build` wrote, or a Hub id.

    Attributes:
        name: The folder's name, or the Hub id.
        revision: Which version it is: `Manifest.revision`.
        rows: How many records were found in it; grows with `apply`.

    Raises:
        M3ELError: If it cannot be read.
    """

    def __init__(self, source: str | Path) -> None:
        folder = fetch_built(source, "text/**", "mentions/**")
        self.name = folder.resolve().name if folder == Path(source) else str(source)
        self.revision = Manifest.load(folder).revision
        self.rows = 0
        self._splits: dict[bytes, str] = {}
        for path in _row_files(folder):
            split = path.name.partition("-")[0]
            try:
                rows = pq.read_table(path, columns=_COLUMNS).to_pylist()
            except (OSError, pa.ArrowException) as error:
                raise M3ELError(f"{path} cannot be read: {one_line(error)}") from error
            for row in rows:  # of a row in two splits: never train on a held-out one
                key = _key(*(row[name] for name in _COLUMNS))
                self._splits[key] = max(split, self._splits.get(key, split), key=SPLITS.index)

    def apply(self, record: Record) -> Record:
        """Returns the record with the split that it had, unless it has a released one."""
        split = self._splits.get(_key(record.answer_qid, record.mention, record.context))
        if split is None or record.split is not None:
            return record
        self.rows += 1
        return replace(record, split=split)

    def provenance(self) -> dict[str, str | int]:
        """Says what was kept of which version, for the manifest."""
        return {"name": self.name, "revision": self.revision, "rows": self.rows}


def _key(*values: str | None) -> bytes:
    return hashlib.blake2b(repr(values).encode(), digest_size=8).digest()


def _row_files(folder: Path) -> list[Path]:
    return [*(folder / "text").rglob("*.parquet"), *(folder / "mentions").glob("*.parquet")]
