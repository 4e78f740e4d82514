"""What follows from the columns of a scan: which rows share what, how far pictures are apart, which names match."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from m3el_hf.data.audit.scan import MISSING, Columns, Digests, Scan
from m3el_hf.data.perceptual import NEAR_SAME, hash_distance
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
    return pd.Series(keys).duplicated().to_numpy()


def several(keys: Digests, values: Digests) -> Mask:
    """Returns which rows have a key that comes with more than one value. What is missing counts as neither."""
    result = (keys != MISSING) & (values != MISSING)
    result[result] = pd.Series(values[result]).groupby(keys[result]).transform("nunique") > 1
    return result


def within(values: Digests, others: Digests) -> Mask:
    """Returns which values stand among others; what is missing does not."""
    return np.isin(values, others) & (values != MISSING)


def positions(keys: Digests, sought: Digests) -> NDArray[np.int64]:
    """Returns where each digest stands among distinct keys, -1 where it does not or is missing."""
    return np.where(sought == MISSING, -1, pd.Index(keys).get_indexer(pd.Index(sought)))


class Measures:
    """The derived columns of a scan, each computed once.

    ``[R]`` has a value a row, ``[C]`` one a candidate of a row, ``[E]`` one an entity.

    Attributes:
        scan: Where they come from.
    """

    def __init__(self, scan: Scan) -> None:
        self.scan = scan
        hashes = {key: found for key, found in scan.pictures.hashes.items() if found is not None}
        self._hashed, self._hashes = (np.array(list(part), dtype=np.uint64) for part in (hashes, hashes.values()))

    def __getattr__(self, name: str) -> NDArray[Any]:
        """A column of the rows; `Scan.rows` lists them."""
        try:
            return self.scan.rows[name]
        except KeyError:
            raise AttributeError(name) from None

    @cached_property
    def splits(self) -> dict[str, Mask]:
        """The rows of each split that has some ``[R]``, in the order of `SPLITS`."""
        masks = {name: self.split == number for number, name in enumerate(SPLITS)}
        return {name: mask for name, mask in masks.items() if mask.any()}

    @cached_property
    def candidate_row(self) -> NDArray[np.int64]:
        """The row of each candidate ``[C]``."""
        return np.repeat(np.arange(len(self.count)), self.count)

    @cached_property
    def first(self) -> NDArray[np.int64]:
        """The position of each row's first candidate among those of all rows ``[R]``."""
        return np.cumsum(self.count) - self.count

    @cached_property
    def gold_candidate(self) -> NDArray[np.int64]:
        """The position of each row's gold among the candidates of all rows, -1 where `answer` is none ``[R]``."""
        return np.where((self.answer >= 0) & (self.answer < self.count), self.first + self.answer, -1)

    @cached_property
    def is_gold(self) -> Mask:
        """Which candidates are their row's gold ``[C]``."""
        result = np.zeros(len(self.candidate_row), dtype=bool)
        result[self.gold_candidate[self.gold_candidate >= 0]] = True
        return result

    @cached_property
    def gold_entity(self) -> NDArray[np.int64]:
        """The position of each row's gold among the entities, -1 where it is not there ``[R]``."""
        qids, first = np.unique(self.scan.entities["qid"], return_index=True)
        return _taken(first, positions(qids, self.gold), otherwise=-1)

    @property
    def choices(self) -> Columns:
        """The columns of what mentions are linked to: the entities of the knowledge base, or the rows' candidates."""
        return self.scan.entities if self.scan.is_knowledge_base else self.scan.candidates

    def of_gold(self, column: str) -> Digests:
        """Returns the gold's picture, name, ... ``[R]``: as the row has it, or the knowledge base has it."""
        place = self.gold_entity if self.scan.is_knowledge_base else self.gold_candidate
        return _taken(self.choices[column], place, otherwise=MISSING)

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
            return self.candidate_row[~self.is_gold], self.scan.candidates["picture"][~self.is_gold]
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
    def equal_names(self) -> NDArray[np.int64]:
        """How many candidates, or entities of the knowledge base, have the mention's name ``[R]``."""
        if self.scan.is_knowledge_base:
            names, counts = np.unique(self.scan.entities["name"], return_counts=True)
            return _taken(counts, positions(names, self.name), otherwise=0)
        equal = (self.scan.candidates["name"] == self.name[self.candidate_row]) & (
            self.scan.candidates["name"] != MISSING
        )
        return np.bincount(self.candidate_row[equal], minlength=len(self.count))

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
        result = np.zeros(len(self.count), dtype=bool)
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
