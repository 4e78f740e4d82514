from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3el_hf.data import collection as collection_module
from m3el_hf.data.collection import MENTIONS, Spool, collect
from m3el_hf.data.readers import READERS
from m3el_hf.data.schema import ENTITY_FEATURES, NIL, SPLITS, Entity, Picture, Reader, Record, Report
from m3el_hf.errors import M3ELError
from tests.conftest import entities_of, instance, rows_of, write_release

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
pictures = st.none() | st.builds(
    Picture,
    path=st.none() | texts.filter(lambda text: "\0" not in text).map(Path),
    data=st.none() | st.binary(max_size=20),
    url=st.none() | texts,
    licence=st.none() | texts,
    flaw=st.none() | texts,
)
entities = st.builds(Entity, qid=texts, name=texts, description=st.none() | texts, picture=pictures)


def reading(records: list[Record], knowledge_base: list[Entity] | None = None) -> Reader:
    """A raw format that has just these."""

    def read(folder: Path | None, report: Report) -> Iterator[Record]:
        report.read += len(records)
        yield from records

    if knowledge_base is None:
        return Reader("test", read)
    return Reader("test", read, lambda folder, report: iter(knowledge_base))


@given(
    candidates=st.lists(
        st.lists(entities, min_size=1, max_size=4, unique_by=lambda one: one.qid), min_size=1, max_size=9
    ),
    picture=pictures,
    batch=st.integers(1, 4),
    data=st.data(),
)
@settings(deadline=None, max_examples=40, database=None)
def test_a_spooled_record_is_the_same_record(candidates, picture, batch, data):
    records = [
        Record(f"r{k}", "row", "person", None, data.draw(texts), None, picture, own[0].qid, tuple(own), "hard")
        for k, own in enumerate(candidates)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(READERS, "test", reading(records))
        patch.setattr(collection_module, "_BATCH", batch)
        collection = collect("test", None)
        spool = Spool(collection.folder)
        found = [
            spool.record(plan.position)
            for split in SPLITS
            for piece in collection.pieces(split, size=3)
            for plan in piece.rows
        ]
    assert sorted(found, key=lambda record: record.id) == sorted(records, key=lambda record: record.id)


def test_a_knowledge_base_is_spooled_with_where_each_gold_is(monkeypatch):
    base = [Entity(f"Q{k}", f"name {k}") for k in range(40)]
    golds = ["Q3", NIL, "Q39", "Q77"]
    records = [Record(f"r{k}", "row", None, "test", "m", None, None, gold, ()) for k, gold in enumerate(golds)]
    monkeypatch.setitem(READERS, "test", reading(records, base))
    collection = collect("test", Path())
    (piece,) = collection.pieces("test", MENTIONS, size=10)
    spool = Spool(collection.folder)
    assert (collection.topics, collection.entities) == ([MENTIONS], 40)
    assert collection.base(size=15) == [range(15), range(15, 30), range(30, 40)]
    assert [spool.entity(position) for part in collection.base(size=15) for position in part] == base
    found = {spool.record(plan.position).answer_qid: plan.gold for plan in piece.rows}
    assert found == {"Q3": 3, "Q39": 39, NIL: None, "Q77": None}


def test_a_second_row_with_the_same_id_is_reported(monkeypatch):
    records = [
        Record("same", f"row {k}", "person", None, "m", None, None, f"Q{k}", (Entity(f"Q{k}", ""),)) for k in range(3)
    ]
    monkeypatch.setitem(READERS, "test", reading(records))
    collection = collect("test", None)
    assert sum(map(collection.count, SPLITS)) == 1
    assert collection.report.skipped == [f"row {k}: its id same is that of an earlier row" for k in (1, 2)]


def test_the_rows_of_a_group_stand_together(tmp_path):
    rows = [
        instance(number, images=False, Qid="Q00") | {"candidates": instance(0, images=False)["candidates"]}
        for number in range(4)
    ]
    others = [instance(number, images=False) for number in range(10, 14)]
    mixed = [row for pair in zip(rows, others, strict=True) for row in pair]
    collection = collect("m3el", write_release(tmp_path, mixed))
    for split in SPLITS:
        groups = [row["split_group"] for row in rows_of(collection, split)]
        assert len([1 for one, other in zip(groups, groups[1:], strict=False) if one != other]) == max(
            0, len(set(groups)) - 1
        )


@pytest.mark.parametrize("size", [1, 3, 100])
def test_pieces_are_cut_in_order_and_can_be_sent_to_a_process(tmp_path, size):
    collection = collect("m3el", write_release(tmp_path, [instance(number, images=False) for number in range(20)]))
    whole = [piece for split in SPLITS for piece in collection.pieces(split, size=1000)]
    cut = [piece for split in SPLITS for piece in collection.pieces(split, size=size)]
    assert all(len(piece.rows) <= size for piece in cut)
    assert sum(piece.entities for piece in cut) == collection.entities == 60
    assert collection.base(size=size) == []
    assert [row for piece in cut for row in piece.rows] == [row for piece in whole for row in piece.rows]
    assert pickle.loads(pickle.dumps(cut)) == cut


def test_the_spool_goes_with_its_collection(tmp_path):
    collection = collect("m3el", write_release(tmp_path, [instance(0, images=False)]))
    folder = collection.folder
    assert folder.is_dir()
    del collection
    assert not folder.exists()


def test_rows_are_filed_under_split_and_topic(tmp_path):
    for topic, split, size in (("books", "train", 3), ("books", "test", 2), ("movies", "train", 1)):
        name = f"{topic}_{split}.json"
        write_release(tmp_path, [instance(number, topic=topic, images=False) for number in range(size)], name)
    collection = collect("m3el", tmp_path)
    assert collection.topics == ["movies", "books"]
    for split in ("train", "validation", "test"):
        for topic in (None, "books", "movies", "sports"):
            rows = rows_of(collection, split, topic)
            assert len(rows) == collection.count(split, topic)
            assert {row["topic"] for row in rows} <= ({topic} if topic else {"books", "movies"})
    assert [collection.count("train"), collection.count("test"), collection.count("train", "books")] == [4, 2, 3]


def test_each_entity_comes_once_as_first_named(tmp_path):
    first, second = instance(0, images=False), instance(1, images=False)
    first["candidates"][1]["name"] = ""
    second["candidates"][1] = {"Qid": "Q01", "name": "late name", "description": "late"}
    second["candidates"][2] = {"Qid": "Q02", "name": "other name", "description": "other"}
    entities = entities_of(collect("m3el", write_release(tmp_path, [first, second])))
    assert sorted((one["qid"], one["name"]) for one in entities) == [
        ("Q00", "Name 0a"),
        ("Q01", "late name"),
        ("Q02", "Name 0c"),
        ("Q10", "Name 1a"),
    ]
    assert pa.Table.from_pylist(entities, schema=ENTITY_FEATURES.arrow_schema).to_pylist() == entities


def test_an_entity_is_described_where_most_of_it_is_known(tmp_path):
    first, second = instance(0), instance(1)
    first["candidates"][1] |= {"description": "", "image": ["", "", ""]}
    second["candidates"][1] = {**instance(0)["candidates"][1], "name": "later name", "description": "full"}
    entities = entities_of(collect("m3el", write_release(tmp_path, [first, second])))
    (found,) = (one for one in entities if one["qid"] == "Q01")
    assert (found["name"], found["description"]) == ("later name", "full")
    assert found["image"] is not None


@pytest.mark.parametrize("topic", ["all", "default", "entities", "t2t", "x" * 300])
def test_a_topic_never_has_the_name_of_something_else(monkeypatch, topic):
    records = [Record("r", "row", topic, "test", "m", None, None, "Q1", (Entity("Q1", ""),))]
    monkeypatch.setitem(READERS, "test", reading(records))
    assert collect("test", None).topics == [f"topic-{topic}" if len(topic) < 60 else "x" * 60]


def test_an_entity_without_any_name_has_none(tmp_path):
    one = instance(0, images=False)
    one["candidates"][1] |= {"name": "", "description": ""}
    entities = entities_of(collect("m3el", write_release(tmp_path, [one])))
    assert entities[1] == {"qid": "Q01", "name": None, "description": None, "image": None}


def test_an_entity_keeps_its_picture(tmp_path):
    write_release(tmp_path, [instance(0)])
    folder = tmp_path / "person_candidates_images" / "Name 0-Q00"
    for entity in entities_of(collect("m3el", tmp_path)):
        assert entity["image"] == {"bytes": (folder / f"{entity['qid']}.png").read_bytes(), "path": None}


def test_an_unknown_reader_is_named_beside_the_known():
    with pytest.raises(M3ELError, match="^unknown reader 'csv': choose one of m3el, mimic, melbench, .*, mini$"):
        collect("csv", Path())


def test_mini_reads_no_folder(tmp_path):
    with pytest.raises(M3ELError, match="mini is generated, it reads nothing"):
        collect("mini", tmp_path)


def test_mini_is_counted():
    assert collect("mini", None, instances=10).report.read == 10


def test_an_entity_is_described_where_its_picture_is_there(tmp_path):
    rows = [instance(number, images=False) for number in range(3)]
    for number, row in enumerate(rows):
        row["candidates"][1] = {"Qid": "Q9", "name": "nine", "image": ["", "", f"/M3EL/{number}/nine.png"]}
    folder = write_release(tmp_path / "release", rows)
    (folder / "0" / "nine.png").unlink()
    (entity,) = [one for one in entities_of(collect("m3el", folder)) if one["qid"] == "Q9"]
    assert entity["image"] is not None
