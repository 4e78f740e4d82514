"""Ranks, accuracies and their intervals: pure functions on arrays, the one place where ties are decided.

Scores are reduced to two counts a row: how many candidates score above the gold, and how many score as it does. All
measures are functions of these counts. By default a gold that ties with others has the expected rank of a random order
among them: a model that scores all candidates alike gets chance, wherever the gold stands.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from m3el_hf.errors import M3ELError

Array = NDArray[np.float64]
Counts = NDArray[np.int64]

TIES = ("expected", "optimistic", "pessimistic")
"""What a gold that ties with others gets: the mean over all orders of the tied, the best of them, or the worst."""

KS = (1, 3, 5, 10, 20)
"""The k of hits@k that a summary has by default."""


def gold_counts(
    scores: ArrayLike | Sequence[ArrayLike],
    references: ArrayLike,
    mask: ArrayLike | Sequence[ArrayLike] | None = None,
    *,
    nil_score: ArrayLike | None = None,
) -> tuple[Counts, Counts]:
    """Counts, for each row, the candidates that score above the gold and those that score as it does.

    Args:
        scores: One score a candidate: an array ``[n, C]``, or n rows of any lengths. -inf is a score like any other.
        references: The gold's index in each row, ``[n]``; -1 where it is not among the candidates.
        mask: Of the shape or the lengths of ``scores``; False where there is no candidate. None: all are candidates.
            A row whose gold is masked is a miss.
        nil_score: The score of NIL, one for all rows or ``[n]``, which makes NIL one more candidate of every row, and
            the gold of those with reference -1. None: NIL is no candidate, and -1 is a miss.

    Returns:
        ``greater`` ``[n]`` and ``equal`` ``[n]``, the gold itself among the equal. Of a miss, ``equal`` is 0 and
        ``greater`` is all candidates.

    Raises:
        M3ELError: If a score is NaN or +inf, a row has no candidates, a reference is out of range, or the shapes do
            not fit.

    Example:
        >>> greater, equal = gold_counts([[0.5, 0.9, 0.5], [0.1, 0.2], [3.0]], [0, 1, -1])
        >>> greater.tolist(), equal.tolist()
        ([1, 0, 1], [2, 1, 0])
    """
    flat, starts = _flattened(scores, np.float64, "scores")
    sizes = np.diff(starts)
    golds = _indices(references, sizes)
    real = np.ones(len(flat), bool)
    if mask is not None:
        real, mask_starts = _flattened(mask, np.bool_, "mask")
        if not np.array_equal(mask_starts, starts):
            raise M3ELError(f"the mask and the scores differ in their shape{_first_difference(starts, mask_starts)}")
    if (bad := real & (np.isnan(flat) | np.isposinf(flat))).any():
        row = np.searchsorted(starts, bad.argmax(), side="right") - 1
        raise M3ELError(f"row {row} has a NaN or infinite score: it has no rank")
    candidates = _sums(real, starts)
    if nil_score is None and not candidates.all():
        raise M3ELError(f"row {candidates.argmin()} has no candidates: every row needs at least one")

    present = golds >= 0
    present[present] = real[(starts[:-1] + golds)[present]]
    gold_scores = np.full(len(sizes), np.inf)  # above which is nothing, and equal to which is nothing
    gold_scores[present] = flat[(starts[:-1] + golds)[present]]
    nil = _nil_scores(nil_score, len(sizes))
    if nil is not None:
        candidates = candidates + 1
        present, gold_scores = present | (golds < 0), np.where(golds < 0, nil, gold_scores)
    against = np.repeat(gold_scores, sizes)
    greater, equal = _sums(real & (flat > against), starts), _sums(real & (flat == against), starts)
    if nil is not None:
        greater, equal = greater + (nil > gold_scores), equal + (nil == gold_scores)
    return np.where(present, greater, candidates), equal


def hits_at_k(greater: ArrayLike, equal: ArrayLike, k: int, ties: str = "expected") -> Array:
    """Returns whether each row's gold is among the first k, ``[n]``: 0, 1, or the probability of it; 0 for a miss.

    Raises:
        M3ELError: If k is not positive, the counts are none, or there is no such way with ties.

    Example:
        >>> hits_at_k([0, 0, 1], [1, 3, 1], k=1).round(2).tolist()
        [1.0, 0.33, 0.0]
    """
    above, same = _counts(greater, equal)
    if k < 1:
        raise M3ELError(f"hits@{k} is not defined: k counts from 1")
    places = {
        "expected": (k - above) / np.maximum(same, 1),
        "optimistic": k - above,
        "pessimistic": k - above - same + 1,
    }[_checked(ties)]
    return np.clip(np.where(same, places, 0), 0.0, 1.0)


def ranks(greater: ArrayLike, equal: ArrayLike, ties: str = "expected") -> Array:
    """Returns each row's rank of the gold, counted from 1, ``[n]``; inf for a miss.

    Raises:
        M3ELError: If the counts are none, or there is no such way with ties.

    Example:
        >>> ranks([0, 0, 1], [1, 2, 0]).tolist()
        [1.0, 1.5, inf]
    """
    above, same = _counts(greater, equal)
    places = {"expected": (same + 1) / 2, "optimistic": np.ones_like(same), "pessimistic": same}[_checked(ties)]
    return np.where(same, above + places, np.inf)


def reciprocal_ranks(greater: ArrayLike, equal: ArrayLike, ties: str = "expected") -> Array:
    """Returns each row's (expected) reciprocal rank of the gold, ``[n]``; 0 for a miss.

    Raises:
        M3ELError: If the counts are none, or there is no such way with ties.

    Example:
        >>> reciprocal_ranks([0, 0, 1], [1, 2, 1]).round(12).tolist()
        [1.0, 0.75, 0.5]
    """
    above, same = _counts(greater, equal)
    if _checked(ties) != "expected":
        return 1 / ranks(above, same, ties)
    # The mean of 1 / (above + 1) ... 1 / (above + same) is a difference of harmonic numbers, log(n) + gamma + tail(n).
    # Their logarithms are subtracted as one, for the difference may be millions of times smaller than they are.
    first = np.maximum(above, 1)
    total = np.log1p((above + same - first) / first) + _harmonic_tail(above + same) - _harmonic_tail(above)
    return np.where(same > 1, total / np.maximum(same, 1), np.minimum(same, 1) / (above + 1))


def sampled_hits(greater: ArrayLike, equal: ArrayLike, candidates: ArrayLike, k: int) -> Array:
    """Returns the accuracy that each row would have with fewer candidates, in expectation, ``[n]``.

    That is the probability that the gold comes first among itself and k - 1 candidates that are drawn at random and
    without replacement from all others, ties broken at random. With N candidates, G greater and e equal it is
    ``(C(N - G, k) - C(N - G - e, k)) / (e C(N - 1, k - 1))``; 0 for a miss.

    Args:
        greater: Counts ``[n]``.
        equal: Counts ``[n]``.
        candidates: How many candidates each row has, ``[n]`` or one number for all.
        k: How many candidates remain, the gold included.

    Raises:
        M3ELError: If k is not positive or above a row's number of candidates, or the counts do not fit.

    Example:
        >>> sampled_hits([0, 1, 9], [1, 1, 1], 10, k=2).round(3).tolist()
        [1.0, 0.889, 0.0]
    """
    above, same = _counts(greater, equal)
    sizes = np.broadcast_to(np.asarray(candidates, np.int64), above.shape)
    if (bad := sizes < above + same).any():
        raise M3ELError(f"row {bad.argmax()} has more greater and equal candidates than candidates")
    if k < 1:
        raise M3ELError(f"{k} candidates cannot be drawn: k counts the gold and starts at 1")
    if (bad := sizes < k).any():
        raise M3ELError(f"row {bad.argmax()} has {sizes[bad.argmax()]} candidates, from which {k} cannot be drawn")
    # C(N - G, k) / C(N - 1, k - 1) and C(N - G - e, k) / C(N - G, k), as sums of logarithms over the draws.
    left, tied = sizes - above, np.maximum(same, 1)
    one, other = np.log(np.maximum(left, 1) / k), np.zeros(above.shape)
    with np.errstate(divide="ignore"):  # log(0) = -inf is a probability of 0
        for draw in range(k):
            if draw:
                one += np.log(np.maximum(left - draw, 0) / (sizes - draw))
            other += np.log1p(-tied / np.maximum(left - draw, tied))
    return np.where(same, np.exp(one) * -np.expm1(other) / tied, 0.0)


def bootstrap_interval(
    values: ArrayLike, groups: ArrayLike | None = None, *, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """Returns the 95 % percentile bootstrap interval of the mean of ``values`` ``[n]``.

    Args:
        values: One a row, such as hits.
        groups: Each row's group, ``[n]``, to draw whole groups: mentions of one entity are not independent. None draws
            rows.
        seed: Of the draws; the same seed gives the same interval, in whatever order the rows are.
        resamples: How many times to draw.

    Raises:
        M3ELError: If there are no values, one is not finite, or the lengths differ.
    """
    low, high = np.quantile(bootstrap_means(values, groups, seed=seed, resamples=resamples), [0.025, 0.975])
    return float(low), float(high)


def share_interval(values: ArrayLike, groups: ArrayLike | None = None, *, seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % interval of a share, the mean of ``values`` ``[n]`` between 0 and 1.

    It is `bootstrap_interval`, but where all values are 0, or all 1: of these every draw is alike, as if nothing else
    were possible. There it is the exact interval of a binomial share of as many draws as there are groups (Clopper and
    Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", 1934).

    Raises:
        M3ELError: As `bootstrap_interval` does.

    Example:
        >>> [round(end, 3) for end in share_interval([1, 1, 1, 1, 1, 1])]
        [0.541, 1.0]
    """
    array = _values(values)
    if array.min() < array.max() or array[0] not in (0, 1):
        return bootstrap_interval(array, groups, seed=seed)
    count = len(array) if groups is None else len(_labels(groups, len(array))[0])
    least = 0.025 ** (1 / count)
    return (least, 1.0) if array[0] else (0.0, 1 - least)


def bootstrap_means(
    values: ArrayLike, groups: ArrayLike | None = None, *, seed: int = 0, resamples: int = 1000
) -> Array:
    """Returns the means ``[resamples]`` of which `bootstrap_interval` is the middle 95 %, and takes the same.

    Raises:
        M3ELError: As `bootstrap_interval` does.
    """
    array = _values(values)
    # Groups of one sum and one size are interchangeable, so drawing how many of each kind there are is drawing groups.
    # Hits have few kinds.
    sums, sizes = _group_sums(array, groups)
    kinds, members = np.unique(sums + 1j * sizes, return_counts=True)  # complex, since rows of two sort far slower
    generator = np.random.default_rng(seed)
    means = []
    for count in _blocks(resamples, len(kinds)):
        drawn = generator.multinomial(len(sums), members / len(sums), size=count)
        means.append((drawn @ kinds.real) / (drawn @ kinds.imag))
    # No mean is outside the values; what is, is by rounding.
    return np.clip(np.concatenate(means), array.min(), array.max())


@dataclass(frozen=True)
class Difference:
    """How two systems differ on the same rows.

    Attributes:
        mean: The mean of the first's values less the second's.
        low: Of its 95 % bootstrap interval.
        high: Of its 95 % bootstrap interval.
        p_value: How probable a mean as far from 0 is, if it were chance which value is whose.
        n: How many rows there are.
    """

    mean: float
    low: float
    high: float
    p_value: float
    n: int


def paired_difference(
    a: ArrayLike, b: ArrayLike, groups: ArrayLike | None = None, *, seed: int = 0, resamples: int = 1000
) -> Difference:
    """Compares two systems' values on the same rows: a paired bootstrap and a two-sided randomisation test.

    The test swaps the two values of a row at random (of all rows of a group together), and counts how often the mean
    difference is as large as the one observed, which is itself one of the outcomes.

    Args:
        a: The first system's values ``[n]``, such as hits.
        b: The second's, of the same rows.
        groups: Each row's group, ``[n]``; None where rows are independent.
        seed: Of the draws.
        resamples: How many times to draw, for each of the two.

    Raises:
        M3ELError: If there are no values, one is not finite, or the lengths differ.
    """
    one, other = _values(a), _values(b)
    if len(one) != len(other):
        raise M3ELError(f"{len(one)} values of one system but {len(other)} of the other: pass both of the same rows")
    differences = one - other
    low, high = bootstrap_interval(differences, groups, seed=seed, resamples=resamples)
    sums, _ = _group_sums(differences, groups)
    # Groups of one size of difference are interchangeable: it matters how many of them are swapped.
    sizes, members = np.unique(np.abs(sums), return_counts=True)
    observed = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()  # what differs by rounding is as large
    generator = np.random.default_rng(seed)
    as_large = 0
    for count in _blocks(resamples, len(sizes)):
        swapped = generator.binomial(members, 0.5, size=(count, len(sizes)))
        as_large += int((np.abs((members - 2 * swapped) @ sizes) >= observed).sum())
    return Difference(float(differences.mean()), low, high, (1 + as_large) / (1 + resamples), len(differences))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number.

    This is Holm's correction ("A simple sequentially rejective multiple test procedure", 1979).

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values)[order] * factors))
    return [float(one) for one in corrected]


def group_means(values: ArrayLike, groups: ArrayLike) -> dict[Hashable, float]:
    """Returns the mean of ``values`` ``[n]`` in each group, by its label, sorted; ``groups`` ``[n]`` are the labels.

    Raises:
        M3ELError: If there are no values, one is not finite, or the lengths differ.

    Example:
        >>> group_means([1, 0, 1], ["t2t", "t2t", "i2i"])
        {'i2i': 1.0, 't2t': 0.5}
    """
    array = _values(values)
    labels, _ = _labels(groups, len(array))
    sums, sizes = _group_sums(array, groups)
    return dict(zip(labels.tolist(), (sums / sizes).tolist(), strict=True))


def macro_mean(values: ArrayLike, groups: ArrayLike) -> float:
    """Returns the mean of the groups' means, in which each group counts alike; see `group_means`."""
    return float(np.mean(list(group_means(values, groups).values())))


def summarise(
    greater: ArrayLike,
    equal: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    ks: Sequence[int] = KS,
    ties: str = "expected",
    seed: int = 0,
) -> dict[str, float]:
    """Returns all measures of the rows, by name.

    Args:
        greater: Counts ``[n]``, as `gold_counts` returns them.
        equal: Counts ``[n]``.
        groups: Each row's group, ``[n]``, which the interval is to draw whole; None draws rows.
        ks: The k of hits@k.
        ties: One of `TIES`.
        seed: Of the interval.

    Returns:
        ``accuracy`` and its 95 % interval ``accuracy_low`` and ``accuracy_high``; ``hits@k`` for each k; ``mrr``;
        ``mean_rank`` and ``median_rank`` over the rows that are no miss (NaN where all are); ``tie_share``, the share
        of rows whose first place is tied and the gold among the tied; ``misses``, the number of rows whose gold is not
        among the candidates; ``ceiling``, the share of the others, above which no accuracy can be; and ``n``.

    Raises:
        M3ELError: If there are no rows, and as the measures do.
    """
    above, same = _counts(greater, equal)
    if not len(above):
        raise M3ELError("no rows to summarise: evaluate at least one")
    hits = hits_at_k(above, same, 1, ties)
    low, high = share_interval(hits, groups, seed=seed)
    found = ranks(above, same, ties)[same > 0]
    return {
        "accuracy": float(hits.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        **{f"hits@{k}": float(hits_at_k(above, same, k, ties).mean()) for k in ks},
        "mrr": float(reciprocal_ranks(above, same, ties).mean()),
        "mean_rank": float(found.mean()) if len(found) else np.nan,
        "median_rank": float(np.median(found)) if len(found) else np.nan,
        "tie_share": float(((above == 0) & (same > 1)).mean()),
        "misses": len(above) - len(found),
        "ceiling": len(found) / len(above),
        "n": len(above),
    }


def _flattened(rows: Any, dtype: type[np.generic], name: str) -> tuple[NDArray[Any], Counts]:
    """Returns all rows' values, one row after the other, and where each row starts and the last ends, ``[n + 1]``."""
    if hasattr(rows, "__array__") and len(np.shape(rows)) == 2:
        array = np.asarray(rows).astype(dtype, copy=False)
        return array.ravel(), np.arange(array.shape[0] + 1) * array.shape[1]
    arrays = []
    for place, row in enumerate(rows):
        try:
            array = np.asarray(row, dtype=dtype)
        except (TypeError, ValueError) as error:
            raise M3ELError(f"row {place} of the {name} is no row of numbers: {error}") from error
        if array.ndim != 1:
            raise M3ELError(f"row {place} of the {name} has {array.ndim} dimensions: pass one value a candidate")
        arrays.append(array)
    starts = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    return np.concatenate(arrays) if arrays else np.empty(0, dtype), starts


def _first_difference(starts: Counts, mask_starts: Counts) -> str:
    """Where the mask is unlike the scores, as an end of a sentence."""
    if len(starts) != len(mask_starts):
        return f": {len(starts) - 1} rows of scores but {len(mask_starts) - 1} of the mask"
    sizes, mask_sizes = np.diff(starts), np.diff(mask_starts)
    row = (sizes != mask_sizes).argmax()
    return f": row {row} has {sizes[row]} scores but {mask_sizes[row]} values of the mask"


def _indices(references: ArrayLike, sizes: Counts) -> Counts:
    golds = np.asarray(references)
    if golds.shape != sizes.shape:
        passed = len(golds) if golds.ndim == 1 else f"{golds.ndim} dimensions of"
        raise M3ELError(f"{len(sizes)} rows of scores but {passed} references: pass one of each a row")
    if golds.size and golds.dtype.kind not in "iu":
        raise M3ELError("references must be whole numbers: each the index of a row's gold, or -1")
    if (bad := (golds < -1) | (golds >= sizes)).any():
        row = bad.argmax()
        if not sizes[row]:
            raise M3ELError(f"row {row} has no candidates: every row needs at least one")
        raise M3ELError(
            f"row {row} has reference {golds[row]}, but {sizes[row]} candidates: indices start at 0, and -1 is a miss"
        )
    return golds.astype(np.int64)


def _nil_scores(nil_score: ArrayLike | None, n: int) -> Array | None:
    if nil_score is None:
        return None
    nil = np.asarray(nil_score, np.float64)
    if nil.shape not in ((), (n,)):
        raise M3ELError(f"NIL has scores of shape {nil.shape} but there are {n} rows: pass one score, or one a row")
    nil = np.broadcast_to(nil, n)
    if (bad := np.isnan(nil) | np.isposinf(nil)).any():
        raise M3ELError(f"row {bad.argmax()} has a NaN or infinite score of NIL: it has no rank")
    return nil


def _sums(flags: NDArray[np.bool_], starts: Counts) -> Counts:
    """How many flags each row has; rows may be empty."""
    return np.diff(np.searchsorted(np.flatnonzero(flags), starts))


def _counts(greater: ArrayLike, equal: ArrayLike) -> tuple[Counts, Counts]:
    above, same = np.asarray(greater), np.asarray(equal)
    if above.ndim != 1 or above.shape != same.shape:
        raise M3ELError(f"counts of shapes {above.shape} and {same.shape}: pass one of each a row")
    if above.size and (above.dtype.kind not in "iu" or same.dtype.kind not in "iu"):
        raise M3ELError("counts must be whole numbers, as gold_counts returns them")
    above, same = above.astype(np.int64), same.astype(np.int64)
    if (bad := (above < 0) | (same < 0)).any():
        raise M3ELError(f"row {bad.argmax()} has a count below 0")
    return above, same


def _checked(ties: str) -> str:
    if ties not in TIES:
        raise M3ELError(f"ties cannot be {ties!r}: choose {', '.join(TIES[:-1])} or {TIES[-1]}")
    return ties


_EXACT_UP_TO = 32
_EXACT_TAILS = np.concatenate(
    [
        [-np.euler_gamma],
        np.cumsum(1 / np.arange(1, _EXACT_UP_TO)) - np.log(np.arange(1, _EXACT_UP_TO)) - np.euler_gamma,
    ]
)


def _harmonic_tail(n: Counts) -> Array:
    """The n-th harmonic number less log(n) + gamma (log(1) where n is 0), by its asymptotic series for a large n."""
    large = np.maximum(n, _EXACT_UP_TO).astype(np.float64)
    square = large**-2
    series = 0.5 / large - square * (1 / 12 - square * (1 / 120 - square / 252))
    return np.where(n < _EXACT_UP_TO, _EXACT_TAILS[np.minimum(n, _EXACT_UP_TO - 1)], series)


def _values(values: ArrayLike) -> Array:
    array = np.asarray(values, np.float64)
    if array.ndim != 1:
        raise M3ELError(f"values of shape {array.shape}: pass one a row")
    if not len(array):
        raise M3ELError("no values: evaluate at least one row")
    if not np.isfinite(array).all():
        raise M3ELError(f"row {(~np.isfinite(array)).argmax()} has a NaN or infinite value: it has no mean")
    return array


def _labels(groups: ArrayLike, n: int) -> tuple[NDArray[Any], Counts]:
    """The sorted labels, and each row's place among them."""
    array = np.asarray(groups)
    if array.shape != (n,):
        raise M3ELError(f"groups of shape {array.shape} but {n} values: pass one label a row")
    try:
        return np.unique(array, return_inverse=True)
    except TypeError as error:
        raise M3ELError("labels of groups must be all text or all numbers, and none may be missing") from error


def _group_sums(values: Array, groups: ArrayLike | None) -> tuple[Array, Array]:
    """Each group's sum of values and number of rows; without groups, each row is one."""
    if groups is None:
        return values, np.ones(len(values))
    _, places = _labels(groups, len(values))
    return np.bincount(places, values).astype(np.float64), np.bincount(places).astype(np.float64)


def _blocks(resamples: int, width: int, cells: int = 1 << 22) -> Iterator[int]:
    """How many resamples of ``width`` numbers to draw at once, so that no block has many more than ``cells``."""
    if resamples < 1:
        raise M3ELError(f"{resamples} resamples have no interval: draw at least one")
    step = max(1, cells // width)
    for start in range(0, resamples, step):
        yield min(step, resamples - start)
