from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.report import Column, DataTable, Estimate, Report, software
from tests.evaluation.report.samples import SETTING, nasty, report, table


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Estimate(float("nan")), "nan is no figure"),
        (lambda: Estimate(0.5, 0.4, float("inf")), "inf is no figure"),
        (lambda: Estimate(0.5, low=0.4), "give both, or neither"),
        (lambda: table(key="../secret"), "make its key of letters"),
        (lambda: table(columns=(Column("task"), Column("task"), Column("a"), Column("b"))), "different names"),
        (lambda: table(columns=()), "different names"),
        (lambda: table(rows=(("t2t", 0.5),), tags=()), "has 2 of 4 values"),
        (lambda: table(rows=(("t2t", float("nan"), None, None),), tags=()), "nan is no figure"),
        (lambda: table(tags=({"task": "t2t"},)), "1 tags for 5 rows"),
        (lambda: table(summary_rows=6), "6 of its 5 rows"),
        (lambda: Report("x", tables=(table("a"), table("A"))), "keys that differ, got a, A"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(make, said):
    with pytest.raises(M3ELError, match=re.escape(said)) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_the_body_is_the_rows_that_are_no_means():
    assert [row[0] for row in table().body] == ["t2t", "i2i", "it2t", "t2i"]
    assert table(summary_rows=0).body == table().rows


def test_all_forms_are_saved(tmp_path):
    folder = tmp_path / "made" / "here"
    folder.mkdir(parents=True)
    (folder / "chart-old.png").write_bytes(b"of an earlier report")
    report().save(folder)
    charts = {"chart-tasks.png", "chart-effect.png"}
    others = {"report.html", "report.md", "results.json", "results.csv", "tables.tex"}
    assert {path.name for path in folder.iterdir()} == charts | others
    for name in charts:
        with Image.open(folder / name) as chart:
            assert chart.format == "PNG" and min(chart.size) > 300
    assert (folder / "results.csv").read_bytes().decode() == report().to_csv()
    assert (folder / "report.html").read_text(encoding="utf-8") == report().to_html()


def test_the_same_report_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        report().save(tmp_path / folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize(
    "one",
    [
        Report("empty"),
        nasty(),
        Report("no rows", tables=(DataTable("t", "", "", SETTING, (Column("a"),), (), chart="lines"),)),
    ],
    ids=["empty", "nasty", "no rows"],
)
def test_any_report_can_be_saved(tmp_path, one):
    one.save(tmp_path)
    json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))


def test_the_software_is_named_with_its_versions():
    versions = software()
    assert {"python", "torch", "transformers", "m3el-hf"} <= versions.keys()
    assert all(re.match(r"\d+\.\d+", version) for version in versions.values())
