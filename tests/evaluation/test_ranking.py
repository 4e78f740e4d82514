from __future__ import annotations

import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.ranking import bootstrap_interval, gold_counts, hits_at_k, reciprocal_ranks, summarise

fast = settings(deadline=None, max_examples=30)
# Few values, so that many tie.
values = st.sampled_from([-math.inf, -1.5, 0.0, 0.25, 3.0])
rows = st.lists(values, min_size=1, max_size=5)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[list[float]], list[int]]:
    scores = draw(st.lists(rows, min_size=1, max_size=4))
    return scores, [draw(st.integers(0, len(row) - 1)) for row in scores]


def ranks_over_all_tie_breaks(scores: list[float], gold: int) -> list[int]:
    """The gold's rank in every order that a sort of shuffled candidates can give."""
    ranks = []
    for order in permutations(range(len(scores))):
        ranked = sorted(order, key=lambda candidate: -scores[candidate])
        ranks.append(ranked.index(gold) + 1)
    return ranks


@fast
@given(table=tables(), k=st.integers(0, 7))
def test_ties_count_by_their_probability(table, k):
    scores, golds = table
    counts = gold_counts(scores, golds)
    for row, gold, hits, reciprocal in zip(
        scores, golds, hits_at_k(*counts, k), reciprocal_ranks(*counts), strict=True
    ):
        ranks = ranks_over_all_tie_breaks(row, gold)
        assert hits == pytest.approx(float(Fraction(sum(rank <= k for rank in ranks), len(ranks))))
        assert reciprocal == pytest.approx(float(sum(Fraction(1, rank) for rank in ranks) / len(ranks)))


@fast
@given(table=tables(), data=st.data())
def test_the_order_of_candidates_does_not_matter(table, data):
    scores, golds = table
    orders = [data.draw(st.permutations(range(len(row)))) for row in scores]
    shuffled = [[row[candidate] for candidate in order] for row, order in zip(scores, orders, strict=True)]
    moved = [order.index(gold) for order, gold in zip(orders, golds, strict=True)]
    assert summarise(shuffled, moved) == summarise(scores, golds)


@fast
@given(table=tables())
def test_hits_grow_with_k_from_none_to_all(table):
    counts = gold_counts(*table)
    hits = np.array([hits_at_k(*counts, k) for k in range(7)])
    assert not hits[0].any()
    assert (np.diff(hits, axis=0) >= 0).all()
    assert (hits[5:] == 1).all()


@fast
@given(scores=rows, data=st.data())
def test_the_hits_of_all_candidates_at_1_add_to_one(scores, data):
    repeated = [scores] * len(scores)
    assert hits_at_k(*gold_counts(repeated, range(len(scores))), 1).sum() == pytest.approx(1)


@fast
@given(table=tables())
def test_the_summary_is_the_means(table):
    scores, golds = table
    every = [ranks_over_all_tie_breaks(row, gold) for row, gold in zip(scores, golds, strict=True)]
    summary = summarise(scores, golds)
    assert summary["accuracy"] == pytest.approx(np.mean([np.mean(np.array(ranks) == 1) for ranks in every]))
    assert summary["mrr"] == pytest.approx(np.mean([np.mean(1 / np.array(ranks)) for ranks in every]))
    decided_by_a_tie = [0 < np.mean(np.array(ranks) == 1) < 1 for ranks in every]
    assert summary["tie_share"] == pytest.approx(np.mean(decided_by_a_tie))
    assert summary["n"] == len(scores)
    assert 0 <= summary["accuracy_low"] <= summary["accuracy_high"] <= 1


@pytest.mark.parametrize("score", [0.0, -math.inf, 1e300, -7])
@pytest.mark.parametrize("candidates", [1, 2, 3, 10])
def test_scoring_all_alike_is_chance_wherever_the_gold_stands(score, candidates):
    for gold in range(candidates):
        assert summarise([[score] * candidates], [gold])["accuracy"] == pytest.approx(1 / candidates)


def test_any_array_is_taken_and_small_differences_count():
    close = np.array([1.0, 1.0 + 1e-12, 1.0 - 1e-12])
    assert summarise([close, close.tolist()], np.array([1, 1]))["accuracy"] == 1
    assert summarise([np.float32([0.1, 0.2]), [1, 2, 3]], [1, 2])["accuracy"] == 1


@pytest.mark.parametrize(
    ("scores", "golds", "message"),
    [
        ([[1.0], [0.0, math.nan]], [0, 0], "row 1 has a NaN"),
        ([[1.0], [math.inf, 0.0]], [0, 1], "row 1 has a NaN or infinite"),
        ([[1.0], [1.0], []], [0, 0, 0], "row 2 has no candidates"),
        ([[1.0, 2.0]], [2], "row 0 has reference 2, but 2 candidates"),
        ([[1.0], [1.0, 2.0]], [0, -1], "row 1 has reference -1"),
        ([[1.0]], [0, 0], "1 rows of scores but 2 references"),
        ([], [], "no values"),
    ],
)
def test_what_has_no_rank_is_an_error_that_names_the_row(scores, golds, message):
    with pytest.raises(M3ELError, match=message):
        summarise(scores, golds)


def test_the_interval_of_equal_values_is_the_value():
    assert bootstrap_interval(np.full(7, 0.25)) == (0.25, 0.25)


@fast
@given(st.lists(st.sampled_from([0.0, 1 / 3, 0.5, 1.0]), min_size=1, max_size=30))
def test_the_interval_is_repeatable_and_within_the_values(some):
    array = np.array(some)
    low, high = bootstrap_interval(array, resamples=200)
    assert (low, high) == bootstrap_interval(array, resamples=200)
    assert array.min() <= low <= high <= array.max()


def test_the_interval_is_that_of_a_mean():
    """For many values it is the normal one: 1.96 standard errors to each side."""
    sample = (np.arange(400) % 4 == 0).astype(float)
    low, high = bootstrap_interval(sample, resamples=4000)
    margin = 1.96 * sample.std() / math.sqrt(len(sample))
    assert (low, high) == (pytest.approx(0.25 - margin, abs=0.005), pytest.approx(0.25 + margin, abs=0.005))
