"""From dataset rows to a batch: the mentions, and the union of their candidates, each entity once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from datasets import Dataset, Image, IterableDataset, List
from torch import Tensor

from m3el_hf.errors import M3ELError
from m3el_hf.modeling.processing_clipnd import ClipNDProcessor

Row = Mapping[str, Any]
Rows = TypeVar("Rows", Dataset, IterableDataset)

CACHE_BYTES = 1 << 29
"""Prepared pictures kept in memory: a small set is then decoded once and not at every epoch."""


def undecoded(rows: Rows) -> Rows:
    """Returns the dataset with its pictures as bytes, so that the collator decodes only what a batch needs."""
    return rows.cast_column("mention_image", Image(decode=False)).cast_column(
        "candidate_images", List(Image(decode=False))
    )


NEEDED = (
    "id", "mention", "context", "mention_image", "answer_qid", "candidate_qids", "candidate_names",
    "candidate_descriptions", "candidate_images",
)  # fmt: skip
"""The columns that a `LinkingCollator` reads."""


class EntityRow(NamedTuple):
    """An entity as a row's candidate shows it; None for what it lacks."""

    qid: str
    name: str | None
    description: str | None
    image: dict[str, Any] | None

    def filled(self, other: EntityRow) -> EntityRow:
        """Returns the entity with what it lacks as another row shows it."""
        return EntityRow._make(old or new for old, new in zip(self, other, strict=True))


def candidates_of(row: Row) -> list[EntityRow]:
    """Returns a row's candidates, in its order."""
    columns = ("candidate_qids", "candidate_names", "candidate_descriptions", "candidate_images")
    return [EntityRow(*values) for values in zip(*(row[column] for column in columns), strict=True)]


@dataclass
class Batch:
    """B mentions and the N different entities that are candidates of some of them.

    Attributes:
        mentions: Arguments of `ClipNDModel.encode_mentions`.
        entities: Arguments of `ClipNDModel.encode_entities`.
        qids: The N entities' identifiers.
        candidates: For each mention the indices of its own candidates among the entities, in the row's order.
        labels: ``[B]``, the index of each mention's gold among the entities.
    """

    mentions: dict[str, Any]
    entities: dict[str, Any]
    qids: list[str]
    candidates: list[list[int]]
    labels: Tensor


class LinkingCollator:
    """Makes a `Batch` of rows.

    Args:
        processor: Prepares text and pictures.
        cache_bytes: Size of the cache of prepared pictures, in bytes.
    """

    def __init__(self, processor: ClipNDProcessor, cache_bytes: int = CACHE_BYTES) -> None:
        self.processor = processor
        self._room = cache_bytes
        self._pixels: dict[bytes, Tensor] = {}

    def __call__(
        self,
        rows: Sequence[Row],
        others: Iterable[EntityRow] = (),
        template: Callable[[EntityRow], str | None] = lambda entity: None,
    ) -> Batch:
        """Prepares both sides of the rows, showing all that they have.

        An entity stands once in a batch, so that a pair of the same entity is never a negative: as the first row
        describes it, and what that row lacks as the next that has it does.

        Args:
            rows: Their candidates are the entities.
            others: Entities besides these.
            template: What an entity's text is made of; None for what the processor says.

        Raises:
            M3ELError: If the processor's template shows no text of an entity that has a name: tasks count on its text.
        """
        entities: dict[str, EntityRow] = {}
        for one in chain(*map(candidates_of, rows), others):
            entities[one.qid] = entities.get(one.qid, one).filled(one)
        index = {qid: position for position, qid in enumerate(entities)}
        return Batch(
            mentions=self.mentions(rows),
            entities=self.entities(list(entities.values()), template),
            qids=list(entities),
            candidates=[[index[qid] for qid in row["candidate_qids"]] for row in rows],
            labels=torch.tensor([index[row["answer_qid"]] for row in rows]),
        )

    def mentions(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Prepares the rows' mentions alone, as arguments of `ClipNDModel.encode_mentions`."""
        return self.processor.mentions(
            [row["mention"] for row in rows],
            [row["context"] for row in rows],
            [self._prepared(row["mention_image"]) for row in rows],
        )

    def entities(
        self, entities: Sequence[EntityRow], template: Callable[[EntityRow], str | None] = lambda entity: None
    ) -> dict[str, Any]:
        """Prepares entities alone, as arguments of `ClipNDModel.encode_entities`; else as a call does."""
        prepared = self.processor.entities(
            [entity.name for entity in entities],
            [entity.description for entity in entities],
            [self._prepared(entity.image) for entity in entities],
            template=[template(entity) or self.processor.template for entity in entities],
        )
        for entity, shown in zip(entities, prepared["has_text"].tolist(), strict=True):
            if entity.name and not shown:
                raise M3ELError(
                    f"candidate {entity.name!r} has no description, all that the processor's template 'D' shows: use "
                    "the template 'ND', or leave out the rows that have it"
                )
        return prepared

    def _prepared(self, image: Any) -> Tensor | None:
        if image is None:
            return None
        key = hashlib.blake2b(image["bytes"], digest_size=16).digest()
        if key in self._pixels:
            return self._pixels[key]
        pixels = self.processor.pixel_values(image["bytes"])
        size = pixels.numel() * pixels.element_size()
        if size <= self._room:
            self._room -= size
            self._pixels[key] = pixels
        return pixels
