from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m3el_hf.data.collection import Piece, RowPlan, Spool, collect
from m3el_hf.data.images import PictureStore
from m3el_hf.data.rows import PROTOCOLS, REMOVED, SAME_FILE, RowMaker, check_protocol
from m3el_hf.data.schema import MENTION_FEATURES, NIL, ROW_FEATURES, SPLITS, Entity, Picture, Record
from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TASKS
from tests.conftest import instance, real, rows_of, write_release

quick = settings(deadline=None, max_examples=50, database=None)


def encoded(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def record(number: int = 0, *, candidates: int = 3, gold: int = 0, **changes: Any) -> Record:
    entities = tuple(
        Entity(f"Q{k}", f"name {k}", f"description {k}", Picture(data=encoded(k), url=f"u{k}"))
        for k in range(candidates)
    )
    made = Record(f"row-{number}", f"row {number}", "person", None, "mention", f"{number}", None, f"Q{gold}", entities)
    return replace(made, **changes)


class Shelf(Spool):
    """A spool of one record, and of one entity of a knowledge base."""

    def __init__(self, record: Record, entity: Entity | None = None) -> None:
        self._one, self._gold = record, entity

    def record(self, position: int) -> Record:
        return self._one

    def entity(self, position: int) -> Entity:
        assert self._gold is not None
        return self._gold


def maker_of(made: Record, gold: Entity | None = None, **options: Any) -> RowMaker:
    return RowMaker(Shelf(made, gold), PictureStore(), **options)


def made_by(maker: RowMaker, gold: bool = False) -> dict[str, Any]:
    (row,) = maker.rows(Piece("person", "train", [RowPlan(0, "group", 0 if gold else None, ())]))
    return row


def row_of(made: Record, seed: int = 0) -> dict[str, Any]:
    return made_by(maker_of(made, seed=seed))


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


def test_the_order_hangs_on_the_seed_what_is_said_and_the_qids_alone():
    def order(made: Record, seed: int) -> list[str]:
        return list(row_of(made, seed)["candidate_qids"])

    made = record(5, candidates=6)
    other = replace(made, id="moved", source="row 9", topic="books", split="test", answer_qid="Q3")
    assert order(other, 1) == order(made, 1)
    assert order(replace(made, candidates=made.candidates[::-1]), 1) == order(made, 1)  # wherever the gold was
    assert order(made, 2) != order(made, 1)
    assert order(replace(made, mention="other"), 1) != order(made, 1)
    assert order(replace(made, context="other"), 1) != order(made, 1)


def test_what_is_missing_is_null():
    bare = replace(record(), context=None, candidates=(Entity("Q0", ""), Entity("Q1", "one")))
    row = row_of(bare)
    missing = {key for key, value in row.items() if value is None}
    assert missing == {"context", "mention_image", "difficulty", "mention_image_is_gold"}
    assert row["mention_name_is_gold"] is False
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

    others = tuple(Entity(f"Q{k}", "other", None, Picture(data=encoded(1))) for k in (1, 2))
    entities = (Entity("Q0", "gold", None, picture(gold)), *others)
    row = row_of(replace(record(picture=picture(mention)), candidates=entities))
    assert row["mention_image_is_gold"] is expected


def test_the_same_file_under_two_names_is_the_same_picture(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded(7))
    made = record(picture=Picture(path=tmp_path / "a.png"))
    gold = Entity("Q0", "gold", None, Picture(path=tmp_path / "b.png"))
    assert row_of(replace(made, candidates=(gold, *made.candidates[1:])))["mention_image_is_gold"] is True


def test_urls_list_the_mention_first():
    row = row_of(record(picture=Picture(data=encoded(9), url="mention")))
    assert row["image_urls"] == ["mention", *(f"u{qid[1:]}" for qid in row["candidate_qids"])]


def test_licences_list_the_mention_first():
    row = row_of(record(picture=Picture(data=encoded(9), licence="CC BY 4.0")))
    assert row["licences"] == ["CC BY 4.0", None, None, None]


def test_an_unusable_picture_is_null_and_reported():
    maker = maker_of(record(picture=Picture(data=b"<html>", url="u")))
    row = made_by(maker)
    assert row["mention_image"] is None
    assert row["image_urls"][0] == "u"
    ((file, reason),) = maker.report.unusable_images.items()
    assert file == "u"
    assert reason.startswith("is not a picture")


@given(number=st.integers(0, 50))
@quick
def test_rows_fit_the_schema(number):
    row = row_of(record(number))
    assert set(row) == set(ROW_FEATURES)
    table = pa.Table.from_pylist([row], schema=ROW_FEATURES.arrow_schema)
    assert table.to_pylist() == [row]


@pytest.mark.parametrize(("name", "same"), [(" KANSAS ", True), ("Kansas City", False), ("", False)])
def test_a_mention_that_bears_the_golds_name_is_marked(name, same):
    made = replace(record(mention="Kansas"), candidates=(Entity("Q0", name), Entity("Q1", "Kansas")))
    assert row_of(made)["mention_name_is_gold"] is same


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_only_the_deleaked_protocol_removes_the_golds_own_picture(protocol):
    for shade, is_gold in ((0, True), (9, False)):
        maker = maker_of(record(picture=Picture(data=encoded(shade), url="u")), protocol=protocol)
        row = made_by(maker)
        removed = is_gold and protocol == "deleaked"
        assert row["mention_image_is_gold"] is is_gold
        assert row["mention_image"] == (None if removed else {"bytes": encoded(shade), "path": None})
        assert row["image_urls"][0] == (None if removed else "u")
        assert maker.report.counts[REMOVED] == removed


def test_mentions_with_the_golds_own_file_are_counted(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(7))
    gold = Entity("Q0", "gold", None, Picture(path=tmp_path / "a.png"))
    maker = maker_of(replace(record(picture=Picture(path=tmp_path / "a.png")), candidates=(gold,)))
    assert made_by(maker)["mention_image_is_gold"] is True
    assert maker.report.counts == {SAME_FILE: 1}


def test_a_protocol_is_one_of_two():
    with pytest.raises(M3ELError, match="^unknown protocol 'clean': choose one of as_released, deleaked$"):
        check_protocol("clean")


@pytest.mark.parametrize("has_gold", [True, False])
def test_a_mention_of_a_knowledge_base_has_no_candidates(has_gold):
    gold = Entity("Q5", "Mention", "a gold", Picture(data=encoded(3)))
    made = replace(record(picture=Picture(data=encoded(3))), candidates=(), answer_qid="Q5" if has_gold else NIL)
    row = made_by(maker_of(made, gold), has_gold)
    assert set(row) == set(MENTION_FEATURES)
    assert pa.Table.from_pylist([row], schema=MENTION_FEATURES.arrow_schema).num_rows == 1
    assert (row["mention_image_is_gold"], row["mention_name_is_gold"]) == ((True, True) if has_gold else (None, None))
    assert row["answer_qid"] == made.answer_qid
    assert len(row["image_urls"]) == 1


def all_rows(collection: Any, seed: int = 0) -> list[dict[str, Any]]:
    maker = RowMaker(Spool(collection.folder), PictureStore(), seed)
    return [row for split in SPLITS for piece in collection.pieces(split, size=100) for row in maker.rows(piece)]


def test_the_same_seed_gives_the_same_rows(tmp_path):
    write_release(tmp_path, [instance(number) for number in range(20)])
    first, again, other = (all_rows(collect("m3el", tmp_path, seed), seed) for seed in (3, 3, 4))
    assert first == again
    assert [row["id"] for row in first] != [row["id"] for row in other]
    orders = [{row["id"]: row["candidate_qids"] for row in rows} for rows in (first, other)]
    assert orders[0] != orders[1]
    assert orders[0].keys() == orders[1].keys()


def test_real_pictures_become_rows():
    rows = rows_of(collect("m3el", real("data/emoji")), "test")[:12]
    assert all(row["mention_image"] and all(row["candidate_images"]) for row in rows)
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
    rows = rows_of(collection, "validation") + rows_of(collection, "test")
    assert {row["mention_image"] for row in rows} == {None}
    assert all(set(row["candidate_images"]) == set(row["candidate_descriptions"]) == {None} for row in rows)
    assert all(set(row["image_urls"]) == {None} for row in rows)
    assert all(TASKS["t2t"].fits(row) and not TASKS["t2i"].fits(row) for row in rows)
    answers = Counter(row["answer"] for row in rows)
    assert all(abs(answers[place] - len(rows) / 3) < 5 * np.sqrt(len(rows) * 2 / 9) for place in range(3))
