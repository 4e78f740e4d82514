"""One file a raw format. A reader yields `Record`s in a fixed order and reports what it had to skip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from m3el_hf.data.mini import read_mini
from m3el_hf.data.readers.m3el import read_m3el
from m3el_hf.data.schema import Record, Report
from m3el_hf.errors import M3ELError

Reader = Callable[..., Iterator[Record]]
"""Takes the source's folder, a `Report`, and the reader's own options."""


def _generate_mini(folder: Path | None, report: Report, instances: int = 2000) -> Iterator[Record]:
    if folder is not None:
        raise M3ELError(f"mini is generated, it reads nothing: leave {folder} out, or use another reader")
    for record in read_mini(instances):
        report.read += 1
        yield record


READERS: dict[str, Reader] = {
    "m3el": read_m3el,
    "mini": _generate_mini,
}
