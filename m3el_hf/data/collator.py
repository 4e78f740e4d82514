"""From dataset rows to a batch: the mentions, and the union of their candidates, each entity once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, Image, List
from torch import Tensor

from m3el_hf.errors import M3ELError
from m3el_hf.modeling.processing_clipnd import ClipNDProcessor

Row = Mapping[str, Any]

CACHE_BYTES = 1 << 29
"""Prepared pictures kept in memory: a small set is then decoded once and not at every epoch."""


def undecoded(rows: Dataset) -> Dataset:
    """Returns the dataset with its pictures as bytes, so that the collator decodes only what a batch needs."""
    return rows.cast_column("mention_image", Image(decode=False)).cast_column(
        "candidate_images", List(Image(decode=False))
    )


@dataclass
class Batch:
    """B mentions and the N different entities that are candidates of some of them.

    Attributes:
        mentions: Arguments of `ClipNDModel.encode_mentions`.
        entities: Arguments of `ClipNDModel.encode_entities`.
        candidates: For each mention the indices of its own candidates among the entities, in the row's order.
        labels: ``[B]``, the index of each mention's gold among the entities.
    """

    mentions: dict[str, Any]
    entities: dict[str, Any]
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

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Prepares both sides of the rows, showing all that they have.

        An entity stands once in a batch, so that a pair of the same entity is never a negative: as the first row
        describes it, and what that row lacks as the next that has it does.

        Raises:
            M3ELError: If the processor's template shows no text of an entity that has a name: tasks count on its text.
        """
        entities: dict[str, tuple[Any, ...]] = {}
        for row in rows:
            described = zip(row["candidate_names"], row["candidate_descriptions"], row["candidate_images"], strict=True)
            for qid, description in zip(row["candidate_qids"], described, strict=True):
                known = entities.get(qid, (None, None, None))
                entities[qid] = tuple(old or new for old, new in zip(known, description, strict=True))
        index = {qid: position for position, qid in enumerate(entities)}
        names, descriptions, images = zip(*entities.values(), strict=True)
        prepared = self.processor.entities(names, descriptions, [self._prepared(image) for image in images])
        for name, shown in zip(names, prepared["has_text"].tolist(), strict=True):
            if name and not shown:
                raise M3ELError(
                    f"candidate {name!r} has no description, all that the processor's template 'D' shows: use the "
                    "template 'ND', or leave out the rows that have it"
                )
        return Batch(
            mentions=self.processor.mentions(
                [row["mention"] for row in rows],
                [row["context"] for row in rows],
                [self._prepared(row["mention_image"]) for row in rows],
            ),
            entities=prepared,
            candidates=[[index[qid] for qid in row["candidate_qids"]] for row in rows],
            labels=torch.tensor([index[row["answer_qid"]] for row in rows]),
        )

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
