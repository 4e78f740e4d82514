"""From records to rows: shuffle the candidates, open the pictures, flag what gives the gold away."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from m3el_hf.data.collection import Piece, Spool
from m3el_hf.data.images import PictureStore
from m3el_hf.data.schema import Entity, Picture, Record, Report
from m3el_hf.errors import M3ELError
from m3el_hf.modeling.decoding_clipnd import UnusableImageError

Row = dict[str, Any]

PROTOCOLS = ("as_released", "deleaked")
"""As a source has it, or with the mention's picture removed where it is the gold's own."""

SAME_FILE = "rows for which the source names one file as the mention's and the gold's picture"
REMOVED = "mention pictures removed, as they were the gold's own"


def check_protocol(name: str) -> str:
    """Returns ``name`` if it is one of `PROTOCOLS`.

    Raises:
        M3ELError: If it is not.
    """
    if name not in PROTOCOLS:
        raise M3ELError(f"unknown protocol {name!r}: choose one of {', '.join(PROTOCOLS)}")
    return name


@dataclass
class RowMaker:
    """Makes rows of spooled records.

    Attributes:
        spool: Where the records and entities are.
        pictures: Decodes and reduces.
        seed: Seeds the order of candidates.
        protocol: One of `PROTOCOLS`.
        report: Grows while rows are made, by the pictures that cannot be had, `SAME_FILE` and `REMOVED`.
    """

    spool: Spool
    pictures: PictureStore
    seed: int = 0
    protocol: str = "as_released"
    report: Report = field(default_factory=Report)

    def rows(self, piece: Piece) -> Iterator[Row]:
        """Yields the rows of a piece, of `ROW_FEATURES`, or of `MENTION_FEATURES` where there is a knowledge base."""
        for plan in piece.rows:
            record = self.spool.record(plan.position)
            if record.candidates:
                yield self._linking_row(record, plan.group) | {"topic": piece.topic}  # as its folder is called
            else:
                gold = None if plan.gold is None else self.spool.entity(plan.gold)
                yield self._mention_row(record, plan.group, gold, None if gold is None else self._image(gold.picture))

    def described(self, piece: Piece) -> Iterator[list[Row]]:
        """Yields for each row of a piece the entities that are described there, in rows of `ENTITY_FEATURES`."""
        for plan in piece.rows:
            candidates = self.spool.record(plan.position).candidates if plan.described else ()
            yield [self._entity_row(candidates[place]) for place in plan.described]

    def base(self, positions: Iterable[int]) -> Iterator[Row]:
        """Yields the entities at these positions of the knowledge base, in rows of `ENTITY_FEATURES`."""
        for position in positions:
            yield self._entity_row(self.spool.entity(position))

    def _entity_row(self, entity: Entity) -> Row:
        return {
            "qid": entity.qid,
            "name": entity.name or None,
            "description": entity.description,
            "image": self._image(entity.picture),
        }

    def _linking_row(self, record: Record, group: str) -> Row:
        """Releases list the gold first, so candidates get an order of their own.

        What is shown of the mention, the candidates' Qids and the seed decide it. Places would tell the gold to whoever
        knows the seed, which the card says, and where the gold was; and an id may change when other rows are added.
        """
        order = sorted(range(len(record.candidates)), key=lambda place: self._rank(record, place))
        candidates = [record.candidates[position] for position in order]
        images = [self._image(candidate.picture) for candidate in candidates]
        answer = next(index for index, candidate in enumerate(candidates) if candidate.qid == record.answer_qid)
        return self._mention_row(record, group, candidates[answer], images[answer], candidates) | {
            "answer": answer,
            "candidate_qids": [candidate.qid for candidate in candidates],
            "candidate_names": [candidate.name or None for candidate in candidates],
            "candidate_descriptions": [candidate.description for candidate in candidates],
            "candidate_images": images,
            "gold_position_released": order[answer],
        }

    def _rank(self, record: Record, place: int) -> bytes:
        key = (self.seed, record.mention, record.context, record.candidates[place].qid)
        return hashlib.sha256(repr(key).encode()).digest()

    def _mention_row(
        self, record: Record, group: str, gold: Entity | None, gold_image: Row | None, candidates: Sequence[Entity] = ()
    ) -> Row:
        image = self._image(record.picture)
        is_gold = None if image is None or gold_image is None else bool(image["bytes"] == gold_image["bytes"])
        if gold is not None and _same_file(record.picture, gold.picture):
            self.report.counts[SAME_FILE] += 1
        source = record.picture
        if is_gold and self.protocol == "deleaked":
            image = source = None  # where it came from tells as much
            self.report.counts[REMOVED] += 1
        pictures = [source, *(candidate.picture for candidate in candidates)]
        return {
            "id": record.id,
            "topic": record.topic,
            "split_group": group,
            "mention": record.mention,
            "context": record.context,
            "mention_image": image,
            "answer_qid": record.answer_qid,
            "difficulty": record.difficulty,
            "mention_image_is_gold": is_gold,
            "mention_name_is_gold": None if gold is None else _same_name(record.mention, gold.name),
            "image_urls": [None if picture is None else picture.url for picture in pictures],
            "licences": [None if picture is None else picture.licence for picture in pictures],
        }

    def _image(self, picture: Picture | None) -> Row | None:
        if picture is None:
            return None
        try:
            return {"bytes": self.pictures.stored_bytes(picture), "path": None}  # a file's name may hold the gold's Qid
        except UnusableImageError as reason:
            self.report.unusable_images[str(picture.path or picture.url)] = str(reason)
            return None


def _same_file(one: Picture | None, other: Picture | None) -> bool:
    if one is None or other is None or one.flaw is not None or one.path is None:
        return False
    return one.path == other.path


def _same_name(mention: str, name: str) -> bool:
    return mention.casefold().strip() == name.casefold().strip()
