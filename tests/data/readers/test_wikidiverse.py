from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from m3el_hf.data.readers.wikidiverse import read_candidates, read_passage_entities, read_passages
from m3el_hf.data.schema import NIL, Entity, Picture, Record, Report
from m3el_hf.errors import M3ELError

WIKI = "https://en.wikipedia.org/wiki/"
CAPTION = "The Lions versus the Packers (2007)."
IMAGE = "https://upload.example.org/Lions.jpg"
FILE = f"{hashlib.md5(b'Lions.jpg').hexdigest()}.jpg"
LIONS = ["Lions", "Organization", 4, 9, f"{WIKI}Detroit_Lions"]
PACKERS = ["Packers", "Organization", 21, 28, f"{WIKI}Green_Bay_Packers"]


def passage(*mentions: Any, topic: Any = "sports", caption: Any = CAPTION, image: Any = IMAGE) -> list[Any]:
    return [caption, image, topic, list(mentions)]


def mention(**changes: Any) -> list[Any]:
    """One mention with its candidates."""
    fields = {
        "caption": CAPTION,
        "image": IMAGE,
        "mention": "Lions",
        "type": "Organization",
        "left": ["the"],
        "right": ["versus", "the", "packers"],
        "url": f"{WIKI}Detroit_Lions",
        "candidates": [f"{WIKI}Lion", f"{WIKI}Detroit_Lions"],
        "topic": "sports",
        "start": 4,
        "end": 9,
    }
    assert set(changes) <= set(fields)
    return list((fields | changes).values())


def write(folder: Path, rows: Any, name: str = "train.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(rows))
    return folder


def read(folder: Path, reader: Any = read_passages) -> tuple[list[Record], Report]:
    report = Report()
    records = list(reader(folder, report))
    assert report.read == len(records) + len(report.skipped)
    assert len({record.id for record in records}) == len(records)
    return records, report


def read_entities(folder: Path) -> list[Entity]:
    report = Report()
    entities = list(read_passage_entities(folder, report))
    assert report == Report(entities_read=len(entities))
    return entities


def one(folder: Path, *row: Any) -> Record:
    ((record,), report) = read(write(folder, list(row), "rows.json"), read_candidates)
    assert report.skipped == []
    return record


def test_each_mention_of_a_passage_becomes_a_record(tmp_path):
    records, report = read(write(tmp_path, [passage(LIONS, PACKERS)]))
    assert records[1] == Record(
        id=records[1].id,
        source="train.json row 0 mention 1",
        topic="sports",
        split="train",
        mention="Packers",
        context=CAPTION,
        picture=Picture(path=tmp_path / "wikinewsImgs" / FILE, url=IMAGE),
        answer_qid=f"{WIKI}Green_Bay_Packers",
        candidates=(),
    )
    assert records[0].mention == "Lions"
    assert report == Report(read=2)


def test_ids_are_of_caption_picture_and_place(tmp_path):
    records, _ = read(write(tmp_path, [passage(LIONS, PACKERS), passage(LIONS, image="https://example.org/x.png")]))
    assert len({record.id for record in records}) == 3
    expected = hashlib.sha256(json.dumps([CAPTION, IMAGE, "4"]).encode()).hexdigest()[:16]
    assert records[0].id == one(tmp_path / "other", mention()).id == expected


def test_what_comes_twice_keeps_an_id_of_its_own(tmp_path):
    write(tmp_path, [passage(LIONS), passage(LIONS)], "test.json")
    records, report = read(write(tmp_path, [passage(LIONS)], "train.json"))
    first = records[0].id
    assert [(record.split, record.id) for record in records] == [
        ("test", first),
        ("test", f"{first}-2"),
        ("train", f"{first}-3"),
    ]
    assert report.counts == {"mentions with the same caption, picture and place as an earlier one": 2}


def test_entities_are_the_pages_that_are_meant_once_each(tmp_path):
    rows = [passage(PACKERS, LIONS), passage(LIONS, ["x", "", 0, 1, "nil"], ["y", "", 2, 3, f"{WIKI}AC/DC"])]
    assert read_entities(write(tmp_path, rows)) == [
        Entity(f"{WIKI}Green_Bay_Packers", "Green Bay Packers"),
        Entity(f"{WIKI}Detroit_Lions", "Detroit Lions"),
        Entity(f"{WIKI}AC/DC", "AC/DC"),
    ]


@pytest.mark.parametrize(
    ("address", "page", "name"),
    [
        ("https://en.wikipedia.org/wiki/Detroit_Lions", f"{WIKI}Detroit_Lions", "Detroit Lions"),
        ("nhttps://en.wikipedia.org/wiki/Detroit_Lions", f"{WIKI}Detroit_Lions", "Detroit Lions"),
        ("hhttps://en.wikipedia.org/wiki/Detroit_Lions", f"{WIKI}Detroit_Lions", "Detroit Lions"),
        ("]https://en.wikipedia.org/wiki/Detroit_Lions", f"{WIKI}Detroit_Lions", "Detroit Lions"),
        ("ttps://en.wikipedia.org/wiki/Detroit_Lions", f"{WIKI}Detroit_Lions", "Detroit Lions"),
        ("http://en.wikipedia.org/wiki/Detroit_Lions", f"{WIKI}Detroit_Lions", "Detroit Lions"),
        (" https://en.wikipedia.org/wiki/Detroit Lions\n", f"{WIKI}Detroit_Lions", "Detroit Lions"),
        ("https://en.wikipedia.org/wiki/Beyonc%C3%A9", f"{WIKI}Beyoncé", "Beyoncé"),
        ("https://de.wikipedia.org/wiki/M%C3%BCnchen", "https://de.wikipedia.org/wiki/München", "München"),
        ("https://www.example.org/a/b_c", "https://www.example.org/a/b_c", "b c"),
        ("Detroit Lions", f"{WIKI}Detroit_Lions", "Detroit Lions"),
    ],
)
def test_addresses_are_cleaned(tmp_path, address, page, name):
    folder = write(tmp_path, [passage([*LIONS[:4], address])])
    ((record,), _) = read(folder)
    assert record.answer_qid == page
    assert read_entities(folder) == [Entity(page, name)]


def test_junk_before_a_picture_is_cut_off(tmp_path):
    ((record,), _) = read(write(tmp_path, [passage(LIONS, image="nhttps://example.org/a.png")]))
    assert record.picture is not None
    assert record.picture.url == "https://example.org/a.png"
    ((record,), _) = read(write(tmp_path, [passage(LIONS, image="")]))
    assert record.picture is None


@pytest.mark.parametrize(
    ("url", "file"),
    [  # printf %s a.png | md5sum
        ("https://example.org/b/a.png", "32d3ca5e23f4ccf1e4c8660c40e75f33.png"),
        ("https://example.org/Flag of X.SVG", None),
        ("https://example.org/nothing", None),
    ],
)
def test_a_downloaded_picture_lies_under_the_hash_of_its_name(tmp_path, url, file):
    ((record,), _) = read(write(tmp_path, [passage(LIONS, image=url)]))
    name = url.rpartition("/")[2]
    ending = {"a.png": ".png", "Flag of X.SVG": ".png", "nothing": ""}[name]
    expected = file or hashlib.md5(name.encode()).hexdigest() + ending
    assert record.picture == Picture(path=tmp_path / "wikinewsImgs" / expected, url=url)


@pytest.mark.parametrize("nil", ["nil", "NIL", "Nil "])
def test_no_entity_is_kept_as_such(tmp_path, nil):
    ((record,), _) = read(write(tmp_path, [passage([*LIONS[:4], nil])]))
    assert record.answer_qid == NIL
    assert read_entities(tmp_path) == []


@pytest.mark.parametrize(
    ("topic", "slug"),
    [("sports", "sports"), ("Science & Technology", "science-technology"), (" Crime_law ", "crime-law"), ("", None)]
    + [(None, None), ("体育", None), ("../../x", "x"), ("a" * 5, "aaaaa")],
)
def test_topics_are_short_plain_words(tmp_path, topic, slug):
    ((record,), _) = read(write(tmp_path, [passage(LIONS, topic=topic)]))
    assert record.topic == slug
    assert one(tmp_path / "other", mention(topic=topic)).topic == (slug or "other")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("valid", "validation"),
        ("dev", "validation"),
        ("wikidiverse_test", "test"),
        ("train_w_10cands", "train"),
        ("Valid-v2", "validation"),
        ("all", None),
        ("training", None),
        ("train_test", None),
    ],
)
def test_the_file_name_says_the_split(tmp_path, name, split):
    ((record,), _) = read(write(tmp_path, [passage(LIONS)], f"{name}.json"))
    assert record.split == split


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (passage(), "row 1: has no mentions"),
        ([*passage()[:3], "Lions"], "row 1: has no mentions"),
        (passage(LIONS)[:3], "row 1: has 3 fields, not 4: [caption, image, topic, mentions]"),
        ({"caption": "x"}, "row 1: is of type dict, not [caption, image, topic, mentions]"),
        (passage(LIONS[:4]), "row 1 mention 0: has 4 fields, not 5: [mention, type, start, end, url]"),
        (passage("Lions"), "row 1 mention 0: is of type str, not [mention, type, start, end, url]"),
        (passage([*LIONS[:4], ""]), "row 1 mention 0: has no gold (field url)"),
        (passage([*LIONS[:4], None]), "row 1 mention 0: has no gold (field url)"),
        (passage([" ", *LIONS[1:]]), "row 1 mention 0: has no mention name (field mention)"),
        (passage(LIONS, caption="\ud83d"), "row 1 mention 0: field caption has an unpaired surrogate (not Unicode)"),
        (passage(LIONS, caption=[CAPTION]), "row 1 mention 0: field caption is of type list, not text"),
        (passage(LIONS, image=1), "row 1 mention 0: field image is of type int, not text"),
        (passage(LIONS, topic=float("nan")), "row 1 mention 0: field topic is of type float, not text"),
        (passage([1, *LIONS[1:]]), "row 1 mention 0: field mention is of type int, not text"),
        (passage([*LIONS[:2], "4", 9, True]), "row 1 mention 0: field url is of type bool, not text"),
        (passage([*LIONS[:2], [4], 9, LIONS[4]]), "row 1 mention 0: field start is of type list, not text"),
    ],
)
def test_what_cannot_be_used_is_skipped_with_its_reason(tmp_path, row, reason):
    folder = write(tmp_path, [passage(LIONS), row, passage(PACKERS)])
    records, report = read(folder)
    assert [record.mention for record in records] == ["Lions", "Packers"]
    assert report.skipped == [f"train.json {reason}"]
    assert len(read_entities(folder)) == 2


def test_damage_in_the_middle_costs_one_passage(tmp_path):
    path = write(tmp_path, [passage(LIONS, caption=f"{n}") for n in range(5)]) / "train.json"
    path.write_text(path.read_text().replace('"2"', '"2" disc"'))
    records, report = read(tmp_path)
    assert [record.context for record in records] == ["0", "1", "3", "4"]
    assert report.skipped[0].startswith("train.json row 2: cannot be parsed (")


def test_a_mention_with_candidates_becomes_a_record(tmp_path):
    record = one(tmp_path, mention())
    assert record == Record(
        id=record.id,
        source="rows.json row 0",
        topic="sports",
        split=None,
        mention="Lions",
        context=CAPTION,
        picture=Picture(path=tmp_path / "wikinewsImgs" / FILE, url=IMAGE),
        answer_qid=f"{WIKI}Detroit_Lions",
        candidates=(Entity(f"{WIKI}Lion", "Lion"), Entity(f"{WIKI}Detroit_Lions", "Detroit Lions")),
    )


@pytest.mark.parametrize(
    "candidates",
    [
        ["Lion", "Detroit Lions"],
        [[f"{WIKI}Lion", 0.5], [f"{WIKI}Detroit_Lions", 0.25]],
        [["Lion"], "nhttps://en.wikipedia.org/wiki/Detroit_Lions"],
        ["Lion", "Detroit%20Lions"],
    ],
)
def test_candidates_are_addresses_or_titles_alone_or_in_lists(tmp_path, candidates):
    found = one(tmp_path / "a", mention(candidates=candidates))
    assert found == replace(one(tmp_path / "b", mention()), picture=found.picture)  # it lies in another folder


def test_a_candidate_may_lack_the_hyphens_of_the_gold(tmp_path):
    gold = f"{WIKI}High-definition_television"
    record = one(tmp_path, mention(url=gold, candidates=["Television", "High definition television"]))
    assert [one.qid for one in record.candidates] == [f"{WIKI}Television", gold]
    record = one(tmp_path, mention(url=gold, candidates=["High definition television", gold]))
    assert [one.qid for one in record.candidates] == [f"{WIKI}High_definition_television", gold]


def test_a_candidate_that_comes_twice_is_kept_once(tmp_path):
    row = mention(candidates=["Lion", "Detroit Lions", f"{WIKI}Lion", "Lion"])
    ((record,), report) = read(write(tmp_path, [row]), read_candidates)
    assert [one.name for one in record.candidates] == ["Lion", "Detroit Lions"]
    assert report.counts == {"candidates listed twice, kept once": 2}


def test_one_candidate_is_kept_and_counted(tmp_path):
    ((record,), report) = read(write(tmp_path, [mention(candidates=["Detroit Lions"])]), read_candidates)
    assert len(record.candidates) == 1
    assert report.counts == {"rows with a single candidate: any model is right": 1}


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({}, CAPTION),
        ({"caption": ""}, "the Lions versus the packers"),
        ({"caption": None, "left": "Oh, the", "right": ""}, "Oh, the Lions"),
        ({"caption": " ", "left": [], "right": None}, "Lions"),
    ],
)
def test_the_context_is_the_caption_or_else_what_stands_around(tmp_path, changes, context):
    assert one(tmp_path, mention(**changes)).context == context


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (mention(url="nil"), "its answer is NIL: no candidate is right"),
        (mention(url=""), "has no gold (field url)"),
        (mention(candidates=[]), "has no candidates"),
        (mention(candidates="Lion"), "has no candidates"),
        (mention(candidates=["Lion"]), f"its gold {WIKI}Detroit_Lions is not among its candidates"),
        (mention(candidates=["Detroit Lions", ""]), "has a candidate without an address"),
        (mention(candidates=["Detroit Lions", []]), "has a candidate without an address"),
        (mention(candidates=["Detroit Lions", None]), "has a candidate without an address"),
        (mention(candidates=["Detroit Lions", {"url": "Lion"}]), "has a candidate without an address"),
        (mention(mention=""), "has no mention name (field mention)"),
        (mention(mention={"Lions": 1}), "field mention is of type dict, not text"),
        (mention(caption="", left=["the", 0]), "field left or right is of type int, not text"),
        (mention()[:10], "has 10 fields, not 11: [caption, image, mention, type, left, right, url, candidates, "
         "topic, start, end]"),
    ],
)  # fmt: skip
def test_an_unusable_mention_is_skipped_with_its_reason(tmp_path, row, reason):
    records, report = read(write(tmp_path, [mention(), row, mention(start=9)]), read_candidates)
    assert [record.mention for record in records] == ["Lions", "Lions"]
    assert report.skipped == [f"train.json row 1: {reason}"]


def test_both_forms_may_stand_in_one_folder(tmp_path):
    write(tmp_path, [passage(LIONS)], "train.json")
    write(tmp_path, [mention()], "train_w_10cands.json")
    write(tmp_path, {"a": 1}, "images_map.json")
    ((record,), report) = read(tmp_path)
    assert record.candidates == ()
    unread = {"file images_map.json not read: its rows are not lists of 4 fields": 1}
    assert report.counts == unread | {"file train_w_10cands.json not read: its rows are not lists of 4 fields": 1}
    ((other,), _) = read(tmp_path, read_candidates)
    assert replace(other, candidates=(), source="") == replace(record, source="")


def test_the_other_form_is_a_mistake(tmp_path):
    write(tmp_path, [mention()])
    for read_wrongly in (read_passages, read_passage_entities):
        with pytest.raises(M3ELError, match=r"rows are \[caption, image, topic, mentions\]$"):
            list(read_wrongly(tmp_path, Report()))
    write(tmp_path, [passage(LIONS)])
    with pytest.raises(M3ELError, match=r"candidates, topic, start, end\]$"):
        list(read_candidates(tmp_path, Report()))


def test_a_file_that_cannot_be_read_is_a_mistake(tmp_path):
    (write(tmp_path, [passage(LIONS)]) / "test.json").write_text("<html>")
    with pytest.raises(M3ELError, match="test.json is neither JSON"):
        read(tmp_path)


def test_an_odd_first_row_costs_no_other(tmp_path):
    write(tmp_path, [["odd"], passage(LIONS), passage(LIONS)], "train.json")
    records, report = read(tmp_path)
    assert len(records) == 2
    (reason,) = report.skipped
    assert reason.startswith("train.json row 0: has 1 fields, not 4")
