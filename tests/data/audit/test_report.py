from __future__ import annotations

import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from m3el_hf.data.audit import Audit, audit, is_audited
from m3el_hf.data.audit.report import percent
from m3el_hf.data.card import plain
from m3el_hf.errors import M3ELError
from tests.data.audit.test_audit import image, picture, put, row, rows, write_folder

HOSTILE = '<script>alert(1)</script> | **x** $\\frac{1}{2}$ `code` {{ 7 * 7 }} [a](b)\n## head "quoted" \x07'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set with some of everything, under names that nobody would choose."""
    train, test = rows(0, 8), rows(8, 12)
    for one in train[:3]:
        one["mention"] = one["topic"] = HOSTILE
        one["topic"] = "$x^2$ & <b>"
    put(train[0], "candidate_images", train[0]["mention_image"])
    put(train[1], "candidate_names", HOSTILE)
    put(train[3], "candidate_names", train[3]["mention"], (train[3]["answer"] + 1) % 3)
    train[1] |= {"context": train[2]["context"], "licences": [HOSTILE, None, None, None]}
    train[4]["mention_image"] = image(picture(1, (300, 40)))
    train[5]["mention_image"] = train[6]["mention_image"]
    return write_folder(
        tmp_path_factory.mktemp("set"), {"train": train, "test": test}, title=f"Set {HOSTILE}", source=HOSTILE,
        skipped=[f"file row 1: {HOSTILE}"], read=13, unusable={HOSTILE: "is missing"}, counts={HOSTILE: 4},
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(folder: Path) -> Audit:
    found = audit(folder, progress=False)
    found.save(folder)
    return found


class Page(HTMLParser):
    """Collects the tags, the addresses and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page(folder: Path) -> Page:
    return Page((folder / "audit" / "audit.html").read_text(encoding="utf-8"))


def test_all_files_are_written_and_plots_are_pictures(folder, saved):
    names = {path.name for path in (folder / "audit").iterdir()}
    plots = {f"{chart.key}.png" for chart in saved.charts}
    assert names == {"audit.json", "audit.md", "audit.html", *plots}
    assert plots == {"rows.png", "position.png", "distance.png"}
    for plot in plots:
        assert Image.open(folder / "audit" / plot).size[0] > 600


def test_an_audit_holds_for_the_data_that_was_audited(tmp_path):
    write_folder(tmp_path, {"train": [row(0, mention_image=None)]})
    assert not is_audited(tmp_path)
    audit(tmp_path, progress=False).save(tmp_path)
    assert is_audited(tmp_path)
    write_folder(tmp_path, {"train": [row(1, mention_image=None)]}, revision="def")
    assert not is_audited(tmp_path)
    for content in ("{", "[]", '{"title": "x"}'):
        (tmp_path / "audit" / "audit.json").write_text(content)
        assert not is_audited(tmp_path)
    with pytest.raises(M3ELError, match="is no built dataset"):
        is_audited(tmp_path / "nowhere")


def test_the_same_data_gives_the_same_bytes_wherever_it_lies(folder, saved, tmp_path):
    other = tmp_path / "elsewhere"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("audit"))
    audit(other, progress=False).save(other)
    for path in (folder / "audit").iterdir():
        assert path.read_bytes() == (other / "audit" / path.name).read_bytes(), path.name


def test_the_page_is_whole_needs_nothing_else_and_escapes_everything(folder, saved):
    found = page(folder)
    assert found.open == []
    assert "script" not in found.tags and "b" not in found.tags
    assert all(address.startswith("data:") for address in found.addresses)
    assert len([address for address in found.addresses if address.startswith("data:image/png")]) == len(saved.charts)
    assert "<script>alert(1)</script>" in found.text
    assert "{{ 7 * 7 }}" in found.text
    for gallery in saved.galleries:
        assert gallery.title in found.text
    for finding in saved.findings:
        assert finding.text.replace("`", "") in found.text


def test_the_page_starts_with_the_findings_the_worst_first(folder, saved):
    levels = [one.level for one in saved.findings]
    assert levels == sorted(levels, reverse=True) and levels[0] == 3
    text = page(folder).text
    assert text.index(saved.findings[0].text[:40]) < text.index("Charts")


def test_thumbnails_are_small_jpegs_each_kept_once(saved):
    import base64

    used = {one.picture for gallery in saved.galleries for case in gallery.cases for one in case.shown if one.picture}
    assert used == set(saved.thumbnails)
    for data in saved.thumbnails.values():
        shown = Image.open(io.BytesIO(base64.b64decode(data)))
        assert shown.format == "JPEG" and max(shown.size) <= 160


def test_hostile_names_break_no_table(folder, saved):
    text = (folder / "audit" / "audit.md").read_text(encoding="utf-8")
    assert "<script>" not in re.sub(r"\\.", "", text)
    assert not any(letter not in "\n" and not letter.isprintable() for letter in text)
    widths = []
    for line in text.splitlines():
        if line.startswith("|"):
            widths.append(len(re.findall(r"(?<!\\)\|", line)))
        elif widths:
            assert len(set(widths)) == 1, widths
            widths = []
    assert not re.search(r"^## head", text, re.M)


def test_markdown_takes_the_level_of_its_headings(saved):
    assert {line.split(" ")[0] for line in saved.to_markdown().splitlines() if line.startswith("#")} == {"###"}
    assert "**the name misleads**" in saved.to_markdown()


def test_the_terminal_shows_the_rows_and_the_findings_and_no_other_table(saved):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(saved.to_rich())
    text = " ".join(console.export_text().split())
    assert "Rows all train test" in text and "$x^2$ & <b> 3 3 0 person 9 5 4 all rows 12 8 4" in text
    assert "act on it" in text and "Looked for and not found" in text and "<script>" in text
    assert not [section.title for section in saved.sections[1:] if section.title in text and section.title != "Names"]


def test_plots_of_an_earlier_audit_do_not_stay(folder, saved, tmp_path):
    write_folder(tmp_path, {"train": [row(0, mention_image=None)]})
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "distance.png").write_bytes(b"old")
    audit(tmp_path, progress=False).save(tmp_path)
    assert not (tmp_path / "audit" / "distance.png").exists()


def test_a_set_without_pictures_or_findings_of_them_is_shown_too(tmp_path):
    train = rows(0, 3, mention_image=None, candidate_images=[None] * 3)
    train[1] |= {name: train[0][name] for name in ("mention", "context")}
    found = audit(write_folder(tmp_path, {"train": train}), progress=False)
    found.save(tmp_path)
    assert "img" in page(tmp_path).tags  # the charts
    assert [case.shown for gallery in found.galleries for case in gallery.cases] == [[]]
    assert "No row is complete for 8 of the 9 tasks" in found.to_markdown()
    assert found.fact("near").cell("all") == ("–", "")


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0 %"), (1, "100 %"), (0.0001, "<0.1 %"), (0.9999, ">99.9 %"), (0.123, "12.3 %"), (0.9994, "99.9 %")],
)
def test_a_share_is_never_rounded_to_none_or_all(share, text):
    assert percent(share) == text


def test_plain_text_is_one_line():
    assert "\n" not in plain(HOSTILE)
    assert plain("a|b") == "a\\|b"
