"""What a build says of itself, in `manifest.json`: the card and the audit are made from it."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from m3el_hf.errors import M3ELError, one_line

FILE_NAME = "manifest.json"
UNUSABLE_IMAGES = "unusable_images.csv"
"""Beside the manifest, where some picture cannot be had: there may be very many, and the manifest is read often."""


@dataclass(frozen=True)
class Manifest:
    """The provenance of a built folder.

    Attributes:
        title: What the data is called.
        license_id: Its licence, as the Hub abbreviates it; ``"unknown"`` where nobody says.
        reader: The raw format, a name of `m3el_hf.data.readers.READERS`.
        kind: ``"candidates"`` where each mention has candidates of its own, ``"knowledge_base"`` where every entity is
            one.
        protocol: One of `m3el_hf.data.rows.PROTOCOLS`.
        seed: Seeded the splits and the order of candidates.
        short_side: Pictures were reduced to this short side, in pixels; None where the originals were kept.
        source: Name of the folder that was read; None for generated data.
        released_splits: Whether every row has the split that its source gives it.
        rows: Number of rows by topic, then by split; the topic is ``"mentions"`` where the source has none.
        entities: Number of entities.
        revision: Changes with any byte of the data files.
        read: Instances found in the source.
        previous: The earlier version whose splits were kept: its ``name``, its ``revision``, and how many ``rows`` it
            shares with this one. None where nobody asked for one.
        skipped: ``"file row N: reason"`` for each instance that could not be used.
        entities_read: Entities found in the source's knowledge base, where it has one.
        entities_skipped: ``"file row N: reason"`` for each that could not be used.
        unusable_image_count: How many pictures are named but cannot be had; `read_unusable_images` has the reasons.
        counts: Anything else worth a line, by name.
        software: Versions, by name.
    """

    title: str
    license_id: str
    reader: str
    kind: str
    protocol: str
    seed: int
    short_side: int | None
    source: str | None
    released_splits: bool
    rows: dict[str, dict[str, int]]
    entities: int
    revision: str
    read: int
    previous: dict[str, str | int] | None = None
    skipped: list[str] = field(default_factory=list)
    entities_read: int = 0
    entities_skipped: list[str] = field(default_factory=list)
    unusable_image_count: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    software: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The number of rows."""
        return sum(sum(splits.values()) for splits in self.rows.values())

    def save(self, folder: Path) -> None:
        """Writes ``manifest.json`` into a folder."""
        text = json.dumps(asdict(self), ensure_ascii=False, indent=1)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads the manifest of a built folder.

        Raises:
            M3ELError: If the folder has none, or not one of this version.
        """
        try:
            values: dict[str, Any] = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
            return cls(**values)
        except (FileNotFoundError, NotADirectoryError):
            raise M3ELError(f"{folder} is no built dataset: build it first with m3el-hf data build") from None
        except (OSError, ValueError, TypeError) as error:
            raise M3ELError(
                f"{folder / FILE_NAME} cannot be read ({one_line(error)}): build the dataset again"
            ) from error


def save_unusable_images(folder: Path, reasons: Mapping[str, str]) -> None:
    """Writes why pictures cannot be had, a line each, where there are some.

    Args:
        folder: The built folder.
        reasons: The reason by the file, as the source names it.
    """
    if reasons:
        with (folder / UNUSABLE_IMAGES).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("file", "reason"), *reasons.items()])


def read_unusable_images(folder: Path) -> dict[str, str]:
    """Reads why pictures of a built folder cannot be had, by file."""
    path = folder / UNUSABLE_IMAGES
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}
