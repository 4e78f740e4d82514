"""Counts masks of rows, candidates and entities into facts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3el_hf.data.audit.measures import Mask, Measures
from m3el_hf.data.audit.report import ALL, Fact
from m3el_hf.data.audit.scan import MISSING, Digests, Scan


def single(key: str, label: str, definition: str, count: float, of: float | None = None) -> Fact:
    """Makes a fact of the dataset as a whole.

    Args:
        key: See `Fact`.
        label: See `Fact`.
        definition: See `Fact`.
        count: The count.
        of: Among how many; None where a share makes no sense.
    """
    return Fact(key, label, definition, {ALL: count}, {} if of is None else {ALL: of})


class Tally:
    """Counts in all, and by split.

    Attributes:
        measures: What is known of each row and candidate.
        scan: Where that comes from.
        columns: The rows of ``"all"`` and of each split ``[R]``.
    """

    def __init__(self, measures: Measures) -> None:
        self.measures = measures
        self.scan: Scan = measures.scan
        self.columns: dict[str, Mask] = {ALL: np.ones(len(measures.split), dtype=bool)} | measures.splits

    def by_column(self, mask: Mask, row: NDArray[np.int64] | None = None) -> dict[str, float]:
        """Counts a mask by column; ``row`` says of which row each of its values is, None for each of its own."""
        places: Any = slice(None) if row is None else row
        return {name: int((mask & rows[places]).sum()) for name, rows in self.columns.items()}

    def rows(
        self, key: str, label: str, definition: str, mask: Mask, of: Mask | None = None,
        row: NDArray[np.int64] | None = None,
    ) -> Fact:  # fmt: skip
        """Counts rows among others ``[R]``, or (None) among all; or what is of rows: see `by_column`."""
        of = np.ones_like(mask) if of is None else of
        return Fact(key, label, definition, self.by_column(mask & of, row), self.by_column(of, row))

    def distinct(self, key: str, label: str, definition: str, values: dict[str, Digests]) -> Fact:
        """Counts different values by column."""
        counts: dict[str, float] = {name: len(np.unique(found[found != MISSING])) for name, found in values.items()}
        return Fact(key, label, definition, counts)
