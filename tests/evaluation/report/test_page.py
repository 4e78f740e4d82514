from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from m3el_hf.evaluation.report import Column, Estimate, Report
from tests.browser import Browser, Page
from tests.evaluation.report.samples import NASTY, TEXTS, example, nasty, report, table, tables, topics

VOID = {"meta", "link", "img", "br", "source"}


@cache
def html(make: Callable[[], Report] = report) -> str:
    """The page of a sample, drawn once."""
    return make().to_html()


class Reader(HTMLParser):
    """Reads a page whole: every element is closed, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
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
            self.rows[-1][-1] += ("|" if "span" in self._open else "") + data.strip()

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_has_every_figure_with_its_interval():
    page = Reader(html())
    assert page.rows[:6] == [
        ["task", "before", "after", "string match", "n"],
        ["t2t", "50.0|45.0–55.0", "81.2|77.0–85.0|± 1.2", "78.0|74.0–82.0", "391"],
        ["i2i", "40.0|35.0–45.0", "96.1|94.0–98.0|± 0.4", "–", "387"],
        ["it2t", "45.0|40.0–50.0", "86.6|83.0–90.0|± 2.0", "79.0|75.0–83.0", "387"],
        ["t2i", "not evaluable, 0 images", "–", "–", "–"],
        ["mean", "45.0", "87.9", "–", "–"],
    ]
    assert page.rows[6:8] == [
        ["condition", "difference|%", "p"],
        ["person, t2t", "5.0|1.0–9.0", "0.010"],
    ]
    assert any(text.endswith("seed 0 · n = 80 · small type: 95 % intervals") for text in page.texts)


def test_everything_else_is_on_the_page_in_its_order():
    page = Reader(html())
    order = ["What does a picture add?", *report().answers, *report().notes, "Accuracy by task", "With minus without."]
    order += ["mention 0", "A sentence about 29.", "data", "mini", "versions", "torch 2.13"]
    places = [len(page.texts) - 1 - page.texts[::-1].index(text) for text in order]
    assert places == sorted(places)


def test_the_page_holds_all_that_it_shows():
    page = Reader(html())
    addresses = [
        value or ""
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data")
    ]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    forms = {address[: address.index(";")] for address in addresses if address.startswith("data:image")}
    assert forms == {f"data:image/{form}" for form in ("png", "jpeg", "gif", "webp", "svg+xml")}


def test_every_picture_says_what_it_is():
    page = Reader(html())
    assert all(image["alt"] for image in page.all("img"))
    described = [image["aria-describedby"] for image in page.all("img") if "aria-describedby" in image]
    assert described == ["table-tasks", "table-effect"]
    assert {"table-tasks", "table-effect"} <= {one.get("id") for one in page.all("table")}


def test_what_is_no_picture_is_said_to_be_none():
    page = Reader(Report("x", examples=(example(0),)).to_html())
    assert page.texts.count("no picture") == 2  # the mention's, and a candidate's
    assert page.texts.count("not a picture to show") == 1


def test_no_text_becomes_markup():
    page = Reader(html(nasty))
    assert len(page.all("script")) == 1
    assert all(any(text in found for found in page.texts) for text in TEXTS)
    assert not {name for _, attributes in page.tags for name in attributes if name.startswith("on")}


@given(tables())
@settings(deadline=None, max_examples=50)
def test_any_table_makes_a_whole_page(one):
    Reader(Report("any", tables=(one,)).to_html())


def test_nothing_is_there_for_what_a_report_has_not():
    page = Reader(Report("x").to_html())
    assert not page.all("form") and not page.all("table") and not page.all("dl") and not page.all("section")
    one_task = tuple({"task": "t2t", "system": "after"} for _ in table().rows)
    assert not Reader(Report("x", tables=(table(tags=one_task),)).to_html()).all("form")
    selects = Reader(Report("x", tables=(table(),)).to_html()).all("select")
    assert [select["name"] for select in selects] == ["task"]


# In a browser


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    with opened(browser, tmp_path, html()) as one:
        yield one


def opened(browser: Browser, folder: Path, text: str, width: int = 1200) -> Page:
    (folder / "page.html").write_text(text, encoding="utf-8")
    return browser.open(folder / "page.html", width)


def names(page: Page, table: str) -> list[str]:
    """The first cells of the rows that are seen."""
    script = f"[...document.querySelectorAll('#table-{table} tbody tr')].filter((row) => row.checkVisibility())"
    return page.run(f"{script}.map((row) => row.cells[0].textContent)")


def choose(page: Page, kind: str, value: str) -> None:
    page.run(
        f"(() => {{ const one = document.querySelector('select[name={kind}]'); one.value = {json.dumps(value)};"
        "one.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )


def said(page: Page) -> str:
    return page.run("document.querySelector('form.filters output').textContent")


def mentions(page: Page) -> list[str]:
    script = "[...document.querySelectorAll('.example')].filter((one) => one.checkVisibility())"
    return page.run(f"{script}.map((one) => one.querySelector('.card strong').textContent)")


def test_a_click_on_a_heading_sorts_and_the_mean_stays_last(page):
    heading = "#table-tasks th:nth-child(2)"
    as_given = ["t2t", "i2i", "it2t", "t2i", "mean"]
    seen = [(page.run(f"document.querySelector('{heading}').ariaSort"), names(page, "tasks"))]
    for _ in range(3):
        page.click(f"{heading} button")
        seen.append((page.run(f"document.querySelector('{heading}').ariaSort"), names(page, "tasks")))
    assert seen == [
        ("none", as_given),
        ("ascending", ["i2i", "it2t", "t2t", "t2i", "mean"]),
        ("descending", ["t2i", "t2t", "it2t", "i2i", "mean"]),
        ("none", as_given),
    ]
    assert names(page, "effect")[0] == "person, t2t"  # another table stays as it is
    assert page.complaints() == []


def test_dashes_come_last_either_way(page):
    for _ in range(2):
        page.click("#table-tasks th:nth-child(4) button")
        assert names(page, "tasks")[2:] == ["i2i", "t2i", "mean"]
    assert names(page, "tasks")[:2] == ["it2t", "t2t"]


def test_only_the_last_heading_says_that_it_sorts(page):
    page.click("#table-tasks th:nth-child(2) button")
    page.click("#table-tasks th:nth-child(1) button")
    sorts = page.run("[...document.querySelectorAll('#table-tasks th[aria-sort]')].map((one) => one.ariaSort)")
    assert sorts == ["ascending", "none", "none", "none", "none"]
    assert names(page, "tasks") == ["i2i", "it2t", "t2i", "t2t", "mean"]


def test_headings_are_reached_and_pressed_with_keys(page):
    page.run("document.querySelector('#table-tasks').parentNode.focus()")
    page.press("Tab")
    page.press("Enter")
    assert page.run("document.activeElement.closest('th').ariaSort") == "ascending"
    assert names(page, "tasks")[0] == "i2i"


def test_filters_act_on_all_rows_and_examples_and_say_so(page):
    assert said(page) == "Shown: 11 of 11 rows, 30 of 30 examples."
    choose(page, "task", "i2i")
    assert names(page, "tasks") == ["i2i", "mean"]  # a mean is of all tasks
    assert names(page, "effect") == ["person, i2i", "books, i2i"]
    assert mentions(page) == [f"mention {number}" for number in range(1, 30, 3)]
    assert said(page).startswith("Shown: 4 of 11 rows, 10 of 30 examples.")
    choose(page, "topic", "books")
    assert names(page, "effect") == ["books, i2i"]
    assert mentions(page) == [f"mention {number}" for number in range(1, 30, 6)]
    choose(page, "system", "after")
    assert mentions(page) == ["mention 7", "mention 19"]
    page.click("button[type=reset]")
    page.run("new Promise((done) => setTimeout(done))")
    assert said(page) == "Shown: 11 of 11 rows, 30 of 30 examples."
    assert len(names(page, "tasks")) == 5 and len(mentions(page)) == 24
    assert page.complaints() == []


def test_a_table_of_which_nothing_is_left_says_so(page):
    choose(page, "task", "t2i")
    assert names(page, "effect") == [] and mentions(page) == []
    visible = "[...document.querySelectorAll('.nothing')].filter((one) => one.checkVisibility()).length"
    assert page.run(visible) == 2
    choose(page, "task", "")
    assert page.run(visible) == 0


def test_sorting_and_filters_go_together(page):
    choose(page, "topic", "books")
    page.click("#table-effect th:nth-child(2) button")
    assert names(page, "effect") == ["books, it2t", "books, t2t", "books, i2i"]
    choose(page, "topic", "")
    assert names(page, "effect")[:2] == ["books, it2t", "person, i2i"]


def test_more_examples_wait_behind_a_click(page):
    assert len(mentions(page)) == 24
    assert page.run("document.querySelector('summary').textContent") == "6 more"
    page.click("summary")
    assert mentions(page) == [f"mention {number}" for number in range(30)]
    choose(page, "task", "t2t")
    assert len(mentions(page)) == 10 and not page.run("document.querySelector('details').checkVisibility()")


def test_without_a_script_everything_is_there(browser, tmp_path):
    with opened(browser, tmp_path, html()) as page:
        page.call("Emulation.setScriptExecutionDisabled", value=True)
        page.call("Page.reload")
        browser.wait_for("Page.loadEventFired", page.session)
        assert names(page, "tasks") == ["t2t", "i2i", "it2t", "t2i", "mean"]
        assert not page.run("document.querySelector('form').checkVisibility()")
        assert page.run("document.querySelectorAll('button').length") == 1  # the hidden form's own
        assert len(mentions(page)) == 24 and page.run("document.querySelectorAll('.example').length") == 30


@pytest.mark.parametrize("make", [report, nasty], ids=["plain", "nasty"])
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_is_not_wider_than_the_screen_and_asks_for_nothing(browser, tmp_path, make, width):
    with opened(browser, tmp_path, html(make), width) as page:
        assert page.run("innerWidth") == width
        assert page.run("document.documentElement.scrollWidth") <= width
        pictures = page.run(
            "Promise.all([...document.images].map((one) => one.decode())).then(() =>"
            "[...document.images].every((one) => one.naturalWidth > 0))"
        )
        assert pictures and page.complaints() == []


def test_nasty_text_is_shown_as_it_is(browser, tmp_path):
    with opened(browser, tmp_path, html(nasty)) as page:
        assert page.run("document.title") == NASTY
        options = page.run("[...document.querySelector('select').options].map((one) => one.value)")
        assert options == ["", *[f"{text}{end}" for text in TEXTS for end in ("", " 2") if text or end]]
        choose(page, "task", NASTY)
        assert page.run("document.querySelectorAll('.example:not([hidden])').length") == 2  # and the one without a task
        assert page.complaints() == []


def test_many_rows_are_sorted_and_equal_ones_stay_in_their_order(browser, tmp_path):
    columns = (Column("row"), Column("figure"))
    rows = tuple((f"{place}", Estimate(place * 7 % 12)) for place in range(30))
    one = table(columns=columns, rows=rows, tags=(), chart=None, summary_rows=0)
    with opened(browser, tmp_path, Report("x", tables=(one,)).to_html()) as page:
        for descending in (False, True):
            page.click("#table-tasks th:nth-child(2) button")
            order = sorted(range(30), key=lambda place: place * 7 % 12, reverse=descending)
            assert names(page, "tasks") == [f"{place}" for place in order]


@given(tables())
@settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_the_page_sorts_as_python_does(browser, tmp_path, one):
    numbered = tuple((str(place), *row[1:]) for place, row in enumerate(one.rows))
    sortable = Report("any", tables=(replace(one, rows=numbered),))
    with opened(browser, tmp_path, sortable.to_html()) as page:
        for column in range(1, len(one.columns)):
            for turn in range(2):
                page.run(f"document.querySelectorAll('#table-any th button')[{column}].click()")
                body = [(place, row[column]) for place, row in enumerate(one.body)]
                known = [(place, value) for place, value in body if value is not None]
                known.sort(key=lambda it: sort_key(it[1]), reverse=bool(turn))  # equal ones stay in their order
                order = known + [it for it in body if it[1] is None]
                means = list(range(len(one.body), len(one.rows)))
                assert names(page, "any") == [str(place) for place in [*(place for place, _ in order), *means]]


def sort_key(value: Any) -> tuple[Any, ...]:
    if isinstance(value, str):  # by its letters and its numbers in turn
        found = re.findall(r"([^0-9]*)([0-9]{0,15})", value.casefold())
        return 1, [(letters, int(digits or -1)) for letters, digits in found]
    return 0, value.value if isinstance(value, Estimate) else value


def test_light_and_dark_pages_have_charts_of_their_own(page):
    sources = []
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        page.run("new Promise((done) => setTimeout(done, 50))")
        sources.append(page.run("document.querySelector('.chart img').currentSrc"))
    assert sources[0] != sources[1]


def test_topics_alone_make_a_filter_of_topics_and_tasks():
    selects = Reader(Report("x", tables=(topics(),)).to_html()).all("select")
    assert [select["name"] for select in selects] == ["task", "topic"]
