from __future__ import annotations

import numpy as np

from m3el_hf.evaluation.evaluator import evaluate
from m3el_hf.evaluation.examples import errors, example
from tests.evaluation.test_evaluator import ANTI, PERFECT, dataset, make_row


def test_an_error_is_shown_with_what_the_system_preferred():
    rows = dataset([make_row(number) for number in range(3)])
    found = evaluate([ANTI, PERFECT], rows)
    shown = errors(found, ANTI, rows, each=2)
    assert len(shown) == 2 * 9 and {one.system for one in shown} == {"anti-perfect"}
    for one in shown:
        assert [candidate.is_gold for candidate in one.candidates] == [False, False, True]
        assert one.remark.endswith("2 of 2 others score above the gold")
    assert errors(found, PERFECT, rows) == []


def test_an_example_shows_no_more_than_its_task():
    row = make_row(0)
    [text, picture] = (example(row, task, "x", np.arange(3.0)) for task in ("t2t", "i2i"))
    assert text.picture is None and text.candidates[0].picture is None and text.context
    assert picture.context is None and picture.mention == ""
    assert (picture.candidates[0].name, picture.candidates[0].description) == ("Q02", None)
    assert picture.picture and picture.candidates[0].picture


def test_a_gold_that_is_no_candidate_is_said_not_to_be():
    one = example(make_row(0, answer=-1, answer_qid="Q404"), "t2t", "x", np.zeros(3))
    assert one.remark == "row-0: the gold is not among the candidates"
    assert not any(candidate.is_gold for candidate in one.candidates)
