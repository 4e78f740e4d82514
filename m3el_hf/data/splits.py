"""Splits by group, so that a held-out row's entities were not seen in training.

Splitting by the gold alone misleads: a held-out gold then stands in training as a distractor only, and a model learns
that it never is the answer. Rows therefore stay together when they share a gold, a sentence, a mention picture or, as
far as groups stay small, a candidate.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence

from m3el_hf.data.schema import Picture, Record

MAX_GROUP_SHARE = 0.05
"""A group that shared candidates would grow beyond this share of the rows is not joined further."""

HELD_OUT_SHARE = {"test": 0.1, "validation": 0.1}


class _Groups:
    """Disjoint sets of row indices with their sizes."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))
        self._size = [1] * size

    def find(self, row: int) -> int:
        while self._parent[row] != row:
            self._parent[row] = self._parent[self._parent[row]]
            row = self._parent[row]
        return row

    def join(self, rows: Sequence[int], limit: int | None = None) -> None:
        """Joins the groups of all these rows, unless the result would exceed ``limit`` rows."""
        roots = {self.find(row) for row in rows}
        total = sum(self._size[root] for root in roots)
        if limit is not None and total > limit:
            return
        first, *others = sorted(roots)
        for root in others:
            self._parent[root] = first
        self._size[first] = total


def group_rows(records: Sequence[Record]) -> list[str]:
    """Returns each record's group: the id of the first record that it must share a split with.

    Shared golds, sentences and mention pictures always join. Shared candidates join, rarest entity first, while the
    group stays within `MAX_GROUP_SHARE` of the rows: a few entities that stand in very many rows would otherwise tie
    nearly everything into one group.
    """
    groups = _Groups(len(records))
    for rows in _rows_by(
        [("gold", record.answer_qid), ("context", record.context), *_picture_keys(record)] for record in records
    ):
        groups.join(rows)
    limit = max(1, int(MAX_GROUP_SHARE * len(records)))
    shared = _rows_by([("candidate", candidate.qid) for candidate in record.candidates] for record in records)
    for rows in sorted(shared, key=len):
        groups.join(rows, limit)
    return [records[groups.find(row)].id for row in range(len(records))]


def _picture_keys(record: Record) -> list[tuple[str, Hashable]]:
    """What makes two mention pictures the same; each is None where the source does not say."""
    shown = record.picture or Picture()
    path = shown.path if shown.flaw is None else None
    return [("path", path), ("url", shown.url), ("data", shown.data)]


def _rows_by(keys: Iterable[Iterable[tuple[str, Hashable]]]) -> list[list[int]]:
    """Lists the rows that share a (kind, value) key, for each key that several rows have; the value None is no key."""
    rows: dict[tuple[str, Hashable], list[int]] = defaultdict(list)
    for row, row_keys in enumerate(keys):
        for key in row_keys:
            if key[1] is not None:
                rows[key].append(row)
    return [found for found in rows.values() if len(found) > 1]


def assign_splits(records: Sequence[Record], groups: Sequence[str], seed: int) -> list[str]:
    """Returns each record's split: the released one, else 80/10/10 by whole groups, within each topic.

    Groups are taken in an order that depends on the seed and the group's name alone.
    """
    sizes = {topic: Counter[str]() for topic in {record.topic for record in records}}
    for record, group in zip(records, groups, strict=True):
        if record.split is None:
            sizes[record.topic][group] += 1
    chosen = {group: record.split for record, group in zip(records, groups, strict=True) if record.split is not None}
    for topic in sorted(sizes):
        chosen.update(_hold_out(sizes[topic], chosen, seed))
    return [
        record.split if record.split is not None else chosen[group]
        for record, group in zip(records, groups, strict=True)
    ]


def _hold_out(sizes: Counter[str], chosen: dict[str, str], seed: int) -> dict[str, str]:
    """Fills test and validation with whole groups up to their shares and leaves the rest to train."""
    room = {split: share * sizes.total() for split, share in HELD_OUT_SHARE.items()}
    result: dict[str, str] = {}
    for group in sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()):
        if group in chosen:  # a group that spans topics keeps its first topic's split
            result[group] = chosen[group]
        else:
            result[group] = next((split for split in room if sizes[group] <= room[split]), "train")
        if result[group] in room:
            room[result[group]] -= sizes[group]
    for split in room:  # a small set has no group as small as its share: better too much held out than nothing
        train = [group for group in result if result[group] == "train" and group not in chosen]
        if split not in result.values() and len(train) > 1:
            result[min(train, key=lambda group: sizes[group])] = split
    return result


def shared_candidates(records: Sequence[Record], splits: Sequence[str]) -> dict[str, int]:
    """Counts, for validation and test, the rows of which some candidate also stands in a training row."""
    seen = {
        candidate.qid
        for record, split in zip(records, splits, strict=True)
        if split == "train"
        for candidate in record.candidates
    }
    return {
        held_out: sum(
            any(candidate.qid in seen for candidate in record.candidates)
            for record, split in zip(records, splits, strict=True)
            if split == held_out
        )
        for held_out in ("validation", "test")
    }
