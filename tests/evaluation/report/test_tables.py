from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from rich.console import Console

from m3el_hf.evaluation.report import Column, DataTable, Estimate, Report
from m3el_hf.evaluation.report.cells import with_counts
from tests.evaluation.report.samples import NASTY, SETTING, SIGNS, estimates, example, report, table, tables, topics


def read_csv(one: Report) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(one.to_csv(), newline=""), strict=True))


def test_csv_has_a_row_a_cell_with_its_setting():
    first, *_, last = read_csv(report())
    assert first == {
        "report": "Do pictures help?", "table": "tasks", "row": "t2t", "task": "t2t", "topic": "", "system": "",
        "column": "before", "unit": "share", "value": "0.5", "low": "0.45", "high": "0.55", "n": "391",
        "deviation": "", "text": "", "split": "test", "protocol": "candidate set, as released",
        "ties": "expected rank", "seed": "0", "versions": "torch 2.13",
    }  # fmt: skip
    assert (last["table"], last["row"], last["column"], last["unit"], last["value"]) == (
        "effect",
        "books, it2t",
        "p",
        "",
        "1",
    )
    assert report().to_csv().count("\r\n") == 1 + 5 * 3 + 6 * 2


@given(tables())
@settings(deadline=None, max_examples=50)
def test_csv_read_again_gives_the_same_figures(one):
    read = iter(read_csv(Report("any", tables=(one,))))
    for row in one.rows:
        for column, value in zip(one.columns[1:], row[1:], strict=True):
            found = next(read)
            assert found["column"] == column.name
            if isinstance(value, Estimate):
                parts = [found[name] for name in ("value", "low", "high", "n", "deviation")]
                assert Estimate(*(float(part) if part else None for part in parts)) == value
            elif value is None or isinstance(value, str):
                assert (found["text"], found["value"]) == (value or "", "")
            else:
                assert float(found["value"]) == value
            assert [found[name] for name in ("split", "protocol", "ties", "seed")] == list(vars(one.setting).values())
    assert next(read, None) is None


@given(tables())
@settings(deadline=None, max_examples=50)
def test_markdown_has_a_cell_a_value(one):
    lines = [line for line in Report("any", tables=(one,)).to_markdown().split("\n") if line.startswith("| ")]
    columns, rows = with_counts(one)
    assert len(lines) == 2 + len(rows)
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines} == {len(columns) + 1}


@given(tables())
@settings(deadline=None, max_examples=50)
def test_latex_has_a_cell_a_value(one):
    text = Report("any", tables=(one,)).to_latex()
    columns, rows = with_counts(one)
    lines = [line for line in text.split("\n") if line.endswith(r"\\")]
    assert len(lines) == 1 + len(rows)
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(columns) - 1}
    assert all(line.startswith("%") for line in text.split(r"\begin{tabular}")[0].split("\n") if line)


def test_markdown_has_the_figures_below_their_setting():
    text = report().to_markdown()
    assert text.startswith(
        "# Do pictures help?\n\nWhat does a picture add?\n\n- Pictures add 5.0 points (1.0 to 9.0).\n"
    )
    assert (
        "in % · test · candidate set, as released · ties: expected rank · seed 0 · ± standard deviation over seeds\n\n"
        "| task | before | after | string match | n |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| t2t | 50.0 | 81.2 ± 1.2 | 78.0 | 391 |\n"
    ) in text
    assert "| t2i | not evaluable, 0 images | – | – | – |\n| mean | 45.0 | 87.9 | – | – |\n" in text
    assert text.endswith("- data: mini\n- seeds: 0, 1\n- versions: torch 2.13\n")


def test_markdown_has_headings_of_the_level_that_a_card_gives_it():
    assert re.findall(r"^#+", report().to_markdown(3), re.MULTILINE) == ["###", "####", "####", "####"]


def test_no_text_becomes_markup():
    one = Report(NASTY, answers=(SIGNS,), tables=(table(title=SIGNS),))
    assert r"# \<script\>alert('a & b')\</script\>" in one.to_markdown()
    assert r"a\|b \\ & % $x\_1^2$" in one.to_markdown()
    columns = (Column("task"), Column(SIGNS, "%"))
    rows = ((NASTY, Estimate(-0.5)), ("~^", None))
    text = Report("x", tables=(table(columns=columns, rows=rows, tags=(), summary_rows=0),)).to_latex()
    assert (
        r"task & a\textbar{}b \textbackslash{} \& \% \$x\_1\textasciicircum{}2\$ \# \{\textasciitilde{}\} {[}c] "
        r"\textless{} \textgreater{} \textbackslash{}\textquotedbl{}quoted\textbackslash{}\textquotedbl{} \\"
    ) in text
    assert r"\textless{}script\textgreater{}alert('a \& b')\textless{}/script\textgreater{} & $-$50.0 \\" in text
    assert r"\textasciitilde{}\textasciicircum{} & -- \\" in text


def test_latex_says_where_its_figures_come_from_and_sets_the_means_apart():
    first, setting, versions, begin, *lines = report().to_latex().split("\n")
    assert (first, versions, begin) == ("% Accuracy by task", "% torch 2.13", r"\begin{tabular}{lrrrr}")
    assert setting.startswith("% in % · test · candidate set, as released")
    body = lines[: lines.index(r"\end{tabular}")]
    assert [body[place] for place in (0, 2, -3, -1)] == [r"\toprule", r"\midrule", r"\midrule", r"\bottomrule"]
    assert body[3] == r"t2t & 50.0 & 81.2 $\pm$ 1.2 & 78.0 & 391 \\"


def test_json_has_everything_but_the_pictures():
    read = json.loads(report().to_json())
    assert read["answers"] == list(report().answers) and read["provenance"]["versions"] == {"torch": "2.13"}
    first = read["tables"][0]
    assert first["setting"] == vars(SETTING) and first["chance"] == 1 / 3
    assert first["columns"][2] == {"name": "after", "unit": "share", "is_strong": True}
    assert first["rows"][0]["cells"]["after"] == {
        "value": 0.812, "low": 0.77, "high": 0.85, "n": 391, "deviation": 0.012,
    }  # fmt: skip
    assert (first["rows"][0]["tags"], first["rows"][0]["is_summary"]) == ({"task": "t2t"}, False)
    assert first["rows"][3]["cells"] == {
        "task": "t2i", "before": "not evaluable, 0 images", "after": None, "string match": None,
    }  # fmt: skip
    assert first["rows"][4]["is_summary"]
    assert len(read["examples"]) == 30
    assert read["examples"][1]["mention"] == "mention 1" and read["examples"][1]["picture"] is True
    assert [one["picture"] for one in read["examples"][0]["candidates"]] == [True] * 4 + [False, True]


@given(tables())
@settings(deadline=None, max_examples=50)
def test_json_read_again_gives_the_same_table(one):
    (read,) = json.loads(Report("any", tables=(one,)).to_json())["tables"]
    units = {"share": "%"}
    columns = tuple(
        Column(column["name"], units.get(column["unit"], column["unit"]), column["is_strong"])
        for column in read["columns"]
    )
    rows = tuple(
        tuple(Estimate(**value) if isinstance(value, dict) else value for value in row["cells"].values())
        for row in read["rows"]
    )
    means = sum(row["is_summary"] for row in read["rows"])
    again = DataTable(read["key"], read["title"], read["about"], replace(SETTING, **read["setting"]), columns, rows)
    assert replace(again, summary_rows=means) == one


def test_json_takes_what_provenance_may_hold():
    odd = {
        "folder": Path("x"),
        "rows": np.int64(3),
        "rate": np.float32(0.5),
        "best": float("nan"),
        1: {"a": (1, None, True)},
    }
    read = json.loads(Report("x", provenance=odd).to_json(), parse_constant=pytest.fail)
    assert read["provenance"] == {"folder": "x", "rows": 3, "rate": 0.5, "best": "nan", "1": {"a": [1, None, True]}}


def test_columns_of_words_stand_to_the_left_everywhere():
    columns = (Column("system"), Column("task"), Column("accuracy", "%"))
    rows = (("BM25", "a task with a name of many words", Estimate(0.5, n=3)),)
    one = Report("x", tables=(table(columns=columns, rows=rows, tags=(), chart=None, summary_rows=0),))
    assert "| --- | --- | ---: |" in one.to_markdown() and r"\begin{tabular}{llr}" in one.to_latex()
    assert '<th scope="col" class="words" dir="auto">task</th><th scope="col" class="" dir="auto">' in one.to_html()
    assert "a task with a name of many words" in printed(one)
    assert read_csv(one)[1]["row"] == "BM25 · a task with a name of many words"


def printed(one: Report, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(one.to_rich())
    return console.export_text()


def test_the_terminal_shows_the_answers_and_the_first_table():
    shown = printed(report())
    for text in (
        "Do pictures help?",
        "• Elsewhere the effect",
        "81.2",
        "391",
        "t2i: not evaluable, 0 images",
        "mean",
    ):
        assert text in shown
    assert "What pictures add" not in shown


def test_the_terminal_cuts_nothing_at_80_columns():
    systems = ("chance", "string match", "image hash", "before training", "after training", "mention-blind control")
    rows = tuple(
        (f"{task}2{task}", *(Estimate(1 / 3, 0.3, 0.4, 1798 + k) for _ in systems))
        for k, task in enumerate("abcdefghi")
    )
    columns = (Column("task"), *(Column(system, "%") for system in systems))
    shown = printed(Report("x", tables=(table(columns=columns, rows=rows, tags=(), summary_rows=0),)))
    assert shown.count("33.3") == 9 * 6 and "…" not in shown and "blind" in shown
    assert all(f"{1798 + k}" in shown for k in range(9))
    assert max(map(len, shown.splitlines())) <= 80


def test_the_terminal_takes_no_text_for_its_own_markup():
    assert "[red]x[/red]" in printed(Report("[red]x[/red]", tables=(topics(),)))
    assert "[bold]t" in printed(Report("x", tables=(table(title="[bold]t"),)))


@given(estimates())
@settings(deadline=None, max_examples=50)
def test_a_figure_with_an_n_of_its_own_says_so_everywhere(one):
    columns = (Column("task"), Column("a"), Column("b"))
    rows = (("t2t", replace(one, n=3), replace(one, n=4)),)
    whole = Report("x", tables=(table(columns=columns, rows=rows, tags=(), chart=None, summary_rows=0),))
    for text in (whole.to_markdown(), whole.to_latex(), whole.to_html()):
        assert re.search(r"n (= )?3\b", text) and re.search(r"n (= )?4\b", text)


def test_examples_are_not_in_the_card():
    assert "mention 0" not in Report("x", examples=(example(),)).to_markdown()
