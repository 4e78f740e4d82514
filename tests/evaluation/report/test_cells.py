from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3el_hf.evaluation.report import Column, Estimate
from m3el_hf.evaluation.report.cells import (
    common_unit,
    counts,
    deviation,
    heading,
    interval,
    number,
    of_words,
    places,
    row_name,
    setting_line,
    text,
    with_counts,
)
from tests.evaluation.report.samples import finite, table, topics, values


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.5417, "%", "54.2"),
        (1, "%", "100.0"),
        (-0.0004, "%", "0.0"),
        (-0.032, "%", "−3.2"),
        (9999, "", "9999"),
        (10_000, "", "10,000"),
        (-10_000, "", "−10,000"),
        (0.0, "", "0.000"),
        (0.99999, "", "1.000"),
        (3.14159, "rank", "3.14"),
        (123.456, "rank", "123.5"),
        (12345.6, "s", "12,346"),
        (1e-5, "", "1e-05"),
        (-1e-5, "", "−1e-05"),
    ],
)
def test_numbers_are_written_to_be_read(value, unit, shown):
    assert number(value, unit) == shown


@given(finite)
def test_a_number_is_shown_to_a_half_percent_and_with_its_sign(value):
    shown = float(number(value).replace("−", "-").replace(",", ""))
    assert shown == pytest.approx(value, rel=0.05 if abs(value) < 0.001 else 0.005, abs=5e-4)
    assert shown * value >= 0


def test_cells_show_figures_texts_and_dashes():
    estimate = Estimate(0.5, 0.45, 0.55, 391, 0.012)
    assert (text(estimate, "%"), interval(estimate, "%"), deviation(estimate, "%")) == ("50.0", "45.0–55.0", "± 1.2")
    assert interval(Estimate(0, -0.02, 0.03), "%") == "−2.0 to 3.0"
    assert [text(value) for value in (None, "a", 3)] == ["–", "a", "3"]
    assert [interval(value) + deviation(value) for value in (None, "a", 3, Estimate(0.5))] == [""] * 4


def test_n_stands_in_the_line_if_it_is_one():
    one = topics()
    assert counts(one).line == "n = 80" and with_counts(one) == (one.columns, one.rows)
    assert setting_line(one).endswith("ties: expected rank · seed 0 · n = 80")


def test_n_is_a_column_where_rows_differ():
    columns, rows = with_counts(table())
    assert columns[-1] == Column("n") and [row[-1] for row in rows] == [391, 387, 387, None, None]
    assert "n =" not in setting_line(table())


def test_n_is_in_the_cells_where_a_row_has_several():
    one = table(rows=(("t2t", Estimate(0.5, n=3), Estimate(0.6, n=4), None),), tags=(), summary_rows=0)
    assert counts(one).in_cells and with_counts(one) == (one.columns, one.rows)


def test_a_column_n_is_not_doubled():
    columns = (Column("task"), Column("accuracy", "%"), Column("n"))
    one = table(columns=columns, rows=(("a", Estimate(0.5, n=3), 3), ("b", Estimate(0.5, n=4), 4)), tags=())
    assert [column.name for column in with_counts(one)[0]] == ["task", "accuracy", "n"]


def test_a_unit_that_all_figures_have_is_said_once():
    assert common_unit(table()) == "%" and setting_line(table()).startswith("in % · test")
    assert heading(table(), table().columns[1]) == "before"
    assert common_unit(topics()) == ""  # a p value is no share
    assert [heading(topics(), column) for column in topics().columns] == ["condition", "difference (%)", "p"]


def test_the_line_says_what_a_deviation_is():
    assert "± standard deviation over seeds" in setting_line(table())
    assert "±" not in setting_line(topics())


def test_order_goes_by_value_then_by_text_as_people_count():
    column = ["t10", "T9", "t", Estimate(0.5), 2, 0.5, None, -1, "10 lives", "9 lives"]
    assert places(column) == [7, 6, 5, 1, 2, 1, None, 0, 4, 3]


def test_texts_that_lead_name_a_row_with_the_first():
    columns = (Column("system"), Column("task"), Column("accuracy", "%"), Column("remark"))
    rows = (("BM25", "t2t", Estimate(0.5), "a"), ("BM25", None, "not evaluable", "b"))
    one = table(columns=columns, rows=rows, tags=(), summary_rows=0)
    assert of_words(columns, rows) == [True, True, False, True]
    assert [row_name(one, row) for row in rows] == ["BM25 · t2t", "BM25"]
    by_number = table(rows=((100_000, "a", None, None), (0.25, None, None, None)), tags=(), summary_rows=0)
    assert [row_name(by_number, row) for row in by_number.rows] == ["100000 · a", "0.25"]


@given(st.lists(values, max_size=12))
def test_places_are_an_order(column):
    found = places(column)
    known = {place for place in found if place is not None}
    assert known == set(range(len(known)))
    assert [place is None for place in found] == [value is None for value in column]
    numbers = [
        (value.value if isinstance(value, Estimate) else value, place)
        for value, place in zip(column, found, strict=True)
        if value is not None and not isinstance(value, str)
    ]
    assert all((a < b) == (i < j) for a, i in numbers for b, j in numbers)
