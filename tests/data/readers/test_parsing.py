from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3el_hf.data.readers import parsing
from m3el_hf.data.readers.fields import skip_entity
from m3el_hf.data.readers.parsing import parse_elements, parse_entries
from m3el_hf.data.schema import Report
from m3el_hf.errors import M3ELError

quick = settings(deadline=None, max_examples=60, database=None)

Write = Callable[[list[Any]], str]

FORMS: dict[str, Write] = {
    "list": json.dumps,
    "list of characters as they are": lambda rows: json.dumps(rows, ensure_ascii=False),
    "tight list": lambda rows: json.dumps(rows, separators=(",", ":")),
    "pretty list": lambda rows: json.dumps(rows, indent=1),
    "flat pretty list": lambda rows: json.dumps(rows, indent=0),
    "list, a row a line": lambda rows: "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n",
    "literal list": repr,
    "tuple": lambda rows: repr(tuple(rows)),
    "lines": lambda rows: "\n".join(map(json.dumps, rows)),
    "lines of characters as they are": lambda rows: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    "lines with blanks": lambda rows: "\n\r\n" + "\r\n \n".join(map(json.dumps, rows)) + "\n\n",
    "literal lines": lambda rows: "\n".join(map(repr, rows)) + "\n",
    "pretty objects": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows),
    "flat pretty objects": lambda rows: "\n\n".join(json.dumps(row, indent=0) for row in rows),
}
NASTY = st.text(
    st.sampled_from(list("\"'[]{}(),:\\\n\r\t\0 #éא😀\u2028\u0085\u202e")) | st.characters(codec="utf-8"), max_size=12
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | NASTY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NASTY, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(NASTY, VALUES, min_size=1, max_size=4), min_size=1, max_size=5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.json"


def parse(path: Path, text: str | bytes, chunk: int = 1 << 20) -> tuple[list[tuple[int, Any]], Report]:
    """The rows of a text; whatever is not yielded must have been reported."""
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    report = Report()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parsing, "CHUNK", chunk)
        rows = list(parse_elements(path, report))
    assert report == Report(read=len(report.skipped), skipped=report.skipped)
    numbers = [number for number, _ in rows]
    assert numbers == sorted(set(numbers) & set(range(len(rows) + report.read)))
    return rows, report


def mistake(call: Callable[[], Any]) -> str:
    with pytest.raises(M3ELError) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@given(rows=ROWS, form=st.sampled_from(sorted(FORMS)), chunk=st.integers(1, 40) | st.just(1 << 20), bom=st.booleans())
@settings(quick, max_examples=150)
def test_rows_survive_any_form_and_any_chunk(tmp_path_factory, rows, form, chunk, bom):
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    text = FORMS[form](rows).encode()
    found, report = parse(path, b"\xef\xbb\xbf" * bom + text, chunk)
    assert report.skipped == []
    assert found == list(enumerate(rows))


@given(rows=st.dictionaries(NASTY, VALUES, max_size=5), indent=st.sampled_from([None, 0, 1]), chunk=st.integers(1, 40))
@quick
def test_entries_survive_any_form_and_any_chunk(tmp_path_factory, rows, indent, chunk):
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    for text in (json.dumps(rows, indent=indent), json.dumps(rows, ensure_ascii=False), repr(rows)):
        path.write_bytes(text.encode())
        report = Report()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parsing, "CHUNK", chunk)
            found = list(parse_entries(path, report))
        assert found == [(number, key, value) for number, (key, value) in enumerate(rows.items())]
        assert report == Report()


@pytest.mark.parametrize("text", ["[]", " [ ] \n", "()", "[,]"])
def test_a_list_may_be_empty(path, text):
    assert parse(path, text) == ([], Report())


def test_one_object_is_one_row(path):
    for text in ('{"a": 1}', '{"a": 1}\n', "{'a': 1}", '\n{\n"a": 1\n}'):
        assert parse(path, text) == ([(0, {"a": 1})], Report())


def test_lists_may_stand_a_line_each(path):
    assert parse(path, '["a", [1]]\n["b", [2]]\n')[0] == [(0, ["a", [1]]), (1, ["b", [2]])]
    assert parse(path, '[["a", [1]],\n["b", [2]]]\n')[0] == [(0, ["a", [1]]), (1, ["b", [2]])]


@pytest.mark.parametrize(
    "text", ['[{"a": 1} {"a": 2}]', '[{"a": 1},, {"a": 2},]', '{"a": 1}\n,{"a": 2}', '{"a":1}{"a":2}']
)
def test_commas_between_rows_may_be_too_many_or_too_few(path, text):
    assert parse(path, text)[0] == [(0, {"a": 1}), (1, {"a": 2})]


def rows_with(broken: str, form: str) -> str:
    """A file in which the third of five rows is broken."""
    rows = [json.dumps({"i": n, "text": f"t{n}", "more": [{"k": n}, {"k": n}]}) for n in range(4)]
    rows.insert(2, broken)
    return {
        "list": "[" + ", ".join(rows) + "]",
        "list a line": "[\n" + ",\n".join(rows) + "\n]",
        "lines": "\n".join(rows),
        "literal": "[" + ", ".join(rows).replace('"', "'") + "]",
        "mapping": "{" + ", ".join(f'"{n}": {row}' for n, row in enumerate(rows)) + "}",
    }[form]


BROKEN = [
    '{"i": 9 "text": "t"}',
    '{"i": 9, "text": "say "no" twice", "more": []}',
    '{"i": 9, "text": "5" disc", "more": [{"k": 1}, {"k": 2}]}',
    '{"i": 9, "text": "t, "more": [{"k": 1}, {"k": 2}]}',
    '{"i": 9, "text": "t", "more": [{"k": 1}, {"k": 2}}',
    '{"i": 9, "text": "t", "more": {"k": 1}, {"k": 2}]}',
    '{"i": 9, "text": "t", "more": [{"k": 1}, {"k": 2]}',
    '{"i": 9, "text": "t", "more": [',
    '{"i": 9, "text": "t\\", "more": []}',
    '{"i": nine}',
    "nine",
    "[" * 2000 + "]" * 2000,
    "9" * 5000,
]


@pytest.mark.parametrize("form", ["list", "list a line", "lines", "literal"])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_damaged_row_costs_no_other(path, broken, form, chunk):
    rows, report = parse(path, rows_with(broken, form), chunk)
    assert [row["i"] for _, row in rows] == [0, 1, 2, 3]
    assert rows[:2] == [(n, {"i": n, "text": f"t{n}", "more": [{"k": n}, {"k": n}]}) for n in (0, 1)]
    assert report.skipped
    place = "rows.json row 2 (line 3): " if form == "lines" else "rows.json row 2: "
    assert report.skipped[0].startswith(f"{place}cannot be parsed (")
    assert all(len(line.splitlines()) == 1 for line in report.skipped)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_damaged_entry_costs_no_other(path, broken):
    path.write_text(rows_with(broken, "mapping"))
    report = Report()
    found = [(key, value["i"]) for _, key, value in parse_entries(path, report)]
    assert found == [("0", 0), ("1", 1), ("3", 2), ("4", 3)]
    assert report.read == len(report.skipped) > 0
    assert report.skipped[0].startswith("rows.json row 2: cannot be parsed (")


@pytest.mark.parametrize("first", ['{"i": 9 "text": "t"}', "nine", '{"i": nine}'])
def test_the_first_row_may_be_the_damaged_one(path, first):
    rows, report = parse(path, f'[{first}, {{"i": 1, "text": "t"}}]')
    assert rows == [(1, {"i": 1, "text": "t"})]
    assert report.read == 1


def test_rows_are_not_lost_between_two_damaged_ones(path):
    text = '[{i": 0, "t": "a"}, {"i": 1, "t": "b"}, {"i": 2, "t": "c}, {"i": 3, "t": "d"}]'
    rows, report = parse(path, text)
    assert [row["i"] for _, row in rows] == [1, 3]
    assert len(report.skipped) == 2


def test_a_reason_says_where_to_look(path):
    _, report = parse(path, '[\n{"a": 1},\n{"a": 2,\n "b" 3}]')
    assert report.skipped == [
        "rows.json row 1: cannot be parsed (Expecting ':' delimiter: line 4 column 6); 16 characters passed over"
    ]
    _, report = parse(path, "[{'a': 1}, {'a': 1, 'b': 2 'c': 3}]", chunk=5)
    (line,) = report.skipped
    assert "line 1 column 2" in line
    assert "double quotes" not in line  # what JSON has against the first quote helps nobody


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1}, {"a": 2',
        '[{"a": 1}, {"a": "2]',
        '[{"a": 1}',
        '[{"a": 1}, ',
        '{\n"a": 1\n}\n{\n"a": 2',
        '[{"a": "x}]',
        "[[1",
    ],
)
def test_a_file_that_is_cut_off_is_a_mistake(path, text):
    message = mistake(lambda: parse(path, text))
    assert message.startswith(f"{path} ")
    assert "is cut off" in message and "row " in message
    assert message.endswith("fix it or fetch it again")


def test_lines_that_are_cut_off_are_reported(path):
    rows, report = parse(path, '{"a": 1}\n{"a": 2}\n{"a"')
    assert len(rows) == 2
    assert report.skipped == ["rows.json row 2 (line 3): cannot be parsed (Expecting ':' delimiter: line 3 column 5)"]


def test_what_follows_a_list_is_a_mistake(path):
    message = mistake(lambda: parse(path, '[{"a": 1}]\n, {"a": 2}]'))
    assert message == f"{path} goes on after its end (line 2 column 3): fix it or fetch it again"


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": "@"}]', '{"a": 1}\n{"a": "@"}'])
def test_a_row_may_not_be_larger_than_is_said(path, monkeypatch, text):
    monkeypatch.setattr(parsing, "LARGEST", 1000)
    assert len(parse(path, text.replace("@", "x" * 900), chunk=100)[0]) == 2
    message = mistake(lambda: parse(path, text.replace("@", "x" * 5000), chunk=100))
    assert "larger than 1,000 characters" in message


def test_a_large_row_is_skipped_where_more_follow(path, monkeypatch):
    monkeypatch.setattr(parsing, "LARGEST", 1000)
    rows, report = parse(path, json.dumps([{"a": "1"}, {"a": "x" * 5000}, {"a": "3"}]), chunk=100)
    assert [row["a"] for _, row in rows] == ["1", "3"]
    assert report.skipped == [
        "rows.json row 1: cannot be parsed (it is larger than 1,000 characters: line 1 column 14); "
        "5,011 characters passed over"
    ]


def test_a_literal_may_not_cost_gigabytes(path, monkeypatch):
    monkeypatch.setattr(parsing, "LARGEST_LITERAL", 1000)
    rows, report = parse(path, repr([{"a": 1}, {"a": "x" * 2000}, {"a": 3}]))
    assert [row["a"] for _, row in rows] == [1, 3]
    (line,) = report.skipped
    assert "for a Python literal it is too large, with more than 1,000 characters: line 1 column 13)" in line


@pytest.mark.parametrize("text", ["", " \n", "\ufeff", "hello", "<html>", "\0", "12", "null", '"text"', "]"])
def test_a_file_of_another_kind_is_a_mistake(path, text):
    message = mistake(lambda: parse(path, text))
    assert message.startswith(f"{path} is neither JSON, JSON lines nor Python literals (")
    assert message.endswith("): fix it or fetch it again")
    path.write_text(text)
    assert f"{path} is not one mapping of ids to rows" in mistake(lambda: list(parse_entries(path, Report())))


def test_a_list_is_no_mapping(path):
    path.write_text("[1]")
    assert "it begins with '[1]'" in mistake(lambda: list(parse_entries(path, Report())))


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_another_encoding_is_a_mistake_that_names_the_byte(path, chunk):
    message = mistake(lambda: parse(path, b'[{"a": "b\xe9"}]', chunk))
    assert message == f"{path} is not UTF-8 text (invalid continuation byte at byte 9): convert it first"
    assert "at byte 0" in mistake(lambda: parse(path, '[{"a": 1}]'.encode("utf-16"), chunk))
    assert "unexpected end of data" in mistake(lambda: parse(path, b'[{"a": 1}]\xf0\x9f', chunk))


def test_what_cannot_be_opened_is_a_mistake(path):
    assert f"{path} cannot be read (No such file" in mistake(lambda: list(parse_elements(path, Report())))
    path.mkdir()
    assert f"{path} cannot be read (Is a directory)" in mistake(lambda: list(parse_entries(path, Report())))


def test_damaged_entities_are_counted_as_such(path):
    path.write_text('[{"a": 1}, {"a" 2}, {"a": 3}]')
    report = Report()
    assert len(list(parse_elements(path, report, skip_entity))) == 2
    assert (report.read, report.entities_read, len(report.entities_skipped)) == (0, 1, 1)


def test_a_file_may_be_left_in_the_middle(path):
    path.write_text('[{"a": 1}, {"a": ')
    assert next(parse_elements(path, Report())) == (0, {"a": 1})


@given(text=st.text(st.sampled_from(list("[](){}'\":, \n\\a1\0")), max_size=40), chunk=st.integers(1, 9))
@settings(quick, max_examples=300)
def test_any_text_gives_the_same_whatever_the_chunk(tmp_path_factory, text, chunk):
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    try:
        expected = parse(path, text)
    except M3ELError as error:
        assert mistake(lambda: parse(path, text, chunk)) == str(error)
    else:
        assert parse(path, text, chunk) == expected


def lines_of(form: str, rows: int) -> Iterator[str]:
    dump: Callable[[Any], str] = repr if form == "literal" else json.dumps
    for number in range(rows):
        row = {"id": number, "sentence": "it's é " * 100, "candidates": [{"name": "n" * 200}] * 3}
        yield ("[" if number == 0 else ", ") + dump(row) + ("]" if number == rows - 1 else "")


@pytest.mark.parametrize(("form", "rows"), [("list", 13_000), ("literal", 3_000)])
def test_memory_does_not_grow_with_the_file(path, form, rows):
    with path.open("w") as file:
        file.writelines(lines_of(form, rows))
    size = path.stat().st_size
    assert size > (20e6 if form == "list" else 4e6)
    tracemalloc.start()
    try:
        found = sum(1 for _ in parse_elements(path, Report()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == rows
    assert peak < 8e6  # the whole file takes more than its size, and as a literal two hundred times that


def test_a_row_with_an_optional_key_is_found_after_a_damaged_one(tmp_path):
    rows = [
        json.dumps({"Qid": f"Q{k}", "name": f"n{k}"} | ({"difficulty": "hard"} if k == 2 else {})) for k in range(6)
    ]
    rows[1] = rows[1].replace('"n1"', '"n1')
    (tmp_path / "rows.json").write_text(f"[{', '.join(rows)}]")
    report = Report()
    assert [row["Qid"] for _, row in parse_elements(tmp_path / "rows.json", report)] == ["Q0", "Q2", "Q3", "Q4", "Q5"]
    assert len(report.skipped) == report.read == 1
