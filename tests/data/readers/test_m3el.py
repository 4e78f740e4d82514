from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m3el_hf.data.readers.m3el import read_m3el
from m3el_hf.data.schema import Picture, Record, Report
from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TOPICS
from tests.conftest import instance, write_release

quick = settings(deadline=None, max_examples=40, database=None)


def read(folder: Path) -> tuple[list[Record], Report]:
    report = Report()
    return list(read_m3el(folder, report)), report


def read_text(folder: Path, text: str, name: str = "person.json") -> tuple[list[Record], Report]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(text.encode())
    return read(folder)


def mistake(call: Callable[[], Any]) -> str:
    """The one line that a user reads."""
    with pytest.raises(M3ELError) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def skipped(folder: Path, *instances: Any) -> list[str]:
    """The reasons for which instances are skipped; a good one stands before and after them."""
    records, report = read_text(folder, json.dumps([instance(7), *instances, instance(8)]))
    assert [record.answer_qid for record in records] == ["Q70", "Q80"]
    assert report.read == len(instances) + 2
    assert all(len(line.splitlines()) == 1 for line in report.skipped)
    return report.skipped


def picture(folder: Path, image: Any) -> Picture:
    """The mention picture of one row."""
    folder.mkdir(exist_ok=True)
    (record,), report = read_text(folder, json.dumps([instance(0, images=False) | {"image": image}]))
    assert report == Report(read=1)
    return record.picture


def test_an_instance_becomes_a_record(tmp_path):
    (record,), report = read(write_release(tmp_path, [instance(3)]))
    assert (record.id, record.source) == ("person-0", "person.json row 0")
    assert (record.topic, record.split, record.difficulty) == ("person", None, None)
    assert (record.mention, record.context) == ("Name 3", "Name 3 went home.")
    assert record.answer_qid == "Q30"
    assert [one.qid for one in record.candidates] == ["Q30", "Q31", "Q32"]
    assert [one.name for one in record.candidates] == ["Name 3a", "Name 3b", "Name 3c"]
    assert [one.description for one in record.candidates] == [f"description 3 {k}" for k in range(3)]
    folder = tmp_path / "person_candidates_images" / "Name 3-Q30"
    assert [one.picture.path for one in record.candidates] == [folder / f"Q3{k}.png" for k in range(3)]
    assert record.picture.path == folder / "mention3.png"
    assert record.picture.url == "https://example.org/mention3.png"
    assert report == Report(read=1)


@pytest.mark.parametrize("form", ["json", "jsonl", "literal", "literal_lines"])
def test_every_notation_gives_the_same_records(tmp_path, form):
    instances = [instance(n) for n in range(3)]
    instances[1]["name"] = "it's \"É\" 'x'\u2028y\x85z"  # what splits lines for Python, but not in JSON
    instances[2]["difficulty"] = None
    expected, _ = read(write_release(tmp_path, instances))
    records, report = read(write_release(tmp_path, instances, form=form))
    assert records == expected
    assert report == Report(read=3)


def test_line_separators_within_a_text_do_not_end_a_line(tmp_path):
    lines = [json.dumps(instance(n) | {"sentence": "a\u2028b\x85c\u2029d"}, ensure_ascii=False) for n in range(2)]
    records, report = read_text(tmp_path, "\n".join(lines))
    assert [record.context for record in records] == ["a\u2028b\x85c\u2029d"] * 2
    assert report.skipped == []


TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)


@given(
    texts=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=4),
    form=st.sampled_from(["json", "jsonl", "py"]),
)
@quick
def test_texts_survive_any_notation(tmp_path_factory, texts, form):
    instances = [
        instance(n, images=False) | {"name": f"n{name}", "sentence": sentence, "difficulty": difficulty}
        for n, (name, sentence, difficulty) in enumerate(texts)
    ]
    lines = [repr(one) if form == "py" else json.dumps(one, ensure_ascii=False) for one in instances]
    text = "[" + ",".join(lines) + "]" if form == "json" else "\r\n".join(lines)
    records, report = read_text(tmp_path_factory.mktemp("release"), text)
    assert report == Report(read=len(texts))
    assert [(one.mention, one.context, one.difficulty) for one in records] == [
        (f"n{name}".strip(), sentence.strip() or None, difficulty.strip() or None)
        for name, sentence, difficulty in texts
    ]


def test_literals_may_hold_tuples(tmp_path):
    one = instance(0)
    one["image"] = tuple(one["image"])
    one["candidates"] = tuple(one["candidates"])
    records, report = read_text(tmp_path, repr((one,))[1:-2])
    assert report.skipped == []
    assert records == read(write_release(tmp_path, [instance(0)]))[0]


@pytest.mark.parametrize("name", ["person", "common_train", "books_validation", "sports_test"])
def test_the_file_name_says_topic_and_split(tmp_path, name):
    topic, _, split = name.partition("_")
    (record,), _ = read(write_release(tmp_path, [instance(0, topic=topic)], f"{name}.json"))
    assert (record.topic, record.split, record.id) == (topic, split or None, f"{name}-0")


def test_files_are_read_in_the_order_of_their_names(tmp_path):
    for name in ("person_test", "movies", "person_train", "books"):
        write_release(tmp_path, [instance(0), instance(1)], f"{name}.json")
    records, report = read(tmp_path)
    sources = [
        f"{name}.json row {row}" for name in ("books", "movies", "person_test", "person_train") for row in (0, 1)
    ]
    assert [record.source for record in records] == sources
    assert len({record.id for record in records}) == len(records)
    assert report.read == 8


@pytest.mark.parametrize("root", ["M3EL", "DiffMEL", "Other"])
def test_the_root_of_a_path_is_the_folder(tmp_path, root):
    (record,), _ = read(write_release(tmp_path, [instance(0, root=root, difficulty="hard")]))
    assert record.picture.path.is_file()
    assert record.difficulty == "hard"


def test_upper_case_extensions_are_kept(tmp_path):
    location = "/M3EL/person_candidates_images/Name 0-Q00/PHOTO.JPG"
    image = ["PHOTO.JPG", "https://example.org/PHOTO.JPG", location]
    (record,), _ = read(write_release(tmp_path, [instance(0, image=image)]))
    assert record.picture.path == tmp_path / location.split("/", 2)[2]
    assert record.picture.path.is_file()
    assert record.picture.flaw is None


def test_what_is_missing_is_none(tmp_path):
    one = instance(0, images=False, sentence=" \n", difficulty="")
    one["candidates"][1] |= {"description": None, "name": ""}
    del one["candidates"][2]["description"], one["candidates"][2]["image"]
    (record,), report = read(write_release(tmp_path, [one]))
    assert (record.context, record.difficulty, record.picture) == (None, None, None)
    assert [candidate.description for candidate in record.candidates] == ["description 0 0", None, None]
    assert [candidate.picture for candidate in record.candidates] == [None] * 3
    assert report.skipped == []


@pytest.mark.parametrize("image", [None, [], "", ["", "", ""], [None, None, None]])
def test_no_image_is_none_and_no_mistake(tmp_path, image):
    assert picture(tmp_path, image) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"Qid": ""}, "has no gold (field Qid)"),
        ({"Qid": None}, "has no gold (field Qid)"),
        ({"Qid": "Q999"}, "its gold Q999 is not among its candidates"),
        ({"Qid": "Q9\nQ8"}, "its gold Q9 Q8 is not among its candidates"),
        ({"name": " "}, "has no mention name (field name)"),
        ({"candidates": []}, "has no candidates"),
        ({"candidates": None}, "has no candidates"),
        ({"candidates": {"Qid": "Q00"}}, "has no candidates"),
        ({"candidates": [{"Qid": "Q00"}, "Q00"]}, "candidate 1: is of type str, not an object"),
        ({"candidates": [{"name": "x"}]}, "candidate 0: has no Qid"),
        (
            {"candidates": [{"Qid": "Q00"}, {"Qid": "Q01", "name": 7}]},
            "candidate 1: field name is of type int, not text",
        ),
        (
            {"candidates": [{"Qid": "Q00", "description": ["x"]}]},
            "candidate 0: field description is of type list, not text",
        ),
        ({"candidates": [{"Qid": "Q00"}, {"Qid": "Q00 "}]}, "lists a candidate twice"),
        ({"Qid": 89259}, "field Qid is of type int, not text"),
        ({"name": True}, "field name is of type bool, not text"),
        ({"name": ["Name 0"]}, "field name is of type list, not text"),
        ({"name": float("nan")}, "field name is of type float, not text"),
        ({"sentence": {"text": "x"}}, "field sentence is of type dict, not text"),
        ({"sentence": 0}, "field sentence is of type int, not text"),
        ({"difficulty": 0.5}, "field difficulty is of type float, not text"),
        ({"difficulty": False}, "field difficulty is of type bool, not text"),
        ({"sentence": "a \ud83d"}, "field sentence has an unpaired surrogate (not Unicode)"),
        ({"image": "photo.png"}, "field image is of type str, not [file name, url, path]"),
        ({"image": {}}, "field image is of type dict, not [file name, url, path]"),
        ({"image": 0}, "field image is of type int, not [file name, url, path]"),
        ({"image": ["", "", 0]}, "field image is of type int, not text"),
        ({"image": ["", "", "/M3EL/\ud83d.png"]}, "field image has an unpaired surrogate (not Unicode)"),
    ],
)
def test_an_unusable_row_is_skipped_with_its_reason(tmp_path, changes, reason):
    assert skipped(tmp_path, instance(0, **changes)) == [f"person.json row 1: {reason}"]


@pytest.mark.parametrize(("row", "kind"), [("Q1", "str"), (None, "NoneType"), ([], "list"), (3, "int")])
def test_a_row_that_is_no_object_is_skipped(tmp_path, row, kind):
    assert skipped(tmp_path, row) == [f"person.json row 1: is of type {kind}, not an object"]


def test_an_absent_gold_is_skipped(tmp_path):
    one = instance(0)
    del one["Qid"]
    assert skipped(tmp_path, one) == ["person.json row 1: has no gold (field Qid)"]


@pytest.mark.parametrize("broken", ['{"Qid": "Q1", ', "{{}: 1}", "not json", "[" * 5000, '{"Qid": 1}}'])
def test_a_broken_line_is_skipped_and_counted(tmp_path, broken):
    lines = [json.dumps(instance(0)), "", broken, json.dumps(instance(2))]
    records, report = read_text(tmp_path, "\n".join(lines))
    assert [record.source for record in records] == ["person.json row 0", "person.json row 2"]
    assert [record.id for record in records] == ["person-0", "person-2"]
    assert report.read == 3
    (line,) = report.skipped
    assert line.startswith("person.json row 1 (line 3): cannot be parsed (")
    assert len(line.splitlines()) == 1


def test_one_candidate_is_kept_and_counted(tmp_path):
    few, more = instance(0), instance(1)
    few["candidates"] = few["candidates"][:1]
    records, report = read(write_release(tmp_path, [few, more]))
    assert [len(record.candidates) for record in records] == [1, 3]
    assert report.counts == {"rows with a single candidate: any model is right": 1}


def test_fields_that_the_format_does_not_have_are_counted(tmp_path):
    rows = [instance(0, notes="x"), instance(1, notes=None, source=1), instance(2, Qid="", notes="x"), instance(3)]
    rows[0]["candidates"][1]["notes"] = rows[0]["candidates"][2]["notes"] = "x"
    _, report = read(write_release(tmp_path, rows))
    assert report.counts == {
        "field 'notes' not read": 3,
        "field 'source' not read": 1,
        "candidate field 'notes' not read": 2,
    }


@pytest.mark.parametrize("difficulty", [0, "0", " 0\n"])
def test_a_difficulty_may_be_an_integer(tmp_path, difficulty):
    (record,), _ = read(write_release(tmp_path, [instance(0, difficulty=difficulty)]))
    assert record.difficulty == "0"


@pytest.mark.parametrize(
    "name",
    ["x" * 10_000, "a\0b\x1bc\x07d", "\u202bשלום\u202c عالم", "👩\u200d🚀 🇫🇷", "tab\tand\nline", "e\u0301 \ufeff"],
)
@pytest.mark.parametrize("form", ["json", "jsonl", "literal", "literal_lines"])
def test_odd_texts_are_kept_as_they_are(tmp_path, name, form):
    (record,), report = read(write_release(tmp_path, [instance(0, images=False, name=name, sentence=name)], form=form))
    assert report == Report(read=1)
    assert (record.mention, record.context) == (name, name)


def test_control_characters_may_stand_unescaped(tmp_path):
    text = json.dumps([instance(0, name="a@b")]).replace("@", "\0\n\t")
    (record,), _ = read_text(tmp_path, text)
    assert record.mention == "a\0\n\tb"


def test_a_report_stays_readable_whatever_the_names(tmp_path):
    (line,) = skipped(tmp_path, instance(0, Qid="Q\0\x1b[2J" + "9" * 10_000))
    assert line.startswith("person.json row 1: its gold Q\ufffd\ufffd[2J999")
    assert len(line) < 600


@pytest.mark.parametrize("text", ["", "  \n", "hello", "\0", "<html></html>", "7", '"Q1"', "null"])
def test_a_file_of_another_kind_is_a_mistake(tmp_path, text):
    message = mistake(lambda: read_text(tmp_path, text))
    assert message.startswith(f"{tmp_path / 'person.json'} is neither JSON, JSON lines nor Python literals")
    assert message.endswith("fix it or fetch it again")


@pytest.mark.parametrize("text", ["[1, 2", "[", "[" * 100_000, '[{"Qid": "Q1"', "[{'Qid': 'Q1'}, {'Qid': 'Q2"])
def test_a_file_that_is_cut_off_is_a_mistake(tmp_path, text):
    message = mistake(lambda: read_text(tmp_path, text))
    assert message.startswith(str(tmp_path / "person.json"))
    assert "is cut off" in message
    assert message.endswith("fix it or fetch it again")


def test_another_encoding_is_a_mistake(tmp_path):
    (tmp_path / "person.json").write_text(json.dumps([instance(0)]), encoding="utf-16")
    assert "person.json is not UTF-8 text" in mistake(lambda: read(tmp_path))


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "person.json").write_text(json.dumps([instance(0)]), encoding="utf-8-sig")
    assert len(read(tmp_path)[0]) == 1


def test_a_folder_named_like_a_file_is_a_mistake(tmp_path):
    (tmp_path / "person.json").mkdir()
    assert "person.json cannot be read" in mistake(lambda: read(tmp_path))


def test_a_missing_folder_is_a_mistake(tmp_path):
    absent = tmp_path / "absent"
    assert mistake(lambda: read(absent)).startswith(f"no such folder: {absent}; pass the folder that holds the release")
    file = write_release(tmp_path, [instance(0)]) / "person.json"
    assert mistake(lambda: read(file)).startswith(f"{file} is a file: pass the folder that holds the release")
    assert "no --input: pass the folder" in mistake(lambda: list(read_m3el(None, Report())))


@pytest.mark.parametrize(
    "name", ["music.json", "person_half.json", "Person.json", "person.jsonl", "person_train.json.gz"]
)
def test_an_unknown_topic_is_a_mistake_that_names_the_known(tmp_path, name):
    message = mistake(lambda: read_text(tmp_path, "[]", name))
    assert "expected <topic>.json or <topic>_<split>.json" in message
    assert all(topic in message for topic in TOPICS)


@pytest.mark.parametrize("name", ["music.json", "person_half.json", "books.jsonl"])
def test_an_unknown_topic_beside_a_known_is_reported(tmp_path, name):
    write_release(tmp_path, [instance(0)])
    records, report = read_text(tmp_path, json.dumps([instance(1)]), name)
    assert len(records) == report.read == 1
    assert [name in line for line in report.counts] == [True]


def test_an_absent_picture_is_left_to_whoever_opens_it(tmp_path):
    write_release(tmp_path, [instance(0)])
    lost = tmp_path / "person_candidates_images" / "Name 0-Q00" / "Q01.png"
    lost.unlink()
    ((record,), _) = read(tmp_path)
    assert record.candidates[1].picture == Picture(path=lost, url="https://example.org/Q01.png")


@pytest.mark.parametrize(
    "location", ["/M3EL/../secret.png", "/M3EL/a/../../secret.png", "../../secret.png", "/M3EL/.."]
)
def test_a_path_that_climbs_out_is_never_opened(tmp_path, location):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    found = picture(tmp_path / "release", ["secret.png", "", location])
    assert found.flaw == "lies outside the source's folder"


def test_a_link_that_leads_out_is_never_opened(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    release = tmp_path / "release"
    release.mkdir()
    (release / "link.png").symlink_to(tmp_path / "secret.png")
    (release / "folder").symlink_to(tmp_path)
    (release / "inside.png").symlink_to(release / "person.json")
    for location in ("/M3EL/link.png", "/M3EL/folder/secret.png", "/M3EL/folder/release/link.png"):
        assert picture(release, ["", "", location]).flaw == "lies outside the source's folder"
    for location in ("/M3EL/inside.png", "/M3EL/folder/release/a.png", "/M3EL/x/../a.png"):
        assert picture(release, ["", "", location]).flaw is None


def test_a_release_behind_a_link_is_its_own_inside(tmp_path):
    write_release(tmp_path / "real", [instance(0)])
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (record,), _ = read(tmp_path / "link")
    assert record.picture.flaw is None


@pytest.mark.parametrize(
    ("image", "file", "reason"),
    [
        (["a.png", "", ""], "a.png", "has no path"),
        (["", "https://example.org/a.png", ""], None, "has no path"),
        (["a.png", "https://example.org/a.png"], None, "has no path"),
        (["", "", "/M3EL/"], "/M3EL", "has no path"),
        (["", "", "a.png"], "a.png", "has no path"),
        (["", "", "/M3EL/a\0b.png"], "{}/a\0b.png", "has a null character in its path"),
        (["", "", "/M3EL/" + "a" * 300 + ".png"], "{}/" + "a" * 300 + ".png", None),
        (["", "", "/M3EL//etc/passwd"], "{}/etc/passwd", None),
    ],
)
def test_odd_paths_stay_in_the_folder_or_say_why_not(tmp_path, image, file, reason):
    found = picture(tmp_path, image)
    assert found.path == (None if file is None else Path(file.format(tmp_path)))
    assert found.flaw == reason


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.sampled_from(["", "Q1", "x\0", "/M3EL/../x", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["Qid", "name", "image"]), inner),
    max_leaves=5,
)


@given(changes=st.dictionaries(st.sampled_from(sorted(instance(0))), VALUES), candidate=VALUES)
@quick
def test_any_row_is_read_or_skipped(tmp_path_factory, changes, candidate):
    one = instance(0, images=False) | changes
    if isinstance(one["candidates"], list):
        one["candidates"].append(candidate)
    records, report = read_text(tmp_path_factory.mktemp("release"), json.dumps([one, instance(1)]))
    assert report.read == 2
    assert len(records) + len(report.skipped) == 2
    for record in records:
        str(replace(record)).encode()  # what is read can be written
        assert record.answer_qid in {one.qid for one in record.candidates}


@given(text=st.text(st.sampled_from(list("[]{}'\":, \n\\Qid1n\0"))))
@quick
def test_any_text_is_read_or_a_mistake(tmp_path_factory, text):
    try:
        records, report = read_text(tmp_path_factory.mktemp("release"), text)
    except M3ELError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert len(records) + len(report.skipped) == report.read


def test_a_release_in_the_hubs_cache_is_read_with_its_pictures(tmp_path):
    """There every file is a link into `blobs`, outside the snapshot's folder."""
    folder = write_release(tmp_path / "datasets--user--raw" / "snapshots" / "abc", [instance(0)])
    blobs = tmp_path / "datasets--user--raw" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(one for one in folder.rglob("*") if one.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    (tmp_path / "secret.png").write_bytes(b"secret")
    outside = next(folder.rglob("Q01.png"))
    outside.unlink()
    outside.symlink_to(tmp_path / "secret.png")
    (record,), _ = read(folder)
    assert record.picture.flaw is None
    flaws = [candidate.picture.flaw for candidate in record.candidates]
    assert flaws == [None, "lies outside the source's folder", None]


@pytest.mark.parametrize("name", ["dev", "val"])
def test_a_development_set_is_for_validation(tmp_path, name):
    (record,), _ = read(write_release(tmp_path, [instance(0, images=False)], f"person_{name}.json"))
    assert record.split == "validation"
