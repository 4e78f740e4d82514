from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m3el_hf.data.rows import collect, make_row
from m3el_hf.data.schema import ENTITY_FEATURES, ROW_FEATURES, Candidate, Picture, Record, Report
from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TASKS
from tests.conftest import instance, real, write_release

quick = settings(deadline=None, max_examples=50, database=None)


def encoded(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def record(number: int = 0, *, candidates: int = 3, gold: int = 0, **changes: Any) -> Record:
    entities = tuple(
        Candidate(f"Q{k}", f"name {k}", f"description {k}", Picture(data=encoded(k), url=f"u{k}"))
        for k in range(candidates)
    )
    made = Record(f"row-{number}", f"row {number}", "person", None, "mention", None, None, f"Q{gold}", entities)
    return replace(made, **changes)


def row_of(made: Record, seed: int = 0) -> dict[str, Any]:
    return make_row(made, "group", seed, Report())


@given(candidates=st.integers(1, 7), data=st.data(), seed=st.integers(0, 99), number=st.integers(0, 99))
@quick
def test_candidates_are_shuffled_with_all_that_belongs_to_them(candidates, data, seed, number):
    gold = data.draw(st.integers(0, candidates - 1))
    row = row_of(record(number, candidates=candidates, gold=gold), seed)
    released = [int(qid.removeprefix("Q")) for qid in row["candidate_qids"]]
    assert sorted(released) == list(range(candidates))
    assert row["candidate_names"] == [f"name {k}" for k in released]
    assert row["candidate_descriptions"] == [f"description {k}" for k in released]
    assert row["candidate_images"] == [{"bytes": encoded(k), "path": None} for k in released]
    assert row["image_urls"] == [None, *(f"u{k}" for k in released)]
    assert row["candidate_qids"][row["answer"]] == row["answer_qid"] == f"Q{gold}"
    assert row["gold_position_released"] == gold


def test_the_gold_stands_anywhere():
    places = Counter(row_of(record(number))["answer"] for number in range(3000))
    assert set(places) == {0, 1, 2}
    assert all(abs(count - 1000) < 130 for count in places.values())  # five standard deviations


def test_every_order_occurs():
    assert len({tuple(row_of(record(number))["candidate_qids"]) for number in range(100)}) == 6


def test_the_order_hangs_on_the_seed_and_the_id_alone():
    def order(made: Record, seed: int) -> list[int]:
        return [[one.qid for one in made.candidates].index(qid) for qid in row_of(made, seed)["candidate_qids"]]

    other = replace(
        record(5, candidates=6),
        topic="books",
        split="test",
        mention="other",
        context="other",
        candidates=tuple(Candidate(f"E{k}", "x") for k in range(6)),
        answer_qid="E3",
    )
    assert order(other, 1) == order(record(5, candidates=6), 1)
    assert order(record(5, candidates=6), 2) != order(record(5, candidates=6), 1)
    assert order(record(6, candidates=6), 1) != order(record(5, candidates=6), 1)


def test_what_is_missing_is_null():
    bare = replace(record(), candidates=(Candidate("Q0", ""), Candidate("Q1", "one")))
    row = row_of(bare)
    missing = {key for key, value in row.items() if value is None}
    assert missing == {"context", "mention_image", "difficulty", "mention_image_is_gold"}
    assert sorted(row["candidate_names"], key=str) == [None, "one"]
    for column in ("candidate_descriptions", "candidate_images", "licences", "image_urls"):
        assert set(row[column]) == {None}
    assert len(row["licences"]) == len(row["image_urls"]) == 3


@pytest.mark.parametrize(
    ("mention", "gold", "expected"),
    [
        (encoded(1), encoded(1), True),
        (encoded(1), encoded(2), False),
        (None, encoded(1), None),
        (encoded(1), None, None),
    ],
)
def test_a_mention_picture_that_is_the_golds_is_marked(mention, gold, expected):
    def picture(data: bytes | None) -> Picture | None:
        return None if data is None else Picture(data=data)

    others = tuple(Candidate(f"Q{k}", "other", None, Picture(data=encoded(1))) for k in (1, 2))
    entities = (Candidate("Q0", "gold", None, picture(gold)), *others)
    row = row_of(replace(record(picture=picture(mention)), candidates=entities))
    assert row["mention_image_is_gold"] is expected


def test_the_same_file_under_two_names_is_the_same_picture(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded(7))
    made = record(picture=Picture(path=tmp_path / "a.png"))
    gold = Candidate("Q0", "gold", None, Picture(path=tmp_path / "b.png"))
    assert row_of(replace(made, candidates=(gold, *made.candidates[1:])))["mention_image_is_gold"] is True


def test_urls_list_the_mention_first():
    row = row_of(record(picture=Picture(data=encoded(9), url="mention")))
    assert row["image_urls"] == ["mention", *(f"u{qid[1:]}" for qid in row["candidate_qids"])]


def test_an_unusable_picture_is_null_and_reported():
    report = Report()
    row = make_row(record(picture=Picture(data=b"<html>", url="u")), "group", 0, report)
    assert row["mention_image"] is None
    assert row["image_urls"][0] == "u"
    ((file, reason),) = report.unusable_images.items()
    assert file == "u"
    assert reason.startswith("is not a picture")


@given(number=st.integers(0, 50))
@quick
def test_rows_fit_the_schema(number):
    row = row_of(record(number))
    assert list(row) == list(ROW_FEATURES)
    table = pa.Table.from_pylist([row], schema=ROW_FEATURES.arrow_schema)
    assert table.to_pylist() == [row]


def all_rows(collection: Any) -> list[dict[str, Any]]:
    return [row for split in ("train", "validation", "test") for row in collection.rows(split)]


def test_the_same_seed_gives_the_same_rows(tmp_path):
    write_release(tmp_path, [instance(number) for number in range(20)])
    first, again, other = (all_rows(collect("m3el", tmp_path, seed)) for seed in (3, 3, 4))
    assert first == again
    assert [row["id"] for row in first] != [row["id"] for row in other]
    orders = [{row["id"]: row["candidate_qids"] for row in rows} for rows in (first, other)]
    assert orders[0] != orders[1]
    assert orders[0].keys() == orders[1].keys()


def test_rows_are_filed_under_split_and_topic(tmp_path):
    for topic, split, size in (("books", "train", 3), ("books", "test", 2), ("movies", "train", 1)):
        name = f"{topic}_{split}.json"
        write_release(tmp_path, [instance(number, topic=topic, images=False) for number in range(size)], name)
    collection = collect("m3el", tmp_path)
    assert collection.topics == ["movies", "books"]
    for split in ("train", "validation", "test"):
        for topic in (None, "books", "movies", "sports"):
            rows = list(collection.rows(split, topic))
            assert len(rows) == collection.count(split, topic)
            assert {row["topic"] for row in rows} <= ({topic} if topic else {"books", "movies"})
    assert [collection.count("train"), collection.count("test"), collection.count("train", "books")] == [4, 2, 3]


def test_each_entity_comes_once_as_first_named(tmp_path):
    first, second = instance(0, images=False), instance(1, images=False)
    first["candidates"][1]["name"] = ""
    second["candidates"][1] = {"Qid": "Q01", "name": "late name", "description": "late"}
    second["candidates"][2] = {"Qid": "Q02", "name": "other name", "description": "other"}
    entities = list(collect("m3el", write_release(tmp_path, [first, second])).entities())
    assert [(one["qid"], one["name"]) for one in entities] == [
        ("Q00", "Name 0a"),
        ("Q01", "late name"),
        ("Q02", "Name 0c"),
        ("Q10", "Name 1a"),
    ]
    assert pa.Table.from_pylist(entities, schema=ENTITY_FEATURES.arrow_schema).to_pylist() == entities


def test_an_entity_without_any_name_has_none(tmp_path):
    one = instance(0, images=False)
    one["candidates"][1] |= {"name": "", "description": ""}
    entities = list(collect("m3el", write_release(tmp_path, [one])).entities())
    assert entities[1] == {"qid": "Q01", "name": None, "description": None, "image": None}


def test_an_entity_keeps_its_picture(tmp_path):
    write_release(tmp_path, [instance(0)])
    folder = tmp_path / "person_candidates_images" / "Name 0-Q00"
    for entity in collect("m3el", tmp_path).entities():
        assert entity["image"] == {"bytes": (folder / f"{entity['qid']}.png").read_bytes(), "path": None}


def test_an_unknown_reader_is_named_beside_the_known():
    with pytest.raises(M3ELError, match="^unknown reader 'csv': choose one of m3el, mini"):
        collect("csv", Path())


def test_mini_reads_no_folder(tmp_path):
    with pytest.raises(M3ELError, match="mini is generated, it reads nothing"):
        collect("mini", tmp_path)


def test_mini_is_counted():
    assert collect("mini", None, instances=10).report.read == 10


def test_real_pictures_become_rows():
    collection = collect("m3el", real("data/emoji"))
    rows = [row for _, row in zip(range(12), collection.rows("test"), strict=False)]
    assert collection.report.unusable_images == {}
    assert all(task.fits(row) for task in TASKS.values() for row in rows)
    assert {row["mention_image_is_gold"] for row in rows} == {False}  # another foundry drew it
    assert {row["gold_position_released"] for row in rows} == {0}
    assert len({row["answer"] for row in rows}) > 1
    for row in rows:
        for image in (row["mention_image"], *row["candidate_images"]):
            picture = Image.open(io.BytesIO(image["bytes"]))
            assert picture.mode == "RGB"
            assert np.asarray(picture).std() > 1  # something is drawn


def test_real_rows_without_pictures_are_null():
    collection = collect("m3el", real("data/person"))
    rows = list(collection.rows("validation")) + list(collection.rows("test"))
    assert {row["mention_image"] for row in rows} == {None}
    assert all(set(row["candidate_images"]) == set(row["candidate_descriptions"]) == {None} for row in rows)
    assert all(set(row["image_urls"]) == {None} for row in rows)
    assert collection.report.unusable_images == {}
    assert all(TASKS["t2t"].fits(row) and not TASKS["t2i"].fits(row) for row in rows)
    answers = Counter(row["answer"] for row in rows)
    assert all(abs(answers[place] - len(rows) / 3) < 5 * np.sqrt(len(rows) * 2 / 9) for place in range(3))
