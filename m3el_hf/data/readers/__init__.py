"""One file a raw format: how it is read into records, and what is to be said of it."""

from __future__ import annotations

from m3el_hf.data.readers import m3el, melbench, mimic, mini, wikidiverse
from m3el_hf.data.schema import Reader
from m3el_hf.errors import M3ELError

READERS: dict[str, Reader] = {
    "m3el": m3el.M3EL,
    "mimic": mimic.MIMIC,
    "melbench": melbench.MELBENCH,
    "wikidiverse": wikidiverse.WIKIDIVERSE,
    "wikidiverse-candidates": wikidiverse.WIKIDIVERSE_CANDIDATES,
    "mini": mini.MINI,
}


def get_reader(name: str) -> Reader:
    """Looks a reader up by name.

    Raises:
        M3ELError: If there is no such reader.
    """
    if name not in READERS:
        raise M3ELError(f"unknown reader {name!r}: choose one of {', '.join(READERS)}")
    return READERS[name]
