from __future__ import annotations

import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import m3el_hf.metrics
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.ranking import gold_counts, summarise
from m3el_hf.metrics import load_metric

FOLDER = Path(m3el_hf.metrics.__file__).parent / "linking_accuracy"

SCORES = [[0.9, 0.1, 0.2], [0.5, 0.5], [-1.0], [1.0, 1.0 + 1e-12, 2.0, -math.inf]]
GOLDS = [0, 1, 0, 1]


@pytest.fixture(scope="module")
def metric(tmp_path_factory: pytest.TempPathFactory) -> evaluate.EvaluationModule:
    return evaluate.load(str(FOLDER), cache_dir=str(tmp_path_factory.mktemp("metric")))


def test_it_computes_what_ranking_does(metric):
    result = metric.compute(scores=SCORES, references=GOLDS)
    assert result == summarise(*gold_counts(SCORES, GOLDS))
    assert result["accuracy"] == pytest.approx((1 + 1 / 2 + 1 + 0) / 4)


@settings(deadline=None, max_examples=8)
@given(
    st.lists(
        st.lists(st.floats(allow_nan=False, max_value=1e300), min_size=1, max_size=4), min_size=1, max_size=4
    ).flatmap(lambda rows: st.tuples(st.just(rows), st.tuples(*(st.integers(0, len(row) - 1) for row in rows))))
)
def test_no_score_changes_on_its_way(metric, table):
    scores, golds = table
    assert metric.compute(scores=scores, references=golds) == summarise(*gold_counts(scores, golds))


def test_batches_and_single_rows_add_up(metric):
    expected = summarise(*gold_counts(SCORES, GOLDS))
    metric.add_batch(scores=SCORES[:1], references=GOLDS[:1])
    metric.add_batch(scores=SCORES[1:], references=GOLDS[1:])
    assert metric.compute() == expected
    for scores, gold in zip(SCORES, GOLDS, strict=True):
        metric.add(scores=scores, references=gold)
    assert metric.compute() == expected


def test_two_at_once_do_not_mix():
    one, other = load_metric(), load_metric()
    one.add_batch(scores=[[1.0, 0.0]], references=[0])
    other.add_batch(scores=[[1.0, 0.0]] * 2, references=[1, 1])
    assert (one.compute()["accuracy"], other.compute()["accuracy"]) == (1, 0)


def test_arrays_are_taken():
    scores = [np.array([0.5, 0.25]), np.array([0.0, 0.5, 0.25])]
    assert load_metric().compute(scores=scores, references=[0, 1])["accuracy"] == 1


@pytest.mark.parametrize(
    ("scores", "golds", "message"),
    [
        ([[0.0, math.nan]], [0], "row 0 has a NaN"),
        ([[1.0]], [1], "row 0 has reference 1"),
        ([[]], [0], "no candidates"),
    ],
)
def test_what_has_no_rank_is_an_error(scores, golds, message):
    with pytest.raises(M3ELError, match=message):
        load_metric().compute(scores=scores, references=golds)


def test_the_example_of_its_description_is_true(metric):
    assert metric.compute(scores=[[0.9, 0.1, 0.2], [0.5, 0.5]], references=[0, 1])["accuracy"] == 0.75
    assert "0.75" in metric.inputs_description
    assert set(metric.features) == {"scores", "references"}
