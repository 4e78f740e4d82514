"""Ranks and accuracies of scores: pure functions on arrays, the one place where ties are decided.

A gold that ties with others has the expected rank of a random order among them: a model that scores all candidates
alike gets chance, wherever the gold stands.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from m3el_hf.errors import M3ELError

Array = NDArray[np.float64]


def gold_counts(scores: Sequence[ArrayLike], references: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts, for each row, the candidates that score above the gold and those that score as it does.

    Args:
        scores: One score a candidate, n rows of any lengths. -inf is a score like any other.
        references: The gold's index in each row.

    Returns:
        ``greater`` ``[n]`` and ``equal`` ``[n]``, the gold itself among the equal.

    Raises:
        M3ELError: If a score is NaN or +inf, a row is empty, a reference is out of range, or the lengths differ.
    """
    if len(scores) != len(references):
        raise M3ELError(f"{len(scores)} rows of scores but {len(references)} references: pass one of each a row")
    greater, equal = np.zeros(len(scores), np.int64), np.zeros(len(scores), np.int64)
    for row, (one, gold) in enumerate(zip(scores, references, strict=True)):
        values = np.asarray(one, dtype=np.float64)
        if values.ndim != 1 or not values.size:
            raise M3ELError(f"row {row} has no candidates: every row needs at least the gold's score")
        if np.isnan(values).any() or np.isposinf(values).any():
            raise M3ELError(f"row {row} has a NaN or infinite score: it has no rank")
        if not 0 <= gold < values.size:
            raise M3ELError(f"row {row} has reference {gold}, but {values.size} candidates: indices start at 0")
        greater[row] = (values > values[gold]).sum()
        equal[row] = (values == values[gold]).sum()
    return greater, equal


def hits_at_k(greater: NDArray[np.int64], equal: NDArray[np.int64], k: int) -> Array:
    """Returns each row's probability that the gold is among the first k, ``[n]``.

    Example:
        >>> hits_at_k(np.array([0, 0, 1]), np.array([1, 3, 1]), k=1).round(2).tolist()
        [1.0, 0.33, 0.0]
    """
    return np.clip((k - greater) / equal, 0.0, 1.0)


def reciprocal_ranks(greater: NDArray[np.int64], equal: NDArray[np.int64]) -> Array:
    """Returns each row's expected reciprocal rank of the gold, ``[n]``.

    Example:
        >>> reciprocal_ranks(np.array([0, 0, 1]), np.array([1, 2, 1])).tolist()
        [1.0, 0.75, 0.5]
    """
    return np.array(
        [(1.0 / np.arange(g + 1, g + e + 1)).mean() for g, e in zip(greater, equal, strict=True)], dtype=np.float64
    )


def bootstrap_interval(values: Array, *, seed: int = 0, resamples: int = 1000) -> tuple[float, float]:
    """Returns the 95 % percentile bootstrap interval of the mean of ``values`` ``[n]``.

    Raises:
        M3ELError: If there are no values.
    """
    if not len(values):
        raise M3ELError("no values to resample: evaluate at least one row")
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def summarise(scores: Sequence[ArrayLike], references: Sequence[int]) -> dict[str, float]:
    """Returns accuracy, its 95 % interval, MRR, the share of rows decided by a tie, and n.

    Args:
        scores: One score a candidate, n rows of any lengths.
        references: The gold's index in each row.

    Raises:
        M3ELError: If there are no rows, and as `gold_counts` does.
    """
    greater, equal = gold_counts(scores, references)
    hits = hits_at_k(greater, equal, 1)
    low, high = bootstrap_interval(hits)
    return {
        "accuracy": float(hits.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "mrr": float(reciprocal_ranks(greater, equal).mean()),
        "tie_share": float(((greater == 0) & (equal > 1)).mean()),
        "n": len(hits),
    }
