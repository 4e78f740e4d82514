"""What follows from the columns of a scan: which rows share what, how far pictures are apart, which names match."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3el_hf.data.audit.perceptual import NEAR_SAME, hash_distance
from m3el_hf.data.audit.scan import MISSING, Digests, Scan
from m3el_hf.data.schema import SPLITS

Mask = NDArray[np.bool_]
Distances = NDArray[np.int16]

INCOMPARABLE = -1
"""The distance of pictures of which one is missing or has no hash."""


def mix(*columns: Digests) -> Digests:
    """Returns a digest of several, row by row."""
    result = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        result = (result ^ column) * np.uint64(0x9E3779B97F4A7C15)  # wraps around: a multiplicative hash
        result ^= result >> np.uint64(32)
    return result


def repeats(keys: Digests) -> Mask:
    """Returns which rows have the key of an earlier row."""
    result = np.ones(len(keys), dtype=bool)
    result[np.unique(keys, return_index=True)[1]] = False
    return result


def several(keys: Digests, values: Digests) -> Mask:
    """Returns which rows have a key that comes with more than one value. What is missing counts as neither."""
    known = (keys != MISSING) & (values != MISSING)
    _, first = np.unique(mix(keys[known], values[known]), return_index=True)
    found, counts = np.unique(keys[known][first], return_counts=True)
    return known & np.isin(keys, found[counts > 1])


def within(values: Digests, others: Digests) -> Mask:
    """Returns which values stand among others; what is missing does not."""
    return np.isin(values, others) & (values != MISSING)


def positions(keys: Digests, sought: Digests) -> NDArray[np.int64]:
    """Returns where each digest stands among sorted keys, -1 where it does not or is missing."""
    if not len(keys):
        return np.full(len(sought), -1, dtype=np.int64)
    place = np.minimum(np.searchsorted(keys, sought), len(keys) - 1)
    return np.where((keys[place] == sought) & (sought != MISSING), place, -1)


class Measures:
    """The derived columns of a scan, each computed once.

    ``[R]`` has a value a row, ``[C]`` one a candidate of a row, ``[E]`` one an entity.

    Attributes:
        scan: Where they come from.
    """

    def __init__(self, scan: Scan) -> None:
        self.scan = scan
        hashed = sorted((key, found) for key, found in scan.pictures.hashes.items() if found is not None)
        self._hashed = np.array([key for key, _ in hashed], dtype=np.uint64)
        self._hashes = np.array([found for _, found in hashed], dtype=np.uint64)

    def __getattr__(self, name: str) -> NDArray[Any]:
        """A column of the rows; `Scan.rows` lists them."""
        return getattr(self.scan.rows, name)

    @cached_property
    def splits(self) -> list[str]:
        """The splits that have rows, in the order of `SPLITS`."""
        return [name for number, name in enumerate(SPLITS) if (self.split == number).any()]

    def of_split(self, name: str) -> Mask:
        """Returns which rows are of a split ``[R]``."""
        return self.split == SPLITS.index(name)

    @cached_property
    def everything(self) -> Mask:
        """True for all rows ``[R]``."""
        return np.ones(len(self.scan.rows), dtype=bool)

    @cached_property
    def candidate_row(self) -> NDArray[np.int64]:
        """The row of each candidate ``[C]``."""
        return np.repeat(np.arange(len(self.scan.rows)), self.count)

    @cached_property
    def is_gold(self) -> Mask:
        """Which candidates are their row's gold ``[C]``."""
        result = np.zeros(len(self.scan.candidates), dtype=bool)
        result[self.gold_candidate[self.gold_candidate >= 0]] = True
        return result

    @cached_property
    def gold_entity(self) -> NDArray[np.int64]:
        """The position of each row's gold among the entities, -1 where it is not there ``[R]``."""
        qids, first = np.unique(self.scan.entities.qid, return_index=True)
        return _taken(first, positions(qids, self.gold), otherwise=-1)

    def of_gold(self, column: str) -> Digests:
        """Returns the gold's picture, name, ... ``[R]``: as the row has it, or the knowledge base has it."""
        knowledge_base = self.scan.is_knowledge_base
        values = getattr(self.scan.entities if knowledge_base else self.scan.candidates, column)
        place = self.gold_entity if knowledge_base else self.gold_candidate
        return _taken(values, place, otherwise=MISSING)

    def distances(self, one: Digests, other: Digests) -> Distances:
        """Returns in how many bits the hashes of pictures differ; `INCOMPARABLE` where one has none."""
        result = np.full(len(one), INCOMPARABLE, dtype=np.int16)
        first, second = positions(self._hashed, one), positions(self._hashed, other)
        both = (first >= 0) & (second >= 0)
        result[both] = hash_distance(self._hashes[first[both]], self._hashes[second[both]])
        result[(one == other) & (one != MISSING)] = 0
        return result

    @cached_property
    def gold_distance(self) -> Distances:
        """How far the mention's picture is from the gold's ``[R]``."""
        return self.distances(self.picture, self.of_gold("picture"))

    @cached_property
    def control(self) -> tuple[NDArray[np.int64], Digests]:
        """Pictures that are not the gold's, to compare with: their rows and digests.

        The distractors' where there are some, else that of the next row's gold, where it is another one with a picture.
        """
        if not self.scan.is_knowledge_base:
            return self.candidate_row[~self.is_gold], self.scan.candidates.picture[~self.is_gold]
        shown = self.of_gold("picture")
        rows = np.flatnonzero(shown)
        other = np.roll(rows, -1)
        differs = self.gold[rows] != self.gold[other]
        return rows[differs], shown[other[differs]]

    @cached_property
    def control_distance(self) -> Distances:
        """How far the mention's picture is from each of `control`."""
        rows, pictures = self.control
        return self.distances(self.picture[rows], pictures)

    @cached_property
    def nearest_is_gold(self) -> tuple[Mask, Mask]:
        """Where the gold's picture is nearer than every distractor's, and where that can be told ``[R]`` each."""
        rows, _ = self.control
        nearest = np.full(len(self.scan.rows), np.iinfo(np.int16).max, dtype=np.int16)
        known = self.control_distance >= 0
        np.minimum.at(nearest, rows[known], self.control_distance[known])
        told = (self.gold_distance >= 0) & (nearest < np.iinfo(np.int16).max)
        return told & (self.gold_distance < nearest), told

    @cached_property
    def equal_names(self) -> NDArray[np.int64]:
        """How many candidates, or entities of the knowledge base, have the mention's name ``[R]``."""
        if self.scan.is_knowledge_base:
            names, counts = np.unique(self.scan.entities.name, return_counts=True)
            return _taken(counts, positions(names, self.name), otherwise=0)
        equal = (self.scan.candidates.name == self.name[self.candidate_row]) & (self.scan.candidates.name != MISSING)
        return np.bincount(self.candidate_row[equal], minlength=len(self.scan.rows))

    @cached_property
    def gold_name_equal(self) -> Mask:
        """Whether the gold has the mention's name ``[R]``."""
        return (self.of_gold("name") == self.name) & (self.name != MISSING)

    @cached_property
    def near(self) -> Mask:
        """Whether the mention's picture is the gold's or a near-same one ``[R]``."""
        return (self.gold_distance >= 0) & (self.gold_distance <= NEAR_SAME)

    @cached_property
    def said(self) -> Digests:
        """Mention and context as one ``[R]``; `MISSING` where either is."""
        known = (self.mention != MISSING) & (self.context != MISSING)
        return np.where(known, mix(self.mention, self.context), np.uint64(MISSING))

    def any_candidate(self, mask: Mask) -> Mask:
        """Returns which rows have a candidate of a mask ``[C]``."""
        result = np.zeros(len(self.scan.rows), dtype=bool)
        result[self.candidate_row[mask]] = True
        return result

    def all_candidates(self, mask: Mask) -> Mask:
        """Returns the rows of which every candidate is in a mask ``[C]``."""
        return ~self.any_candidate(~mask)


def _taken(values: NDArray[Any], place: NDArray[np.int64], otherwise: int) -> NDArray[Any]:
    """Returns the value at each place, and another where the place is -1."""
    result = np.full(len(place), otherwise, dtype=values.dtype)
    result[place >= 0] = values[place[place >= 0]]
    return result
