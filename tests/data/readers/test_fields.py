from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3el_hf.data.readers.fields import (
    UnusableRowError,
    check_folder,
    find_path_flaw,
    get_fields,
    get_text,
    name_answer,
    note_unread,
    read_row,
    skip_entity,
    skip_row,
)
from m3el_hf.data.schema import NIL, Entity, Record, Report
from m3el_hf.errors import M3ELError

quick = settings(deadline=None, max_examples=200, database=None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (" \n", None),
        ("", None),
        (None, None),
        ("0", "0"),
        (" a\0b\tc\nd ", "a\0b\tc\nd"),
        ("é\u2028x", "é\u2028x"),
        ("x" * 10_000, "x" * 10_000),
    ],
)
def test_a_text_is_stripped_and_otherwise_kept(value, expected):
    assert get_text({"a": value}, "a") == expected
    assert get_text({}, "a") is None


def test_an_unpaired_surrogate_is_no_text():
    with pytest.raises(UnusableRowError, match=r"^field a has an unpaired surrogate \(not Unicode\)$"):
        get_text({"a": "\ud83d"}, "a")


@pytest.mark.parametrize("value", [0, 7, 1.5, float("nan"), True, False, [], ["a"], {}, {"a": "b"}, (), b"a"])
def test_nothing_else_becomes_text(value):
    with pytest.raises(UnusableRowError, match=f"^field a is of type {type(value).__name__}, not text$"):
        get_text({"a": value}, "a")


@pytest.mark.parametrize(("value", "expected"), [(0, "0"), (-7, "-7"), (" 7", "7"), (None, None)])
def test_an_integer_is_taken_where_it_may_stand(value, expected):
    assert get_text({"a": value}, "a", integer=True) == expected


@pytest.mark.parametrize("value", [True, False, 1.0, float("nan"), [1]])
def test_nothing_like_an_integer_is_taken_for_one(value):
    with pytest.raises(UnusableRowError, match="^field a is of type"):
        get_text({"a": value}, "a", integer=True)


def test_unknown_fields_are_counted_by_name():
    report = Report()
    known = frozenset({"a", "b"})
    rows = [{"a": 1}, {"a": 1, "c": 2}, {"c": None, "d": 1}, {1: 2}, {"\ud83d\n": 0}]
    assert [get_fields(row, known, report) for row in rows] == rows
    get_fields({"a": 1, "c": 2}, known, report, "entity field")
    assert report.counts == {
        "field 'c' not read": 2,
        "field 'd' not read": 1,
        "field 1 not read": 1,
        "field '\\ud83d\\n' not read": 1,
        "entity field 'c' not read": 1,
    }


@pytest.mark.parametrize("row", [None, "a", [], 7])
def test_what_is_no_object_has_no_fields(row):
    with pytest.raises(UnusableRowError, match=f"^is of type {type(row).__name__}, not an object$"):
        get_fields(row, frozenset(), Report())


def test_only_so_many_unknown_fields_are_named():
    report = Report()
    for _ in range(2):
        for number in range(30):
            get_fields({f"f{number}": 1, "x" * 10_000: 1}, frozenset({"x" * 10_000}), report)
    get_fields({"y" * 10_000: 1}, frozenset(), report)
    assert report.counts == {f"field 'f{number}' not read": 2 for number in range(20)} | {
        "other fields, not read here": 21
    }


def test_the_name_of_an_unknown_field_is_cut():
    report = Report()
    get_fields({"y" * 10_000: 1}, frozenset(), report)
    ((line, count),) = report.counts.items()
    assert (len(line) <= 501, count) == (True, 1)


def test_a_row_is_a_record_or_a_line():
    def record(*candidates: Entity) -> Record:
        return Record("r", "r", None, None, "m", None, None, "Q1", candidates)

    def fail() -> Record:
        raise UnusableRowError("is odd")

    report = Report()
    assert list(read_row(record, report, "a row 0")) == [record()]
    assert list(read_row(fail, report, "a row 1")) == []
    assert report == Report(read=2, skipped=["a row 1: is odd"])
    one, two = Entity("Q1", "a"), Entity("Q2", "b")
    assert list(read_row(lambda: record(one), report, "")) == [record(one)]
    assert list(read_row(lambda: record(one, two), report, "")) == [record(one, two)]
    assert (report.read, report.counts) == (4, {"rows with a single candidate: any model is right": 1})


@pytest.mark.parametrize("answer", ["nil", "NIL", "Nil"])
def test_no_entity_has_one_name(answer):
    assert name_answer(answer) == NIL
    assert name_answer(f"{answer}s") == f"{answer}s"


@given(place=st.text(), reason=st.text(max_size=2000))
@quick
def test_a_reason_is_one_short_printable_line(place, reason):
    report = Report()
    skip_row(report, place, reason)
    skip_entity(report, place, reason)
    assert (report.read, report.entities_read) == (1, 1)
    (line,) = report.skipped
    assert report.entities_skipped == [line]
    assert line.isprintable() and len(line) <= 501


def test_what_is_no_folder_is_a_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(M3ELError, match="no such folder: .*absent; pass the folder that holds x"):
        check_folder(tmp_path / "absent", "x")
    with pytest.raises(M3ELError, match="file is a file: pass the folder that holds x"):
        check_folder(tmp_path / "file", "x")
    with pytest.raises(M3ELError, match="no --input: pass the folder that holds x"):
        check_folder(None, "x")
    assert check_folder(tmp_path, "x") == tmp_path


def test_files_that_are_not_read_are_counted(tmp_path):
    for name in ("a.json", "b.json", "c.jsonl", "d.txt"):
        (tmp_path / name).write_text("")
    report = Report()
    note_unread(tmp_path, {tmp_path / "a.json"}, report, "it is odd")
    assert report.counts == {f"file {name} not read: it is odd": 1 for name in ("b.json", "c.jsonl")}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release with links that stay in it and links that lead out of it, beside what it must not see."""
    root = tmp_path_factory.mktemp("tree")
    (root / "release" / "a" / "b").mkdir(parents=True)
    (root / "release2").mkdir()
    for file in ("secret", "release2/secret", "release/x", "release/a/x", "release/a/b/x"):
        (root / file).write_text("")
    links = {
        "out": root / "secret",
        "up": root,
        "near": root / "release2",
        "a/in": root / "release" / "x",
        "a/back": root / "release",
        "loop": root / "release" / "loop",
        "broken": root / "nowhere",
        "inner": Path("a") / "b",
    }
    for name, target in links.items():
        (root / "release" / name).symlink_to(target)
    return root


PARTS = ["..", ".", "a", "b", "x", "secret", "release", "release2", "out", "up", "near", "in", "back", "loop", "broken"]
PARTS += ["inner", "absent"]


@given(parts=st.lists(st.sampled_from(PARTS), max_size=6))
@quick
def test_a_path_is_flawed_just_if_it_leads_out(tree, parts):
    folder = tree / "release"
    path = folder.joinpath(*parts)
    inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    assert find_path_flaw(path, folder) == (None if inside else "lies outside the source's folder")


@pytest.mark.parametrize(
    ("part", "inside"),
    [("x", True), ("a/in", True), ("a/back/a/x", True), ("inner/x", True), ("absent/x", True), (".", True)]
    + [(part, False) for part in ("out", "up/secret", "near/secret", "..", "../secret", "../release2/x", "broken")]
    + [("/etc/passwd", False), ("up/release/x", True), ("../release/x", True)],
)
def test_paths_and_links_are_followed(tree, part, inside):
    assert (find_path_flaw(tree / "release" / part, tree / "release") is None) == inside


def test_an_impossible_path_is_flawed(tmp_path):
    assert find_path_flaw(tmp_path / "a\0b", tmp_path) == "has a null character in its path"
    assert find_path_flaw(tmp_path / ("a" * 5000), tmp_path) is None  # whoever opens it learns


def test_a_relative_folder_is_its_own_inside(tmp_path, monkeypatch):
    for part in "ab":
        (tmp_path / part).mkdir()
        (tmp_path / part / "pictures").symlink_to({"a": Path("."), "b": Path("..")}[part])
        monkeypatch.chdir(tmp_path / part)
        assert find_path_flaw(Path("x.png"), Path(".")) is None
        assert find_path_flaw(Path("../x.png"), Path(".")) == "lies outside the source's folder"
        assert (
            find_path_flaw(Path("pictures/x.png"), Path("."))
            == {"a": None, "b": "lies outside the source's folder"}[part]
        )
