from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from m3el_hf.data.readers.mimic import read_mimic, read_mimic_entities
from m3el_hf.data.schema import NIL, Entity, Picture, Record, Report
from m3el_hf.errors import M3ELError


def entity(number: int, **changes: Any) -> dict[str, Any]:
    """One entity as the cleaned sets write it."""
    return {
        "id": number,
        "qid": f"Q{number}",
        "entity_name": f"Entity%20{number}",
        "attr": f"sex: {number}",
        "image_list": [],
        "type": "entity",
    } | changes


def mention(number: int, **changes: Any) -> dict[str, Any]:
    """One mention as the cleaned sets write it."""
    return {
        "id": f"{number}-0",
        "sentence": f"Entity {number} went home.",
        "mentions": f"Entity%20{number}",
        "entities": f"Entity_{number}",
        "imgPath": "",
        "answer": f"Q{number}",
    } | changes


def write(
    folder: Path,
    mentions: list[Any] | None = None,
    entities: list[Any] | None = None,
    stem: str = "WIKIMEL",
    **splits: list[Any],
) -> Path:
    folder.mkdir(exist_ok=True)
    for split, rows in ({"test": mentions} if mentions is not None else splits or {"test": [mention(1)]}).items():
        (folder / f"{stem}_{split}.json").write_text(json.dumps(rows))
    (folder / "kb_entity.json").write_text(json.dumps(entities if entities is not None else [entity(1), entity(2)]))
    (folder / "qid2id.json").write_text('{"Q1": 0}')
    return folder


def picture(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)
    return path


def read(folder: Path) -> tuple[list[Record], Report]:
    report = Report()
    records = list(read_mimic(folder, report))
    assert report.read == len(records) + len(report.skipped)
    assert (report.entities_read, report.entities_skipped) == (0, [])
    return records, report


def read_entities(folder: Path) -> tuple[list[Entity], Report]:
    report = Report()
    entities = list(read_mimic_entities(folder, report))
    assert report.entities_read == len(entities) + len(report.entities_skipped)
    assert (report.read, report.skipped) == (0, [])
    return entities, report


def test_a_mention_becomes_a_record(tmp_path):
    (record,), report = read(write(tmp_path, train=[mention(1)], dev=[], test=[]))
    assert record == Record(
        id="WikiMEL-train-0",
        source="WIKIMEL_train.json row 0",
        topic=None,
        split="train",
        mention="Entity 1",
        context="Entity 1 went home.",
        picture=None,
        answer_qid="Q1",
        candidates=(),
    )
    assert report == Report(read=1, title="WikiMEL")


@pytest.mark.parametrize(
    ("stem", "name", "title"),
    [
        ("WIKIMEL", "WikiMEL", "WikiMEL"),
        ("RichpediaMEL", "RichpediaMEL", "RichpediaMEL"),
        ("WikiDiverse", "WikiDiverse", "WikiDiverse (cleaned for MIMIC)"),
        ("wiki_diverse", "WikiDiverse", "WikiDiverse (cleaned for MIMIC)"),
    ],
)
def test_the_file_names_say_set_and_split(tmp_path, stem, name, title):
    records, report = read(write(tmp_path, stem=stem, test=[mention(1)], dev=[mention(1)], train=[mention(2)]))
    assert [record.split for record in records] == ["train", "validation", "test"]
    assert [record.id for record in records] == [f"{name}-train-0", f"{name}-validation-0", f"{name}-test-0"]
    assert [record.source for record in records] == [f"{stem}_{split}.json row 0" for split in ("train", "dev", "test")]
    assert (report.counts, report.title) == ({}, title)


def test_a_missing_split_and_an_odd_file_are_counted(tmp_path):
    write(tmp_path)
    (tmp_path / "notes.json").write_text("{}")
    _, report = read(tmp_path)
    assert report.counts == {
        "file notes.json not read: it is not a file of WikiMEL": 1,
        "WikiMEL has no train split here: no file ends in _train.json": 1,
        "WikiMEL has no validation split here: no file ends in _dev.json": 1,
    }


def test_ids_are_unique_and_do_not_tell_the_gold_whatever_the_ids_of_the_source(tmp_path):
    records, _ = read(write(tmp_path, [mention(1), mention(1), mention(1, id=None), mention(1, id="Q1")]))
    assert [record.id for record in records] == [f"WikiMEL-test-{row}" for row in range(4)]


def test_fields_that_the_format_does_not_have_are_counted(tmp_path):
    write(tmp_path, [], [entity(1, desc="x", aliases=[]), entity(2, aliases=None)])
    write(tmp_path, None, json.loads((tmp_path / "kb_entity.json").read_text()), train=[mention(1, topic="x")], dev=[])
    _, report = read(tmp_path)
    assert report.counts == {"field 'topic' not read": 1}
    _, report = read_entities(tmp_path)
    assert report.counts == {"entity field 'aliases' not read": 2}


def test_names_are_decoded(tmp_path):
    name = "Beyonc%C3%A9%20%26%20Jay-Z%20100%%20%ZZ%FF"
    (record,), _ = read(write(tmp_path, [mention(1, mentions=name)], [entity(1, entity_name=name)]))
    ((found,), _) = read_entities(tmp_path)
    assert record.mention == found.name == "Beyoncé & Jay-Z 100% %ZZ\ufffd"


@pytest.mark.parametrize("nil", ["nil", "NIL", "Nil"])
def test_no_entity_is_kept_as_such(tmp_path, nil):
    (record,), _ = read(write(tmp_path, [mention(1, answer=nil)]))
    assert record.answer_qid == NIL


def test_a_gold_that_the_knowledge_base_lacks_is_kept(tmp_path):
    folder = write(tmp_path, [mention(1), mention(9)], [entity(1)])
    (folder / "kb_entity.json").unlink()  # the mentions are read without it
    assert [record.answer_qid for record in read(folder)[0]] == ["Q1", "Q9"]


@pytest.mark.parametrize("folder", ["mention_image", "mention_images"])
@pytest.mark.parametrize(
    ("image", "file"),
    [
        ("12.png", "12.jpg"),
        ("a/b/12.JPEG", "12.jpg"),
        ("Dr. No.v2.png", "Dr.jpg"),
        ("12", "12.jpg"),
        ("https://example.org/x.y/Photo%20A.b.png", "Photo%20A.jpg"),
    ],
)
def test_a_mention_picture_is_named_up_to_its_first_dot(tmp_path, folder, image, file):
    path = picture(tmp_path / folder / file)
    (record,), _ = read(write(tmp_path, [mention(1, imgPath=image)]))
    assert record.picture == Picture(path=path, url=image if "://" in image else None)


@pytest.mark.parametrize("image", ["", " ", None])
def test_no_picture_is_none(tmp_path, image):
    (record,), _ = read(write(tmp_path, [mention(1, imgPath=image)]))
    assert record.picture is None


def test_a_mention_picture_that_is_not_there_is_named_all_the_same(tmp_path):
    (record,), _ = read(write(tmp_path, [mention(1, imgPath="../../1.png")]))
    assert record.picture == Picture(path=tmp_path / "mention_image" / "1.jpg")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (mention(2, answer=""), "has no gold (field answer)"),
        (mention(2, answer=None), "has no gold (field answer)"),
        (mention(2, mentions="%20"), "has no mention name (field mentions)"),
        (mention(2, sentence="\ud83d"), "field sentence has an unpaired surrogate (not Unicode)"),
        (mention(2, sentence=["Entity 2"]), "field sentence is of type list, not text"),
        (mention(2, mentions=2), "field mentions is of type int, not text"),
        (mention(2, answer=float("nan")), "field answer is of type float, not text"),
        (mention(2, imgPath={"a": 1}), "field imgPath is of type dict, not text"),
        ([1], "is of type list, not an object"),
    ],
)
def test_an_unusable_mention_is_skipped_with_its_reason(tmp_path, row, reason):
    records, report = read(write(tmp_path, [mention(1), row, mention(2)]))
    assert [record.answer_qid for record in records] == ["Q1", "Q2"]
    assert report.skipped == [f"WIKIMEL_test.json row 1: {reason}"]


def test_an_entity_is_read(tmp_path):
    path = picture(tmp_path / "kb_image" / "Q1_0.JPG")
    entities, report = read_entities(write(tmp_path, entities=[entity(1, image_list=["Q1_0.JPG"]), entity(2)]))
    assert entities == [
        Entity("Q1", "Entity 1", "sex: 1", Picture(path=path)),
        Entity("Q2", "Entity 2", "sex: 2"),
    ]
    assert report == Report(entities_read=2)


def test_a_description_is_desc_or_else_attr(tmp_path):
    rows = [entity(1, desc="a band"), entity(2, desc=" "), entity(3, attr=None), entity(4, entity_name=None)]
    entities, _ = read_entities(write(tmp_path, entities=rows))
    assert [one.description for one in entities] == ["a band", "sex: 2", None, "sex: 4"]
    assert entities[3].name == ""


def test_the_first_picture_that_is_there_is_taken(tmp_path):
    outside = picture(tmp_path / "outside.jpg")
    folder = write(
        tmp_path / "set",
        entities=[
            entity(1, image_list=["lost.jpg", "b.jpg", "c.jpg"]),
            entity(2, image_list=["lost.jpg", "gone.jpg"]),
            entity(3, image_list=[str(outside), "../../outside.jpg", "link.jpg", "c.jpg"]),
            entity(4, image_list=["../../outside.jpg"]),
            entity(5, image_list=["x" * 300, "a\0b", "", None]),
            entity(6, image_list=None),
        ],
    )
    for name in "bc":
        picture(folder / "kb_image" / f"{name}.jpg")
    (folder / "kb_image" / "link.jpg").symlink_to(outside)
    entities, report = read_entities(folder)
    images = folder / "kb_image"
    assert [one.picture for one in entities] == [
        Picture(path=images / "b.jpg"),
        Picture(path=images / "lost.jpg"),
        Picture(path=images / "c.jpg"),
        Picture(path=images / "../../outside.jpg", flaw="lies outside the source's folder"),
        Picture(path=images / ("x" * 300)),
        None,
    ]
    assert report.counts == {"further pictures of entities, not stored": 2 + 1 + 3 + 1}


def test_pictures_behind_a_link_that_leads_out_are_not_opened(tmp_path):
    picture(tmp_path / "elsewhere" / "a.jpg")
    folder = write(tmp_path / "set", entities=[entity(1, image_list=["a.jpg"])])
    (folder / "kb_image").symlink_to(tmp_path / "elsewhere")
    ((found,), _) = read_entities(folder)
    assert found.picture.flaw == "lies outside the source's folder"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (entity(2, qid=""), "has no Qid (field qid)"),
        (entity(2, qid=None), "has no Qid (field qid)"),
        (entity(1, entity_name="again"), "repeats the Qid Q1"),
        (entity(2, image_list="a.jpg"), "field image_list is of type str, not a list"),
        (entity(2, image_list=0), "field image_list is of type int, not a list"),
        (entity(2, image_list=["a.jpg", 0]), "field image_list is of type int, not text"),
        (entity(2, image_list=["\ud83d"]), "field image_list has an unpaired surrogate (not Unicode)"),
        (entity(2, qid=2), "field qid is of type int, not text"),
        (entity(2, entity_name=True), "field entity_name is of type bool, not text"),
        (entity(2, desc=[]), "field desc is of type list, not text"),
        (entity(2, desc="x", attr=float("nan")), "field attr is of type float, not text"),
        ("Q2", "is of type str, not an object"),
    ],
)
def test_an_unusable_entity_is_skipped_with_its_reason(tmp_path, row, reason):
    entities, report = read_entities(write(tmp_path, entities=[entity(1), row, entity(3)]))
    assert [(one.qid, one.name) for one in entities] == [("Q1", "Entity 1"), ("Q3", "Entity 3")]
    assert report.entities_skipped == [f"kb_entity.json row 1: {reason}"]


def test_damage_in_the_middle_is_counted_where_it_is(tmp_path):
    write(tmp_path, [mention(n) for n in (1, 2, 3)], [entity(n) for n in (1, 2, 3)])
    for name in ("WIKIMEL_test.json", "kb_entity.json"):
        path = tmp_path / name
        path.write_text(path.read_text().replace('Q2"', "Q2"))
    records, report = read(tmp_path)
    assert [record.answer_qid for record in records] == ["Q1", "Q3"]
    assert [line[:45] for line in report.skipped] == ["WIKIMEL_test.json row 1: cannot be parsed (it"]
    entities, report = read_entities(tmp_path)
    assert [one.qid for one in entities] == ["Q1", "Q3"]
    assert [line[:40] for line in report.entities_skipped] == ["kb_entity.json row 1: cannot be parsed ("]


def mistake(folder: Path, read: Any = read_mimic) -> str:
    with pytest.raises(M3ELError) as caught:
        list(read(folder, Report()))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_two_sets_in_one_folder_are_a_mistake(tmp_path):
    write(write(tmp_path), stem="RichpediaMEL")
    assert mistake(tmp_path) == f"{tmp_path} holds RichpediaMEL and WikiMEL: put each into a folder of its own"


def test_one_split_twice_is_a_mistake(tmp_path):
    write(write(tmp_path, stem="WikiDiverse"), stem="wiki_diverse")
    assert mistake(tmp_path).startswith(f"{tmp_path} holds WikiDiverse_test.json and wiki_diverse_test.json")


def test_no_mentions_or_no_knowledge_base_is_a_mistake(tmp_path):
    (write(tmp_path) / "kb_entity.json").unlink()
    assert mistake(tmp_path, read_mimic_entities).startswith(f"{tmp_path} holds no kb_entity.json")
    write(tmp_path)
    (tmp_path / "WIKIMEL_test.json").unlink()
    assert mistake(tmp_path).startswith(f"{tmp_path} holds no mentions: expected kb_entity.json and")
