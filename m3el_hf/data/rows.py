"""From records to rows: split, shuffle the candidates, open the pictures, count what is missing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3el_hf.data.images import stored_bytes
from m3el_hf.data.readers import READERS
from m3el_hf.data.schema import Candidate, Picture, Record, Report
from m3el_hf.data.splits import assign_splits, group_rows, shared_candidates
from m3el_hf.errors import M3ELError
from m3el_hf.modeling.decoding_clipnd import UnusableImageError
from m3el_hf.tasks import TOPICS

Row = dict[str, Any]


@dataclass
class Collection:
    """The records of a source with the group and split of each, before any picture is opened.

    Attributes:
        records: In the reader's order.
        groups: The group of each record; a group never spans two assigned splits.
        splits: The split of each record.
        seed: Seeds the splits and the order of candidates.
        report: What was read, skipped and missing; grows while rows are made.
    """

    records: list[Record]
    groups: list[str]
    splits: list[str]
    seed: int
    report: Report

    @property
    def topics(self) -> list[str]:
        """The topics that have rows, in the order of `TOPICS`."""
        present = {record.topic for record in self.records}
        return [topic for topic in TOPICS if topic in present]

    def count(self, split: str, topic: str | None = None) -> int:
        """Returns the number of rows of a split, of one topic or (None) of all."""
        return sum(
            one == split and topic in (None, record.topic)
            for record, one in zip(self.records, self.splits, strict=True)
        )

    def rows(self, split: str, topic: str | None = None) -> Iterator[Row]:
        """Yields the rows of a split, of one topic or (None) of all, opening their pictures one row at a time."""
        for record, group, one in zip(self.records, self.groups, self.splits, strict=True):
            if one == split and topic in (None, record.topic):
                yield make_row(record, group, self.seed, self.report)

    def entities(self) -> Iterator[Row]:
        """Yields each entity once, as its first appearance with a name describes it."""
        chosen: dict[str, Candidate] = {}
        for record in self.records:
            for candidate in record.candidates:
                if candidate.qid not in chosen or (candidate.name and not chosen[candidate.qid].name):
                    chosen[candidate.qid] = candidate
        for candidate in chosen.values():
            yield {
                "qid": candidate.qid,
                "name": candidate.name or None,
                "description": candidate.description,
                "image": _image(candidate.picture, self.report),
            }


def collect(reader: str, folder: Path | None, seed: int = 0, **options: Any) -> Collection:
    """Reads a source and decides the split of each record.

    Args:
        reader: A name of `READERS`.
        folder: Where the source lies; None for a reader that needs none.
        seed: Seeds the splits and the order of candidates.
        **options: The reader's own options.

    Raises:
        M3ELError: If the reader is unknown, or the source is absent, unreadable or without a single usable instance.
    """
    if reader not in READERS:
        raise M3ELError(f"unknown reader {reader!r}: choose one of {', '.join(READERS)}")
    report = Report()
    records = list(READERS[reader](folder, report, **options))
    if not records:
        first = f"; the first was skipped because: {report.skipped[0]}" if report.skipped else ""
        raise M3ELError(f"{folder} holds {report.read} instances, none of them usable{first}")
    groups = group_rows(records)
    splits = assign_splits(records, groups, seed)
    for split, count in shared_candidates(records, splits).items():
        report.counts[f"{split} rows with a candidate that also stands in train"] = count
    return Collection(records, groups, splits, seed, report)


def make_row(record: Record, group: str, seed: int, report: Report) -> Row:
    """Makes one row of `ROW_FEATURES` of a record.

    Releases list the gold first, so the candidates are shuffled, by the seed and the record's id alone; the released
    position is kept in ``gold_position_released``. A picture that cannot be had is null, and ``report`` says why.
    """
    order = list(range(len(record.candidates)))
    random.Random(f"{seed}:{record.id}").shuffle(order)
    candidates = [record.candidates[position] for position in order]
    answer = next(index for index, candidate in enumerate(candidates) if candidate.qid == record.answer_qid)
    mention_image = _image(record.picture, report)
    candidate_images = [_image(candidate.picture, report) for candidate in candidates]
    return {
        "id": record.id,
        "topic": record.topic,
        "split_group": group,
        "mention": record.mention,
        "context": record.context,
        "mention_image": mention_image,
        "answer": answer,
        "answer_qid": record.answer_qid,
        "candidate_qids": [candidate.qid for candidate in candidates],
        "candidate_names": [candidate.name or None for candidate in candidates],
        "candidate_descriptions": [candidate.description for candidate in candidates],
        "candidate_images": candidate_images,
        "difficulty": record.difficulty,
        "gold_position_released": order[answer],
        "mention_image_is_gold": _same_image(mention_image, candidate_images[answer]),
        "image_urls": [picture.url if picture else None for picture in _pictures(record, candidates)],
        "licences": [None] * (1 + len(candidates)),
    }


def _pictures(record: Record, candidates: list[Candidate]) -> list[Picture | None]:
    return [record.picture, *(candidate.picture for candidate in candidates)]


def _same_image(mention: dict[str, Any] | None, gold: dict[str, Any] | None) -> bool | None:
    """Whether both pictures are the same bytes; None where one is missing."""
    if mention is None or gold is None:
        return None
    return mention["bytes"] == gold["bytes"]


def _image(picture: Picture | None, report: Report) -> dict[str, Any] | None:
    if picture is None:
        return None
    try:
        return {"bytes": stored_bytes(picture), "path": None}  # a file's name may hold the gold's Qid
    except UnusableImageError as reason:
        report.unusable_images[str(picture.path or picture.url)] = str(reason)
        return None
