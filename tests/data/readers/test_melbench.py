from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m3el_hf.data.readers.melbench import read_melbench, read_melbench_entities
from m3el_hf.data.schema import NIL, Entity, Record, Report
from m3el_hf.errors import M3ELError


def lists(*numbers: int, **changes: Any) -> dict[str, Any]:
    """One entry of Wikidata-MEL."""
    return {
        "id": "0",
        "sentence": "They went home. ",
        "mentions": [f"mention {number}" for number in numbers],
        "entities": [f"Entity {number}" for number in numbers],
        "answer": [f"Q{number}" for number in numbers],
    } | changes


def strings(number: int, **changes: Any) -> dict[str, Any]:
    """One entry of Richpedia-MEL."""
    return lists() | {"mentions": f"mention {number}", "entities": f"Entity {number}", "answer": f"Q{number}"} | changes


def write(folder: Path, entries: dict[str, Any], name: str = "Wikidata-MEL") -> Path:
    (folder / f"{name}.json").write_text(json.dumps(entries, indent=1))
    return folder


def read(folder: Path) -> tuple[list[Record], Report]:
    report = Report()
    records = list(read_melbench(folder, report))
    assert report.read == len(records) + len(report.skipped)
    return records, report


def read_entities(folder: Path) -> list[Entity]:
    report = Report()
    entities = list(read_melbench_entities(folder, report))
    assert report == Report(entities_read=len(entities))
    return entities


def test_each_mention_becomes_a_record(tmp_path):
    records, report = read(write(tmp_path, {"7": lists(1, 2), "x": lists(3)}))
    assert records[1] == Record(
        id="Wikidata-MEL-0-1",
        source="Wikidata-MEL.json row 0 mention 1",
        topic=None,
        split=None,
        mention="mention 2",
        context="They went home.",
        picture=None,
        answer_qid="Q2",
        candidates=(),
    )
    assert [record.id for record in records] == ["Wikidata-MEL-0-0", "Wikidata-MEL-0-1", "Wikidata-MEL-1-0"]
    assert report == Report(read=3)


def test_strings_are_one_mention(tmp_path):
    ((record,), _) = read(write(tmp_path, {"Q5": strings(5)}, "Richpedia-MEL"))
    assert (record.id, record.mention, record.answer_qid) == ("Richpedia-MEL-0-0", "mention 5", "Q5")


def test_no_id_tells_the_gold(tmp_path):
    folder = write(tmp_path, {"Q50": strings(50), "Q70": strings(70)}, "Richpedia-MEL")
    records, _ = read(write(folder, {"Q60": lists(60, id="Q60")}))
    assert [record.answer_qid for record in records] == ["Q50", "Q70", "Q60"]
    assert not [record for record in records if record.answer_qid in record.id]


def test_fields_that_the_format_does_not_have_are_counted_by_entry(tmp_path):
    folder = write(tmp_path, {"1": lists(1, 2, topic="x"), "2": lists(3, url=None, topic="y")})
    _, report = read(folder)
    assert report.counts == {"field 'topic' not read": 2, "field 'url' not read": 1}
    assert len(read_entities(folder)) == 3  # whose report stays without them


def test_both_files_are_read_in_the_order_of_their_names(tmp_path):
    write(write(tmp_path, {"1": lists(1)}), {"1": strings(1)}, "Richpedia-MEL")
    (tmp_path / "Weibo-MEL.json").write_text("{}")
    records, report = read(tmp_path)
    assert [record.id for record in records] == ["Richpedia-MEL-0-0", "Wikidata-MEL-0-0"]
    assert list(report.counts) == [
        "file Weibo-MEL.json not read: its name is not Richpedia-MEL.json or Wikidata-MEL.json"
    ]


def test_entities_are_the_answers_once_each(tmp_path):
    entries = {
        "1": lists(2, 1, 2),
        "2": lists(1, 3, entities=["Another name", ""]),
        "3": lists(3, 4, 5, answer=["Q3", "nil", "Q5"], entities=["Third", "x", None]),
        "4": lists(6, 7, mentions=["", "mention 7"]),
    }
    assert read_entities(write(tmp_path, entries)) == [
        Entity("Q2", "Entity 2"),
        Entity("Q1", "Entity 1"),
        Entity("Q3", "Third"),
        Entity("Q5", ""),
        Entity("Q7", "Entity 7"),
    ]


def test_every_answer_is_an_entity_or_none(tmp_path):
    folder = write(tmp_path, {"1": lists(1, 2, answer=["nil", "Q2"])})
    records, _ = read(folder)
    assert [record.answer_qid for record in records] == [NIL, "Q2"]
    assert [one.qid for one in read_entities(folder)] == ["Q2"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (lists(), "has no mentions"),
        (lists(1, 2, answer=["Q1"]), "has 2 mentions, 2 entities and 1 answers"),
        (lists(1, 2, mentions="mention 1"), "has 1 mentions, 2 entities and 2 answers"),
        ("Q1", "is of type str, not an object"),
        (lists(1, mentions=[" "]), "mention 0: has no mention name (field mentions)"),
        (lists(1, answer=[None]), "mention 0: has no gold (field answer)"),
        (strings(1, answer=""), "mention 0: has no gold (field answer)"),
        ({"sentence": "x"}, "mention 0: has no mention name (field mentions)"),
        (lists(1, sentence="\ud83d"), "mention 0: field sentence has an unpaired surrogate (not Unicode)"),
        (lists(1, entities=["\ud83d"]), "mention 0: field entities has an unpaired surrogate (not Unicode)"),
        (lists(1, mentions=[["mention 1"]]), "mention 0: field mentions is of type list, not text"),
        (lists(1, entities=[1]), "mention 0: field entities is of type int, not text"),
        (lists(1, answer=[True]), "mention 0: field answer is of type bool, not text"),
        (strings(1, answer={"Q1": 1}), "mention 0: field answer is of type dict, not text"),
        (lists(1, sentence=float("nan")), "mention 0: field sentence is of type float, not text"),
    ],
)
def test_what_cannot_be_used_is_skipped_with_its_reason(tmp_path, entry, reason):
    folder = write(tmp_path, {"a": lists(7), "b": entry, "c": lists(8)})
    records, report = read(folder)
    assert [record.answer_qid for record in records] == ["Q7", "Q8"]
    (line,) = report.skipped
    assert line.replace(" row 1: ", " row 1 ") == f"Wikidata-MEL.json row 1 {reason}"
    assert [one.qid for one in read_entities(folder)] == ["Q7", "Q8"]


def test_one_bad_mention_costs_no_other(tmp_path):
    records, report = read(write(tmp_path, {"a": lists(1, 2, 3, mentions=["x", "", "z"])}))
    assert [record.id for record in records] == ["Wikidata-MEL-0-0", "Wikidata-MEL-0-2"]
    assert report.skipped == ["Wikidata-MEL.json row 0 mention 1: has no mention name (field mentions)"]


def test_a_key_that_comes_twice_is_skipped(tmp_path):
    first, second = json.dumps(lists(1)), json.dumps(lists(2))
    (tmp_path / "Wikidata-MEL.json").write_text(f'{{"a": {first}, "a": {second}, "\\ud83d": {first}}}')
    records, report = read(tmp_path)
    assert [record.id for record in records] == ["Wikidata-MEL-0-0", "Wikidata-MEL-2-0"]
    assert report.skipped == ["Wikidata-MEL.json row 1: repeats the key a"]


def test_damage_in_the_middle_costs_one_entry(tmp_path):
    path = write(tmp_path, {str(n): lists(n, n + 10) for n in range(3)}) / "Wikidata-MEL.json"
    path.write_text(path.read_text().replace('"Entity 1"', '"Entity "1""'))
    records, report = read(tmp_path)
    assert [record.answer_qid for record in records] == ["Q0", "Q10", "Q2", "Q12"]
    assert report.skipped[0].startswith("Wikidata-MEL.json row 1: cannot be parsed (Expecting ',' delimiter: line ")


def test_neither_file_is_a_mistake(tmp_path):
    with pytest.raises(M3ELError, match="holds no MELBench file: expected Richpedia-MEL.json or Wikidata-MEL.json"):
        read(tmp_path)
