from __future__ import annotations

import io
import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from m3el_hf import TASKS
from m3el_hf.evaluation.evaluator import Table
from m3el_hf.evaluation.run_report import Example, RunReport, software

VOID = {"meta", "link", "img", "br"}
NASTY = "<script>alert('a & b')</script>"


def cell(accuracy: float, n: int = 40) -> dict[str, float]:
    low, high = max(0.0, accuracy - 0.1), min(1.0, accuracy + 0.1)
    return {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "mrr": 0.5, "tie_share": 0.0, "n": n}


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


TABLE = Table(
    {
        "chance": {"t2t": cell(1 / 3), "i2t": cell(1 / 3)},
        "string match": {"t2t": cell(0.7812)},
        "after training": {"t2t": cell(0.5), "i2t": cell(1.0)},
    },
    {"t2t": 40, "i2t": 31, "t2i": 0},
    40,
)


def report(**changes: object) -> RunReport:
    whole = RunReport("A run", TABLE, {"data": "mini", "seed": 0}, ["Ties count as chance."])
    return replace(whole, **changes)


class Page(HTMLParser):
    """Reads a page whole: every element is closed, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data.strip()


def page_of(one: RunReport, folder: Path) -> Page:
    one.save(folder)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_rows_are_the_table_as_text():
    assert report().rows() == [
        ["t2t", "33.3", "78.1", "50.0", "40"],
        ["i2t", "33.3", "–", "100.0", "31"],
        ["t2i", "not evaluable, 0 images", "", "", "0"],
        ["mean", "33.3", "–", "75.0", ""],
    ]


def test_a_text_task_without_rows_lacks_texts():
    table = Table({"chance": {}}, {"t2t": 0}, 3)
    assert report(table=table).rows() == [["t2t", "not evaluable, 0 texts", "0"], ["mean", "–", ""]]


def test_markdown_is_a_table_of_the_rows():
    header, rule, *rows = report().to_markdown().splitlines()
    cells = [[part.strip() for part in line.strip("|").split("|")] for line in (header, *rows)]
    assert cells[0] == ["task", "chance", "string match", "after training", "n"]
    assert cells[1:] == report().rows()
    assert re.fullmatch(r"\| --- (\| ---: ){4}\|", rule)


def test_the_terminal_shows_every_figure():
    console = Console(file=io.StringIO(), width=120)
    console.print(report().to_rich())
    shown = console.file.getvalue()
    for text in ("A run", "string", "match", "78.1", "100.0", "t2i", "not evaluable, 0 images", "mean", "75.0"):
        assert text in shown


def test_the_page_has_every_figure(tmp_path):
    page = page_of(report(), tmp_path)
    assert page.rows[0] == ["task", "chance", "string match", "after training", "n"]
    assert page.rows[1:] == [
        ["t2t", "33.3", "78.1", "50.0", "40"],
        ["i2t", "33.3", "–", "100.0", "31"],
        ["t2i", "not evaluable, 0 images", "0"],
        ["mean", "33.3", "–", "75.0", ""],
    ]
    assert ("title", "95 % interval 40.0 to 60.0") in page.attributes
    assert "Ties count as chance." in page.texts and "mini" in page.texts


def test_the_page_needs_no_other_file(tmp_path):
    example = Example("Kansas", None, png(), [("Kansas", None, 1.5, True, png()), ("Kansas", "x", -2.0, False, None)])
    page = page_of(report(example=example), tmp_path)
    assert len(page.addresses) == 4  # the icon, the chart and two pictures
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"url\(|@import|https?:", (tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("where", ["title", "system", "note", "provenance", "example"])
def test_no_text_becomes_markup(tmp_path, where):
    changes = {
        "title": {"title": NASTY},
        "system": {"table": Table({NASTY: {"t2t": cell(0.5)}}, {"t2t": 40}, 40)},
        "note": {"notes": [NASTY]},
        "provenance": {"provenance": {NASTY: NASTY}},
        "example": {"example": Example(NASTY, NASTY, None, [(NASTY, NASTY, 0.5, True, png())])},
    }
    page = page_of(report(**changes[where]), tmp_path)
    assert "script" not in page.tags
    assert any(NASTY in text for text in page.texts)


def test_the_example_shows_its_candidates_in_order(tmp_path):
    candidates = [("first", "a band", 2.345, False, None), ("second", None, -1.0, True, None)]
    page = page_of(report(example=Example("Kansas", "toured", None, candidates)), tmp_path)
    order = [page.texts.index(text) for text in ("Kansas", "toured", "first", "a band", "2.35", "second", "-1.00")]
    assert order == sorted(order)
    assert page.texts[page.texts.index("second") + 1].strip() == "(gold)"


def test_the_chart_is_a_picture(tmp_path):
    report().save(tmp_path / "made" / "here")
    with Image.open(tmp_path / "made" / "here" / "chart.png") as chart:
        assert chart.format == "PNG"
        chart.load()
        assert min(chart.size) > 300 and len(chart.convert("RGB").getcolors(10**6)) > 10


def test_the_chart_draws_each_figure_at_its_height():
    axes = report().chart().axes[0]
    heights = sorted(round(patch.get_height(), 1) for patch in axes.patches)
    assert heights == [50.0, 78.1, 100.0]
    assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"] == pytest.approx([100 / 3])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["t2t", "i2t"]


@pytest.mark.parametrize(
    "changes",
    [
        {"table": Table({"chance": {"t2t": cell(1 / 3)}}, {"t2t": 40}, 40)},
        {"title": r"prices of 5$ and \$6 in $\folders$"},
        {"table": Table({"model": {name: cell(0.4) for name in TASKS}}, dict.fromkeys(TASKS, 40), 40)},
    ],
    ids=["chance alone", "dollars", "no chance"],
)
def test_any_report_can_be_saved(tmp_path, changes):
    page_of(report(**changes), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"chart.png", "report.html", "results.json"}


def test_the_results_are_the_figures_unrounded(tmp_path):
    report(provenance={"data": "mini", "folder": Path("x")}).save(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {name: results[name] for name in ("cells", "evaluable", "rows")} == asdict(TABLE)
    assert (results["title"], results["notes"]) == ("A run", ["Ties count as chance."])
    assert results["provenance"] == {"data": "mini", "folder": "x"}


def test_the_software_is_named_with_its_versions():
    versions = software()
    assert {"python", "torch", "transformers", "m3el-hf"} <= versions.keys()
    assert all(re.match(r"\d+\.\d+", version) for version in versions.values())


def test_the_terminal_table_cuts_nothing_at_80_columns():
    cell = {"accuracy": 1 / 3, "accuracy_low": 0.3, "accuracy_high": 0.4, "mrr": 0.5, "tie_share": 0.0, "n": 1798}
    systems = ("chance", "string match", "image hash", "before training", "after training", "mention-blind control")
    table = Table({system: {task: cell for task in TASKS} for system in systems}, dict.fromkeys(TASKS, 1798), 1798)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(RunReport("M3EL quickstart on person", table, {}).to_rich())
    printed = console.export_text()
    assert printed.count("1798") == 9 and "mention-blind" in printed and "…" not in printed
    assert printed.count("33.3") == 6 * 10
