from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.ranking import holm
from m3el_hf.experiments.comparisons import Seeds, compare, percent, unpaired
from tests.evaluation.test_outcomes import drawn as drawn_evaluation


def seeds(*values: list[float]) -> Seeds:
    array = np.array(values, dtype=float)
    return Seeds(array, np.array([f"Q{number}" for number in range(array.shape[1])]))


def drawn(share: float, seed: int, rows: int = 400) -> list[float]:
    return (np.random.default_rng(seed).random(rows) < share).astype(float).tolist()


def test_a_figure_is_the_mean_over_seeds_with_both_kinds_of_spread():
    found = seeds([1, 1, 0, 0], [1, 1, 1, 0]).estimate
    assert (found.value, found.n) == (0.625, 4)
    assert found.deviation == pytest.approx(np.std([0.5, 0.75], ddof=1))
    assert 0 <= found.low < found.value < found.high <= 1
    assert seeds([1, 0]).estimate.deviation is None


def test_a_clear_difference_is_no_noise_and_an_even_one_is():
    strong, weak = seeds(drawn(0.9, 0), drawn(0.9, 1)), seeds(drawn(0.5, 2), drawn(0.5, 3))
    [better, worse] = compare([(strong, weak), (weak, strong)])
    assert (better.verdict, worse.verdict) == ("higher", "lower")
    assert "points higher (95 % interval +" in better.said
    [same] = compare([(strong, strong)])
    assert same.verdict == "within noise" and same.estimate.value == 0
    assert "within noise" in same.said


def test_rows_of_others_are_no_pair():
    one = seeds([1.0, 0.0])
    with pytest.raises(M3ELError, match="compared by row"):
        compare([(one, Seeds(one.values, one.golds[::-1]))])
    evaluations = [drawn_evaluation(seed) for seed in (0, 1)]
    with pytest.raises(M3ELError, match="seeds of one were measured on different rows"):
        Seeds.of(evaluations, "one", "i2i")
    assert Seeds.of(evaluations[:1] * 2, "one", "i2i").estimate.deviation == 0


def test_seeds_that_disagree_make_it_noise():
    """On the mean of the seeds the difference is clear; one of them says the opposite."""
    better = seeds([1.0] * 300, [0.4] * 300)
    [found] = compare([(better, seeds([0.5] * 300, [0.5] * 300))])
    assert found.difference.low > 0 and found.is_noise


def test_many_comparisons_of_nothing_find_nothing():
    """Of 60 pairs without any difference some interval misses zero; corrected, none counts."""
    pairs = [(seeds(drawn(0.5, 2 * k, 60)), seeds(drawn(0.5, 2 * k + 1, 60))) for k in range(60)]
    found = compare(pairs)
    assert any(one.difference.low > 0 or one.difference.high < 0 for one in found)
    assert all(one.is_noise for one in found)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_corrected_p_values_are_those_of_the_stepwise_definition(p_values):
    """Holm 1979: the smallest is compared with level / n, the next with level / (n - 1), until one is too large."""
    corrected = holm(p_values)
    for level in (0.01, 0.05, 0.5):
        rejected = set()
        for step, place in enumerate(np.argsort(p_values)):
            if p_values[place] * (len(p_values) - step) > level:
                break
            rejected.add(int(place))
        assert {place for place, one in enumerate(corrected) if one <= level} == rejected
    assert all(one >= raw for one, raw in zip(corrected, p_values, strict=True))


def test_groups_of_rows_are_compared_with_an_interval_that_holds_the_truth():
    inside = 0
    for trial in range(40):
        found, _ = unpaired(seeds(drawn(0.8, trial, 150)), seeds(drawn(0.6, 1000 + trial, 100)), resamples=300)
        inside += found.low <= 0.2 <= found.high
    assert inside >= 34  # 95 % of 40 are 38


def test_rows_of_one_entity_are_drawn_together():
    """Ten copies of each row are no more evidence than one."""
    values = drawn(0.5, 0, 30)
    copied = Seeds(np.tile(values, 10)[None], np.tile(np.arange(30), 10))
    one, many = seeds(values).estimate, copied.estimate
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.15)


def test_sentences_carry_interval_deviation_and_n():
    assert percent(seeds([1, 1, 1, 1], [1, 1, 1, 1]).estimate) == (
        "100.0 % (95 % interval 39.8 to 100.0, ± 0.0 over seeds, n = 4)"
    )
