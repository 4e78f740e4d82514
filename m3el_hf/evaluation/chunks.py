"""Entities in chunks that never change their composition: encoded once, kept on disk, the same bits in every run."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from m3el_hf.data.collator import EntityRow
from m3el_hf.errors import M3ELError, one_line
from m3el_hf.evaluation.systems import System
from m3el_hf.modeling.encoded_clipnd import Encoded, MatchingEntities

CHUNK = 256
"""Entities that are encoded at once. What stands with an entity in a chunk decides the last digits of its numbers."""

HELD, HELD_ANEW = 8, 256
"""Encoded chunks that are kept in memory for a system: rows near one another share candidates. More of a system that
has no fingerprint, which would encode them anew: a baseline's take a few hundred kilobytes each."""

_CLASSES = {kind.__name__: kind for kind in (Encoded, MatchingEntities)}


def entity_key(entity: EntityRow) -> bytes:
    """Returns a digest of all that is known of an entity, its picture's bytes included."""
    digest = hashlib.blake2b(repr(entity[:3]).encode("utf-8", "surrogatepass"), digest_size=16)
    digest.update(b"" if entity.image is None else b"picture" + entity.image["bytes"])
    return digest.digest()


class EncodedStore:
    """Encoded chunks of entities in a folder.

    A file's name tells what encoded it and what was encoded, so that another model, another processor or other data
    never find it. A file is whole or not there.

    Args:
        folder: Where the files are; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, fingerprint: str, key: str) -> Encoded | None:
        """Returns a chunk as it was saved, or None where there is none."""
        try:
            with safe_open(self._path(fingerprint, key), "pt") as file:
                about = file.metadata()
                # Copies: a mapped file that somebody cuts short ends the process.
                tensors: dict[str, Any] = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return _CLASSES[about["kind"]](**tensors, fingerprint=about.get("weights"))
        except (OSError, SafetensorError, TypeError, KeyError):  # not there, cut short, or not one of ours
            return None

    def save(self, fingerprint: str, key: str, encoded: Encoded) -> None:
        """Writes a chunk.

        Raises:
            M3ELError: If the disk is full, or cannot be written for another reason.
        """
        path = self._path(fingerprint, key)
        about = {"kind": type(encoded).__name__}
        if encoded.fingerprint is not None:
            about["weights"] = encoded.fingerprint
        partial = path.with_suffix(f".{uuid4().hex}.partial")  # several processes may write the same chunk
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: one.contiguous() for name, one in encoded.tensors().items()}, partial, about)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise M3ELError(
                f"cannot keep encoded entities in {self.folder}: {one_line(error)[:200]}; make room on the disk, or "
                "choose another cache_dir"
            ) from error

    def _path(self, fingerprint: str, key: str) -> Path:
        return self.folder / fingerprint / f"{key}.safetensors"


class Chunks:
    """The entities that are scored, chunk by chunk.

    Args:
        read: Returns the entities of a chunk.
        count: How many chunks there are.
        store: Where what systems with a fingerprint encode is kept.
    """

    def __init__(self, read: Callable[[int], Sequence[EntityRow]], count: int, store: EncodedStore) -> None:
        self._read, self.count, self._store = read, count, store
        self._held: defaultdict[object, OrderedDict[int, Any]] = defaultdict(OrderedDict)

    def __len__(self) -> int:
        return self.count

    def encoded(self, system: System, fingerprint: str | None, number: int) -> Any:
        """Returns what a system makes of a chunk.

        Args:
            system: The system.
            fingerprint: Its fingerprint, which takes a while to ask for.
            number: Which chunk.
        """
        held = self._held[fingerprint or id(system)]
        if number not in held:
            held[number] = self._made(system, fingerprint, number)
            if len(held) > (HELD if fingerprint is not None else HELD_ANEW):
                held.popitem(last=False)
        held.move_to_end(number)
        return held[number]

    def _made(self, system: System, fingerprint: str | None, number: int) -> Any:
        entities = self._read(number)
        if fingerprint is None:
            return system.encode_entities(entities)
        key = hashlib.blake2b(b"".join(map(entity_key, entities)), digest_size=16).hexdigest()
        encoded = self._store.load(fingerprint, key)
        if encoded is None:
            encoded = system.encode_entities(entities)
            self._store.save(fingerprint, key, encoded.to("cpu"))
        return encoded
