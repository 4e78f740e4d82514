from __future__ import annotations

import math
import time
import tracemalloc
from fractions import Fraction
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.ranking import (
    TIES,
    Difference,
    bootstrap_interval,
    gold_counts,
    group_means,
    hits_at_k,
    macro_mean,
    paired_difference,
    ranks,
    reciprocal_ranks,
    sampled_hits,
    summarise,
)

fast = settings(deadline=None, max_examples=40)
# Few values, so that many tie.
values = st.sampled_from([-math.inf, -1.5, 0.0, 0.25, 3.0])
rows = st.lists(values, min_size=1, max_size=5)


@st.composite
def tables(draw: st.DrawFn, lowest: int = -1) -> tuple[list[list[float]], list[int]]:
    scores = draw(st.lists(rows, min_size=1, max_size=4))
    return scores, [draw(st.integers(lowest, len(row) - 1)) for row in scores]


def ranks_over_all_tie_breaks(scores: list[float], gold: int) -> list[float]:
    """The gold's rank in every order that a sort of shuffled candidates can give."""
    if gold < 0:
        return [math.inf]
    found = []
    for order in permutations(range(len(scores))):
        ranked = sorted(order, key=lambda candidate: -scores[candidate])
        found.append(ranked.index(gold) + 1)
    return found


@fast
@given(table=tables(), k=st.integers(1, 7))
def test_ties_count_by_their_probability(table, k):
    scores, golds = table
    counts = gold_counts(scores, golds)
    measured = zip(hits_at_k(*counts, k), reciprocal_ranks(*counts), ranks(*counts), strict=True)
    for row, gold, (hits, reciprocal, rank) in zip(scores, golds, measured, strict=True):
        every = ranks_over_all_tie_breaks(row, gold)
        assert hits == pytest.approx(float(Fraction(sum(one <= k for one in every), len(every))))
        assert reciprocal == pytest.approx(np.mean([1 / one for one in every]))
        assert rank == pytest.approx(np.mean(every))


@fast
@given(table=tables(), k=st.integers(1, 7))
def test_optimistic_and_pessimistic_are_the_best_and_the_worst_order(table, k):
    scores, golds = table
    counts = gold_counts(scores, golds)
    every = [ranks_over_all_tie_breaks(row, gold) for row, gold in zip(scores, golds, strict=True)]
    for ties, choose in (("optimistic", min), ("pessimistic", max)):
        chosen = np.array([choose(one) for one in every], float)
        assert (ranks(*counts, ties) == chosen).all()
        assert (hits_at_k(*counts, k, ties) == (chosen <= k)).all()
        assert reciprocal_ranks(*counts, ties) == pytest.approx(1 / chosen)


@fast
@given(table=tables())
def test_the_expected_lies_between_the_optimistic_and_the_pessimistic(table):
    expected, optimistic, pessimistic = (summarise(*gold_counts(*table), ties=ties) for ties in TIES)
    for name in ("accuracy", "hits@3", "mrr"):
        assert pessimistic[name] - 1e-12 <= expected[name] <= optimistic[name] + 1e-12
    if expected["misses"] < expected["n"]:
        assert optimistic["mean_rank"] <= expected["mean_rank"] <= pessimistic["mean_rank"]


@fast
@given(table=tables(), data=st.data())
def test_the_order_of_candidates_does_not_matter(table, data):
    scores, golds = table
    orders = [data.draw(st.permutations(range(len(row)))) for row in scores]
    shuffled = [[row[candidate] for candidate in order] for row, order in zip(scores, orders, strict=True)]
    moved = [order.index(gold) if gold >= 0 else gold for order, gold in zip(orders, golds, strict=True)]
    assert np.array_equal(gold_counts(shuffled, moved), gold_counts(scores, golds))


@fast
@given(table=tables())
def test_a_monotone_transform_changes_nothing(table):
    scores, golds = table
    for transform in (np.arctan, np.exp2, lambda row: np.float32(row) * 8 - 3):
        transformed = [transform(np.array(row)) for row in scores]
        assert np.array_equal(gold_counts(transformed, golds), gold_counts(scores, golds))


@fast
@given(table=tables(), data=st.data())
def test_a_masked_candidate_is_a_candidate_left_out(table, data):
    scores, golds = table
    masks = [data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row)).filter(any)) for row in scores]
    masked = [
        [value if kept else math.nan for value, kept in zip(row, mask, strict=True)]
        for row, mask in zip(scores, masks, strict=True)
    ]
    left = [
        [value for value, kept in zip(row, mask, strict=True) if kept] for row, mask in zip(scores, masks, strict=True)
    ]
    moved = [sum(mask[:gold]) if gold >= 0 and mask[gold] else -1 for gold, mask in zip(golds, masks, strict=True)]
    expected = gold_counts(left, moved)
    assert np.array_equal(gold_counts(scores, golds, masks), expected)
    assert np.array_equal(gold_counts(masked, golds, masks), expected), "and what is masked may be anything"
    width = max(map(len, scores))
    padded = np.array([row + [math.nan] * (width - len(row)) for row in masked])
    padded_mask = np.array([mask + [False] * (width - len(mask)) for mask in masks])
    assert np.array_equal(gold_counts(padded, golds, padded_mask), expected)


@fast
@given(table=tables(), nil=values, data=st.data())
def test_nil_is_one_more_candidate(table, nil, data):
    scores, golds = table
    nils = [data.draw(values) for _ in scores]
    with_nil = [[*row, one] for row, one in zip(scores, nils, strict=True)]
    meant = [gold if gold >= 0 else len(row) for row, gold in zip(scores, golds, strict=True)]
    assert np.array_equal(gold_counts(scores, golds, nil_score=nils), gold_counts(with_nil, meant))
    assert np.array_equal(
        gold_counts(scores, golds, nil_score=nil), gold_counts(scores, golds, nil_score=[nil] * len(scores))
    )


def test_nil_may_be_the_only_candidate_and_does_not_make_a_masked_gold_a_hit():
    greater, equal = gold_counts([[], [5.0, 1.0]], [-1, 0], [[], [False, True]], nil_score=2.0)
    assert (greater.tolist(), equal.tolist()) == ([0, 2], [1, 0])


@fast
@given(table=tables(lowest=0))
def test_hits_grow_with_k_to_all(table):
    counts = gold_counts(*table)
    hits = np.array([hits_at_k(*counts, k) for k in range(1, 7)])
    assert (np.diff(hits, axis=0) >= 0).all()
    assert (hits[4:] == 1).all()


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
    summary = summarise(*gold_counts(scores, golds), ks=(1, 2))
    found = [np.mean(one) for one in every if math.isfinite(one[0])]
    assert summary["accuracy"] == pytest.approx(np.mean([np.mean(np.array(one) == 1) for one in every]))
    assert summary["hits@2"] == pytest.approx(np.mean([np.mean(np.array(one) <= 2) for one in every]))
    assert summary["mrr"] == pytest.approx(np.mean([np.mean(1 / np.array(one)) for one in every]))
    assert summary["mean_rank"] == pytest.approx(np.mean(found) if found else math.nan, nan_ok=True)
    assert summary["median_rank"] == pytest.approx(np.median(found) if found else math.nan, nan_ok=True)
    decided_by_a_tie = [0 < np.mean(np.array(one) == 1) < 1 for one in every]
    assert summary["tie_share"] == pytest.approx(np.mean(decided_by_a_tie))
    assert (summary["n"], summary["misses"]) == (len(scores), golds.count(-1))
    assert summary["ceiling"] == pytest.approx(1 - golds.count(-1) / len(scores))
    assert 0 <= summary["accuracy_low"] <= summary["accuracy_high"] <= 1
    assert summary["accuracy"] == summary["hits@1"] <= summary["ceiling"]


@pytest.mark.parametrize("score", [0.0, -math.inf, 1e300, -7])
@pytest.mark.parametrize("candidates", [1, 2, 3, 10])
def test_scoring_all_alike_is_chance_wherever_the_gold_stands(score, candidates):
    for gold in range(candidates):
        summary = summarise(*gold_counts([[score] * candidates], [gold]))
        assert summary["accuracy"] == pytest.approx(1 / candidates)
        assert summary["mean_rank"] == pytest.approx((candidates + 1) / 2)


@given(score=st.floats(allow_nan=False, max_value=1e308))
def test_one_candidate_is_always_right(score):
    summary = summarise(*gold_counts([[score]], [0]))
    assert (summary["accuracy"], summary["mrr"], summary["mean_rank"], summary["tie_share"]) == (1, 1, 1, 0)


def test_any_array_is_taken_and_small_differences_count():
    close = np.array([1.0, 1.0 + 1e-12, 1.0 - 1e-12])
    assert hits_at_k(*gold_counts([close, close.tolist()], np.array([1, 1])), 1).all()
    assert hits_at_k(*gold_counts([np.float32([0.1, 0.2]), [1, 2, 3]], [1, 2]), 1).all()
    assert hits_at_k(*gold_counts(np.array([[1, 2], [3, 2]], np.float32), np.array([1, 0], np.int32)), 1).all()
    assert gold_counts([], [])[0].shape == (0,)


@given(above=st.integers(0, 10**7), same=st.integers(2, 200))
@fast
def test_the_reciprocal_rank_of_many_ties_is_exact(above, same):
    exact = math.fsum(1 / rank for rank in range(above + 1, above + same + 1)) / same
    assert reciprocal_ranks([above], [same])[0] == pytest.approx(exact, rel=1e-12, abs=0)


def test_the_reciprocal_rank_without_a_tie_is_that_of_the_rank():
    above = np.arange(1000)
    assert (reciprocal_ranks(above, np.ones_like(above)) == 1 / (above + 1)).all()


@pytest.mark.parametrize("candidates", range(1, 7))
def test_sampled_hits_are_those_over_all_subsets(candidates):
    for above in range(candidates):
        for same in range(1, candidates - above + 1):
            others = [1] * above + [0] * (same - 1) + [-1] * (candidates - above - same)
            for k in range(1, candidates + 1):
                chances = [
                    0 if 1 in drawn else Fraction(1, 1 + drawn.count(0)) for drawn in combinations(others, k - 1)
                ]
                exact = float(sum(chances, Fraction(0)) / len(chances))
                assert sampled_hits([above], [same], candidates, k)[0] == pytest.approx(exact, abs=1e-14)
    assert sampled_hits([candidates], [0], candidates, 1)[0] == 0, "a miss stays a miss"


@fast
@given(above=st.integers(0, 40), same=st.integers(1, 30), k=st.integers(1, 60), more=st.integers(0, 10**6))
def test_sampled_hits_are_exact_among_many(above, same, k, more):
    candidates = max(above + same, k) + more
    exact = Fraction(
        math.comb(candidates - above, k) - math.comb(candidates - above - same, k),
        same * math.comb(candidates - 1, k - 1),
    )
    assert sampled_hits([above], [same], [candidates], k)[0] == pytest.approx(float(exact), rel=1e-9, abs=1e-300)


@fast
@given(table=tables())
def test_sampling_all_candidates_or_one_is_no_sampling(table):
    scores, golds = table
    greater, equal = gold_counts(scores, golds)
    sizes = np.array([len(row) for row in scores])
    assert sampled_hits(greater, equal, sizes, 1) == pytest.approx(1.0 * (np.array(golds) >= 0))
    for above, same, size, hits in zip(greater, equal, sizes, hits_at_k(greater, equal, 1), strict=True):
        assert sampled_hits([above], [same], size, int(size))[0] == pytest.approx(hits)


@pytest.mark.parametrize(
    ("scores", "golds", "options", "message"),
    [
        ([[1.0], [0.0, math.nan]], [0, 0], {}, "row 1 has a NaN"),
        ([[1.0], [math.inf, 0.0]], [0, 1], {}, "row 1 has a NaN or infinite"),
        ([[1.0], [1.0, None]], [0, 0], {}, "row 1 has a NaN"),
        ([[1.0], [1.0], []], [0, 0, 0], {}, "row 2 has no candidates"),
        ([[1.0], []], [0, -1], {}, "row 1 has no candidates"),
        (np.zeros((2, 0)), [0, 0], {}, "row 0 has no candidates"),
        ([[1.0], [1.0, 2.0]], [0, 0], {"mask": [[True], [False, False]]}, "row 1 has no candidates"),
        ([[1.0, 2.0]], [2], {}, "row 0 has reference 2, but 2 candidates"),
        ([[1.0], [1.0, 2.0]], [0, -2], {}, "row 1 has reference -2"),
        ([[1.0]], [0, 0], {}, "1 rows of scores but 2 references"),
        ([[1.0]], [[0]], {}, "1 rows of scores but 2 dimensions of references"),
        ([[1.0]], [0.0], {}, "references must be whole numbers"),
        ([[1.0]], [None], {}, "references must be whole numbers"),
        ([[1.0], [[1.0]]], [0, 0], {}, "row 1 of the scores has 2 dimensions"),
        ([[1.0], 1.0], [0, 0], {}, "row 1 of the scores has 0 dimensions"),
        (np.zeros(3), [0, 0, 0], {}, "row 0 of the scores has 0 dimensions"),
        ([["a"]], [0], {}, "row 0 of the scores is no row of numbers"),
        ([[1.0], [1.0, 2.0]], [0, 0], {"mask": [[True], [True]]}, "row 1 has 2 scores but 1 values of the mask"),
        (np.zeros((2, 3)), [0, 0], {"mask": np.ones((1, 3), bool)}, "2 rows of scores but 1 of the mask"),
        ([[1.0]], [0], {"nil_score": math.nan}, "row 0 has a NaN or infinite score of NIL"),
        ([[1.0], [1.0]], [0, 0], {"nil_score": [0.0]}, r"NIL has scores of shape \(1,\) but there are 2 rows"),
    ],
)
def test_what_has_no_rank_is_an_error_that_names_the_row(scores, golds, options, message):
    with pytest.raises(M3ELError, match=message) as caught:
        gold_counts(scores, golds, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda: summarise([], []), "no rows to summarise"),
        (lambda: hits_at_k([0], [1], 0), "hits@0 is not defined"),
        (lambda: ranks([0], [1], "best"), "ties cannot be 'best': choose expected, optimistic or pessimistic"),
        (lambda: summarise([0], [1], ties="mean"), "ties cannot be 'mean'"),
        (lambda: ranks([0, 1], [1]), r"counts of shapes \(2,\) and \(1,\)"),
        (lambda: ranks([[0]], [[1]]), "counts of shapes"),
        (lambda: ranks([0.5], [1]), "counts must be whole numbers"),
        (lambda: ranks([0, -1], [1, 1]), "row 1 has a count below 0"),
        (lambda: sampled_hits([0, 2], [1, 1], 2, 1), "row 1 has more greater and equal candidates than candidates"),
        (lambda: sampled_hits([0, 0], [1, 1], [4, 3], 4), "row 1 has 3 candidates, from which 4 cannot be drawn"),
        (lambda: sampled_hits([0], [1], 2, 0), "0 candidates cannot be drawn"),
        (lambda: bootstrap_interval([]), "no values"),
        (lambda: bootstrap_interval([1.0, math.nan]), "row 1 has a NaN"),
        (lambda: bootstrap_interval([[1.0]]), r"values of shape \(1, 1\)"),
        (lambda: bootstrap_interval([1.0], [1, 2]), r"groups of shape \(2,\) but 1 values"),
        (lambda: bootstrap_interval([1.0], resamples=0), "0 resamples"),
        (lambda: paired_difference([1.0], [1.0, 0.0]), "1 values of one system but 2 of the other"),
        (lambda: group_means([1.0, 1.0], ["a", None]), "labels of groups must be all text or all numbers"),
    ],
)
def test_what_cannot_be_measured_is_an_error(measure, message):
    with pytest.raises(M3ELError, match=message) as caught:
        measure()
    assert "\n" not in str(caught.value)


def test_a_tie_with_candidates_below_minus_infinity_is_still_a_tie():
    assert np.array_equal(gold_counts([[-math.inf, -math.inf, 0.0]], [0]), [[1], [2]])


def test_the_interval_of_equal_values_is_the_value():
    for value in (0.25, 1 / 3, 0.1):
        assert bootstrap_interval(np.full(7, value)) == (value, value)


@fast
@given(st.lists(st.sampled_from([0.0, 1 / 3, 0.5, 1.0]), min_size=1, max_size=30), st.randoms())
def test_the_interval_is_repeatable_in_any_order_and_within_the_values(some, random):
    low, high = bootstrap_interval(some, resamples=200)
    assert min(some) <= low <= high <= max(some)
    random.shuffle(some)
    assert (low, high) == bootstrap_interval(some, resamples=200)


def test_the_interval_is_that_of_a_mean():
    """For many values it is the normal one: 1.96 standard errors to each side."""
    sample = (np.arange(400) % 4 == 0).astype(float)
    low, high = bootstrap_interval(sample, resamples=4000)
    margin = 1.96 * sample.std() / math.sqrt(len(sample))
    assert (low, high) == (pytest.approx(0.25 - margin, abs=0.005), pytest.approx(0.25 + margin, abs=0.005))


def test_groups_of_equal_rows_are_as_many_rows_as_groups():
    sample = np.random.default_rng(1).random(40)
    repeated, groups = np.repeat(sample, 5), np.repeat(np.arange(40), 5)
    alone = bootstrap_interval(sample, resamples=4000)
    assert bootstrap_interval(repeated, groups, resamples=4000) == pytest.approx(alone, abs=0.01)
    low, high = bootstrap_interval(repeated, resamples=4000)
    assert high - low < 0.6 * (alone[1] - alone[0]), "and rows alone would be too sure"


def test_groups_of_different_sizes_are_drawn_whole():
    """Against drawing groups one by one."""
    generator = np.random.default_rng(2)
    groups = generator.integers(0, 12, 90)
    sample = generator.random(90) + groups % 3
    labels = np.unique(groups)
    means = []
    for _ in range(4000):
        drawn = np.concatenate([sample[groups == label] for label in generator.choice(labels, len(labels))])
        means.append(drawn.mean())
    named = np.array([f"Q{label}" for label in groups])
    assert bootstrap_interval(sample, named, resamples=4000) == pytest.approx(
        tuple(np.quantile(means, [0.025, 0.975])), abs=0.03
    )


def test_many_rows_are_resampled_fast_and_in_little_memory():
    sample = np.random.default_rng(0).random(20_000)  # all of a kind of their own, which is the slowest case
    tracemalloc.start()
    began = time.perf_counter()
    bootstrap_interval(sample, resamples=300)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.perf_counter() - began < 5
    assert peak < 2e8


def test_a_paired_difference_is_of_the_rows_that_differ():
    a, b = np.array([1.0] * 30 + [0.0] * 10), np.array([1.0] * 15 + [0.0] * 25)
    difference = paired_difference(a, b)
    assert (difference.mean, difference.n) == (0.375, 40)
    assert 0 < difference.low < 0.375 < difference.high
    assert difference.p_value == pytest.approx(1 / 1001)
    back = paired_difference(b, a)
    assert (back.mean, back.p_value) == (-0.375, difference.p_value)


def test_a_system_does_not_differ_from_itself():
    assert paired_difference([0.5, 1, 0], [0.5, 1, 0]) == Difference(0.0, 0.0, 0.0, 1.0, 3)


def test_rows_of_one_group_are_no_more_evidence_than_one():
    a, b = np.ones(60), np.zeros(60)
    assert paired_difference(a, b).p_value < 0.01
    assert paired_difference(a, b, np.repeat([1, 2, 3], 20)).p_value == pytest.approx(2 / 2**3, abs=0.05)


def test_the_intervals_of_a_summary_and_of_a_difference_draw_whole_groups():
    right = np.repeat([0, 1, 1, 0, 1, 0, 1, 1], 25)
    groups = np.repeat(np.arange(8), 25)
    summary = summarise(1 - right, np.ones_like(right), groups=groups)
    interval = summary["accuracy_low"], summary["accuracy_high"]
    assert interval == bootstrap_interval(right, groups) != bootstrap_interval(right)
    difference = paired_difference(right, np.zeros(len(right)), groups)
    assert (difference.low, difference.high) == interval


def test_means_of_groups():
    figures, topics = [1, 0, 1, 1], ["person", "person", "movies", "person"]
    assert group_means(figures, topics) == {"movies": 1.0, "person": pytest.approx(2 / 3)}
    assert macro_mean(figures, topics) == pytest.approx((1 + 2 / 3) / 2)
    assert group_means([1, 0], [7, 3]) == {3: 0.0, 7: 1.0}


# Other libraries have some of the metrics.


def distinct(generator: np.random.Generator, n: int, candidates: int) -> tuple[np.ndarray, np.ndarray]:
    return generator.permuted(np.tile(np.arange(candidates) / 7, (n, 1)), axis=1), generator.integers(0, candidates, n)


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_hits_are_top_k_accuracy(k):
    scores, golds = distinct(np.random.default_rng(k), 200, 9)
    expected = metrics.top_k_accuracy_score(golds, scores, k=k, labels=range(9))
    assert hits_at_k(*gold_counts(scores, golds), k).mean() == pytest.approx(expected)


def test_mrr_is_label_ranking_average_precision_of_one_label():
    scores, golds = distinct(np.random.default_rng(0), 200, 9)
    counts = gold_counts(scores, golds)
    expected = metrics.label_ranking_average_precision_score(np.eye(9)[golds], scores)
    assert reciprocal_ranks(*counts).mean() == pytest.approx(expected)


def test_pessimistic_ranks_are_how_label_ranking_counts_ties():
    generator = np.random.default_rng(0)
    scores, golds = generator.integers(0, 4, (200, 9)), generator.integers(0, 9, 200)
    counts = gold_counts(scores, golds)
    assert len(np.unique(counts[1])) > 3
    truth = np.eye(9)[golds]
    precision = metrics.label_ranking_average_precision_score(truth, scores)
    assert reciprocal_ranks(*counts, "pessimistic").mean() == pytest.approx(precision)
    assert ranks(*counts, "pessimistic").mean() == pytest.approx(metrics.coverage_error(truth, scores))


@pytest.mark.parametrize("ties", TIES)
def test_ranks_are_those_of_rankdata(ties):
    generator = np.random.default_rng(0)
    scores, golds = generator.integers(0, 4, (200, 9)), generator.integers(0, 9, 200)
    method = {"expected": "average", "optimistic": "min", "pessimistic": "max"}[ties]
    expected = stats.rankdata(-scores, method=method, axis=1)[np.arange(200), golds]
    assert (ranks(*gold_counts(scores, golds), ties) == expected).all()


def test_the_interval_is_that_of_another_bootstrap():
    sample = np.random.default_rng(3).choice([0, 1 / 3, 1], 150)
    interval = stats.bootstrap((sample,), np.mean, n_resamples=9999, method="percentile", rng=0).confidence_interval
    assert bootstrap_interval(sample, resamples=9999) == pytest.approx((interval.low, interval.high), abs=0.006)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.2])
def test_the_p_value_is_that_of_another_permutation_test(shift):
    generator = np.random.default_rng(4)
    a, b = (generator.random(80) < 0.5 + shift).astype(float), (generator.random(80) < 0.5).astype(float)
    other = stats.permutation_test(
        (a, b), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", n_resamples=9999, rng=0
    )
    assert paired_difference(a, b, resamples=9999).p_value == pytest.approx(other.pvalue, abs=0.02)
