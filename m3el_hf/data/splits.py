"""Splits by group, so that a held-out row's entities were not seen in training.

Splitting by the gold alone misleads: a held-out gold then stands in training as a distractor only, and a model learns
that it never is the answer. Rows therefore stay together when they share a gold, a sentence, a mention picture or, as
far as groups stay small, a candidate.

Where shared candidates tie too many rows together (nearly all, where distractors are drawn from similar names), the
rows are cut into neighbourhoods: each takes the least hash of a name at most `ROUNDS` shared candidates away. To join
rows until groups are full leaves somewhat fewer candidates shared, but one new row can then move thousands.

A group's place is a hash of its name, its name that of one of its golds, and nothing depends on where in the source a
row stands or on what stands far from it. Rows that are added later thus leave nearly all others where they are.
`m3el_hf.data.previous` keeps a published version's splits in any case.

A row whose split is given (released, or kept from an earlier version) takes along those with its gold, sentence or
picture, and no others: shared candidates would draw nearly every new row into the splits of the old ones.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3el_hf.data.schema import NIL, SPLITS, Record

MAX_GROUP_SHARE = 0.05
"""Shared candidates make no group of more than this share of the rows to be split."""

ROUNDS = 3
"""A neighbourhood reaches over this many shared candidates, or fewer where it would get too large."""

HELD_OUT_SHARE = 0.1
"""Share of a topic's rows that test and validation get, each."""

TOLERANCE = 0.1
"""How far a share may be from its target, relative to it, before the fixed cut gives way to a better one."""


_END = 4096  # bytes


class _Groups:
    """Disjoint sets of row indices."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def find(self, row: int) -> int:
        while self._parent[row] != row:
            self._parent[row] = self._parent[self._parent[row]]
            row = self._parent[row]
        return row

    def join(self, rows: Iterable[int]) -> None:
        first, *others = sorted({self.find(row) for row in rows})
        for root in others:
            self._parent[root] = first

    def roots(self) -> NDArray[np.int64]:
        """The first row of each row's group."""
        return np.array([self.find(row) for row in range(len(self._parent))], np.int64)


class _Keys:
    """Which rows have which keys, 12 bytes each, however long the texts were."""

    def __init__(self) -> None:
        self._keys, self._rows = array("Q"), array("I")

    def add(self, row: int, kind: str, value: Hashable) -> None:
        """Notes a key of a row; the value None is no key."""
        if value is not None:
            data = value if isinstance(value, bytes) else str(value).encode()
            self._keys.append(int.from_bytes(_digest(kind.encode() + b":" + data)))
            self._rows.append(row)

    @property
    def table(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        """The keys ``[K]`` and the row of each ``[K]``."""
        return np.array(self._keys, np.uint64), np.array(self._rows, np.uint32)

    def shared(self, most: int | None = None) -> Iterator[NDArray[np.uint32]]:
        """Yields the rows of each key that at least two rows have, and at most ``most``."""
        keys, rows = self.table
        order = np.argsort(keys, kind="stable")
        for run in np.split(rows[order], np.flatnonzero(np.diff(keys[order])) + 1):
            if 1 < len(run) and (most is None or len(run) <= most):
                yield run


class Grouping:
    """What is remembered of each record to keep apart what must not meet: a few bytes a key.

    Attributes:
        topics: The topic of each record, within which splits are drawn.
        released: The released split of each record, or None.
    """

    def __init__(self) -> None:
        self.topics: list[str] = []
        self.released: list[str | None] = []
        self._names: list[str] = []
        self._ties, self._candidates = _Keys(), _Keys()

    def __len__(self) -> int:
        return len(self._names)

    def add(self, record: Record, topic: str) -> None:
        """Notes the next record."""
        row = len(self)
        gold = None if record.answer_qid == NIL else record.answer_qid
        self.topics.append(topic)
        self.released.append(record.split)
        self._names.append(gold or f"{NIL}-{_digest(repr((record.mention, record.context)).encode()).hex()}")
        for kind, value in [("gold", gold), ("context", record.context), *_picture_keys(record)]:
            self._ties.add(row, kind, value)
        for candidate in record.candidates:
            self._candidates.add(row, "candidate", candidate.qid)

    def groups(self) -> list[str]:
        """Returns the name of each record's group: of all its golds (NIL: what is said) the one of the least hash.

        Shared golds, sentences and mention pictures always join. Shared candidates join rows whose split is still to be
        chosen: all that hang together, if these are at most `MAX_GROUP_SHARE` of them, else neighbourhoods.
        """
        ties = _Groups(len(self))
        for rows in self._ties.shared():
            ties.join(rows)
        tied = ties.roots()
        is_given = np.zeros(len(self), bool)
        is_given[tied[[row for row, split in enumerate(self.released) if split is not None]]] = True
        free = ~is_given[tied]
        groups = self._join_neighbours(tied, free, limit=max(1, int(MAX_GROUP_SHARE * self.released.count(None))))
        members: dict[int, set[str]] = defaultdict(set)
        for name, group in zip(self._names, groups, strict=True):
            members[group].add(name)
        named = {group: min(names, key=_rank) for group, names in members.items()}
        return [named[group] for group in groups]

    def _join_neighbours(self, tied: NDArray[np.int64], free: NDArray[np.bool_], limit: int) -> list[int]:
        """Joins the groups ``tied`` ``[N]`` of the rows that are ``free`` ``[N]``; returns a number of each group."""
        shared = [run for rows in self._candidates.shared(limit) if len(run := np.unique(tied[rows[free[rows]]])) > 1]
        whole = _Groups(len(self))
        for rows in shared:
            whole.join(rows)
        result, left = tied.copy(), free
        for depth, labels in enumerate((whole.roots()[tied], *self._neighbourhoods(tied, shared)), start=1):
            small = left & (np.bincount(labels[left], minlength=len(self))[labels] <= limit)
            result[small] = labels[small] + depth * len(self)
            left = left & ~small
        return result.tolist()

    def _neighbourhoods(self, tied: NDArray[np.int64], shared: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        """The neighbourhood of each row, named after a row in it or beside it, from the widest to the narrowest."""
        order = np.array(sorted(range(len(self)), key=lambda row: _rank(self._names[row])), np.int64)
        label = np.empty(len(self), np.int64)
        label[order] = np.arange(len(self))
        np.minimum.at(label, tied, label.copy())
        run = np.repeat(np.arange(len(shared)), [len(rows) for rows in shared])
        rows = np.concatenate([*shared, np.empty(0, np.int64)])
        result: list[NDArray[np.int64]] = []
        for _ in range(ROUNDS):
            least = np.full(len(shared), len(self))
            np.minimum.at(least, run, label[rows])
            np.minimum.at(label, rows, least[run])
            result.insert(0, label[tied])
        return result

    def shared_candidates(self, splits: Sequence[str]) -> dict[str, int]:
        """Counts, for validation and test, the rows of which some candidate also stands in a training row."""
        keys, rows = self._candidates.table
        codes = np.array([SPLITS.index(split) for split in splits])[rows]
        seen = np.isin(keys, np.unique(keys[codes == SPLITS.index("train")]))
        return {split: len(np.unique(rows[seen & (codes == SPLITS.index(split))])) for split in ("validation", "test")}


def _picture_keys(record: Record) -> list[tuple[str, Any]]:
    """What makes two mention pictures the same; none where there is no picture, whatever stands in its place."""
    shown = record.picture
    if shown is None or shown.flaw is not None:
        return []
    url = shown.url if shown.url and "://" in shown.url else None  # else a placeholder, which many rows may have
    return [("url", url), ("data", shown.data if shown.path is None else _ends(shown.path))]


def _ends(path: Path) -> bytes | None:
    """What tells a picture's file from others, wherever it lies: its size, beginning and end; None if it is not there.

    To read all of each file would take as long as the build itself.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            return None
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(_END)
            file.seek(max(0, size - _END))
            return _digest(repr((size, start, file.read(_END))).encode())
    except (OSError, ValueError):  # ValueError: a null character in the path
        return None


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def assign_splits(topics: Sequence[str], released: Sequence[str | None], groups: Sequence[str], seed: int) -> list[str]:
    """Returns each row's split: the released one, else 80/10/10 by whole groups, within each topic.

    Args:
        topics: The topic of each row.
        released: The released split of each row, or None.
        groups: The name of each row's group.
        seed: Seeds the places of the groups.
    """
    chosen: dict[str, str] = {}
    for group, split in zip(groups, released, strict=True):
        if split is not None:  # a group in several splits: never train on it
            chosen[group] = max(split, chosen.get(group, split), key=SPLITS.index)
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    for topic, split, group in zip(topics, released, groups, strict=True):
        if split is None:
            sizes[topic][group] += 1
    for topic in sorted(sizes):
        chosen |= _hold_out(sizes[topic], chosen, seed)
    return [split if split is not None else chosen[group] for split, group in zip(released, groups, strict=True)]


def _hold_out(sizes: Counter[str], chosen: dict[str, str], seed: int) -> dict[str, str]:
    """Assigns the groups of a topic: the lowest places to test, the highest to validation, all others to train.

    A group that spans topics, or has rows with a released split, keeps what was chosen for it.
    """
    places = {group: _place(group, f"split {seed}") for group in sizes if group not in chosen}
    result = {group: chosen.get(group, "train") for group in sizes}
    share = HELD_OUT_SHARE * sizes.total()
    small = [group for group in places if sizes[group] <= share]  # one larger than a held-out split is no part of it
    for split in ("test", "validation"):
        taken = sum(size for group, size in sizes.items() if result[group] == split)
        target = min(share, sum(sizes[group] for group in small) / 3) - taken
        distance = {group: places[group] if split == "test" else 1 - places[group] for group in small}
        for group in _nearest(distance, sizes, target):
            result[group] = split
            small.remove(group)
    for split in ("test", "validation"):  # a small set has no group as small as its share: rather too much than nothing
        left = [group for group in places if result[group] == "train"]
        if split not in result.values() and len(left) > 1:
            result[min(left, key=lambda group: (sizes[group], places[group]))] = split
    return result


def _nearest(distance: dict[str, float], sizes: Counter[str], target: float) -> list[str]:
    """Returns the groups nearer than a cut, which is `HELD_OUT_SHARE` unless that misses the target by `TOLERANCE`."""
    order = sorted(distance, key=distance.__getitem__)
    totals = np.cumsum([0, *(sizes[group] for group in order)])
    fixed = sum(place < HELD_OUT_SHARE for place in distance.values())
    if abs(totals[fixed] - target) <= TOLERANCE * target:
        return order[:fixed]
    return order[: int(np.argmin(np.abs(totals - target)))]


def _place(name: str, salt: str) -> float:
    """A number in [0, 1) that depends on the name and the salt alone."""
    return int.from_bytes(hashlib.sha256(f"{salt}:{name}".encode()).digest()[:8]) / 2**64


def _rank(name: str) -> float:
    return _place(name, "name")
