"""The generated world as a reader: it reads nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from m3el_hf.data.mini import read_mini
from m3el_hf.data.schema import Reader, Record, Report
from m3el_hf.errors import M3ELError


def generate_mini(folder: Path | None, report: Report, instances: int = 2000) -> Iterator[Record]:
    """Yields the generated world of seed 0.

    Args:
        folder: None.
        report: Counts the instances.
        instances: How many.

    Raises:
        M3ELError: If there is a folder, or ``instances`` is below 1 or more than the names last for.
    """
    if folder is not None:
        raise M3ELError(f"mini is generated, it reads nothing: leave {folder} out, or use another reader")
    for record in read_mini(instances):
        report.read += 1
        yield record


MINI = Reader(
    title="M3EL mini",
    records=generate_mini,
    about="""A generated world in the shape of M³EL, for trying everything out: invented entities with ambiguous names,
drawn pictures, and sentences that always single out their entity.""",
    caveats="""Names, sentences and pictures are drawn at random from small tables: figures say that software works,
nothing about linking in the wild.""",
    licence="Generated; free of third-party material. Its licence is that of m3el_hf, Apache 2.0.",
    license_id="apache-2.0",
)
