from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser import Browser


def write(folder: Path, body: str) -> Path:
    path = folder / "page.html"
    head = '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
    path.write_text(f"<!doctype html>{head}<body>{body}</body>", encoding="utf-8")
    return path


def test_a_page_is_read_clicked_and_typed_into(browser: Browser, tmp_path: Path):
    button = "<button onclick='this.textContent += 1'>a</button>"
    with browser.open(write(tmp_path, button), width=390) as page:
        page.click("button")
        page.press("Enter")  # the click has put the focus there
        assert page.run("document.querySelector('button').textContent") == "a11"
        assert page.run("innerWidth") == 390
        assert page.complaints() == []


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("<script>console.log('said')</script>", "said"),
        ("<script>throw new Error('thrown')</script>", "thrown"),
        ("<img src='http://127.0.0.1:9/asked-for.png'>", "asked-for.png"),
        ("<script>setTimeout(() => fetch('http://127.0.0.1:9/late').catch(() => 0))</script>", "late"),
    ],
)
def test_what_a_page_says_and_asks_for_is_seen(browser: Browser, tmp_path: Path, body: str, complaint: str):
    with browser.open(write(tmp_path, body)) as page:
        assert any(complaint in one for one in page.complaints())


def test_a_failing_script_is_an_error(browser: Browser, tmp_path: Path):
    with browser.open(write(tmp_path, "")) as page, pytest.raises(AssertionError, match="nothing_there"):
        page.run("nothing_there")
