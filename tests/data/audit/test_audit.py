"""Folders with planted defects, written by hand: the audit counts exactly these."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m3el_hf.data.audit import Audit, audit
from m3el_hf.data.audit import scan as audit_scan
from m3el_hf.data.audit.measures import positions, repeats, several, within
from m3el_hf.data.manifest import Manifest, save_unusable_images
from m3el_hf.data.rows import SAME_FILE
from m3el_hf.data.schema import ENTITY_FEATURES, MENTION_FEATURES, NIL, ROW_FEATURES
from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TASKS

Row = dict[str, Any]


def picture(seed: int, size: tuple[int, int] = (72, 64), kind: str = "PNG", **how: Any) -> bytes:
    """A picture of soft blots; another one for each seed, the same blots at each size and quality."""
    blots = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blots).resize(size, Image.Resampling.BICUBIC).save(buffer, kind, **how)
    return buffer.getvalue()


def image(data: bytes | None) -> Row | None:
    return None if data is None else {"bytes": data, "path": None}


def row(number: int, **changes: Any) -> Row:
    """A row that shares nothing with another: gold Q<number>0 and two distractors, five letters of a name each."""
    answer = number % 3
    order = [1, 2]
    order.insert(answer, 0)
    made = {
        "id": f"person-{number}",
        "topic": "person",
        "split_group": f"group {number}",
        "mention": f"mention {number}",
        "context": f"Sentence {number} is about it.",
        "mention_image": image(picture(10 * number + 9)),
        "answer": answer,
        "answer_qid": f"Q{number}0",
        "candidate_qids": [f"Q{number}{k}" for k in order],
        "candidate_names": [f"name {number} {k}" for k in order],
        "candidate_descriptions": [f"description {number} {k}" for k in order],
        "candidate_images": [image(picture(10 * number + k)) for k in order],
        "difficulty": None,
        "gold_position_released": 0,
        "mention_image_is_gold": False,
        "mention_name_is_gold": False,
        "image_urls": ["https://example.org/a.jpg", None, None, None],
        "licences": [None] * 4,
    }
    assert not set(changes) - set(made)
    return made | changes


def rows(start: int, stop: int, **changes: Any) -> list[Row]:
    return [row(number, **changes) for number in range(start, stop)]


def put(one: Row, column: str, value: Any, place: int | None = None) -> None:
    """Changes one candidate of a row; the gold where no place is given."""
    one[column][one["answer"] if place is None else place] = value


def write(path: Path, features: Any, content: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(content), schema=features.arrow_schema), path, row_group_size=7)


def write_folder(
    folder: Path,
    splits: Mapping[str, Sequence[Row]],
    entities: Sequence[Row] | None = None,
    unusable: Mapping[str, str] | None = None,
    **manifest: Any,
) -> Path:
    """Writes a built folder of rows by split; the entities, where none are given, are those of the rows."""
    knowledge_base = manifest.get("kind") == "knowledge_base"
    for split, content in splits.items():
        file = f"{split}-00000-of-00001.parquet"
        if knowledge_base:
            write(folder / "mentions" / file, MENTION_FEATURES, content)
        else:
            for topic in {one["topic"] for one in content}:
                write(folder / "data" / topic / file, ROW_FEATURES, [one for one in content if one["topic"] == topic])
    if entities is None:
        entities = list(
            {one["qid"]: one for content in splits.values() for each in content for one in shown(each)}.values()
        )
    write(folder / "entities" / "train-00000-of-00001.parquet", ENTITY_FEATURES, entities)
    counts = {split: len(content) for split, content in splits.items()}
    values = {
        "title": "A set",
        "license_id": "unknown",
        "reader": "m3el",
        "kind": "candidates",
        "protocol": "as_released",
        "seed": 0,
        "short_side": 256,
        "source": "raw",
        "released_splits": False,
        "rows": {"person": counts},
        "entities": len(entities),
        "revision": "abc",
        "read": sum(counts.values()),
        "unusable_image_count": len(unusable or {}),
    }
    save_unusable_images(folder, unusable or {})
    Manifest(**{**values, **manifest}).save(folder)
    return folder


def shown(one: Row) -> list[Row]:
    columns = [one[f"candidate_{name}"] for name in ("qids", "names", "descriptions", "images")]
    return [
        dict(zip(("qid", "name", "description", "image"), values, strict=True)) for values in zip(*columns, strict=True)
    ]


def audited(
    folder: Path, splits: Mapping[str, Sequence[Row]], entities: Sequence[Row] | None = None, **manifest: Any
) -> Audit:
    return audit(write_folder(folder, splits, entities, **manifest), progress=False)


def counts(found: Audit, *keys: str) -> list[float]:
    return [found.fact(key).counts["all"] for key in keys]


def sentences(found: Audit, level: int) -> str:
    return "\n".join(one.text for one in found.findings if one.level == level)


LEAKS = ("group", "gold", "distractor_gold", "candidate", "sentence", "picture", "sentence_picture", "whole")


def test_a_clean_set_has_no_findings_but_its_licences_and_released_order(tmp_path):
    found = audited(tmp_path, {"train": rows(0, 36), "validation": rows(36, 42), "test": rows(42, 48)})
    assert [one.text.split(" in ")[0] for one in found.findings if one.level == 3] == []
    assert [one.text for one in found.findings if one.level == 2] == [
        "No licence is stated for all 192 pictures in rows: look each up before you redistribute it."
    ]
    assert "comes first in all 48 rows; here, shuffled, in 33.3 %" in sentences(found, 1)
    for leak in LEAKS:
        assert not any(found.fact(f"leak_{leak}").counts.values())
    assert counts(found, "rows", "golds", "entities", "distractors_only") == [48, 48, 144, 96]
    assert counts(found, *(f"task_{task}" for task in TASKS)) == [48] * 9
    assert found.fact("rows").counts == {"all": 48, "train": 36, "validation": 6, "test": 6}
    assert counts(found, "groups", "same_file", "same_bytes", "distinct_pictures", "least_side") == [48, 0, 0, 192, 64]
    assert {"wrong answers", "sentences in several splits", "mention pictures that are the gold's"} <= set(found.clean)


def test_same_and_near_same_pictures_are_told_from_likeness(tmp_path):
    train = rows(0, 20)
    for one in train[:2]:
        put(one, "candidate_images", one["mention_image"])
        one["mention_image_is_gold"] = True
    put(train[2], "candidate_images", image(picture(29, kind="JPEG", quality=40)))
    put(train[3], "candidate_images", image(picture(39, (144, 128))))
    put(train[4], "candidate_images", image(picture(49, (36, 32), "JPEG", quality=75)))
    wrong = (train[5]["answer"] + 1) % 3
    put(train[5], "candidate_images", image(picture(59, kind="JPEG", quality=60)), wrong)
    train[6]["mention_image"], train[6]["mention_image_is_gold"] = None, None
    found = audited(tmp_path, {"train": train}, counts={SAME_FILE: 2})
    assert counts(found, "same_file", "image_is_gold", "same_bytes", "near", "near_only", "near_control") == [
        2, 2, 2, 5, 3, 1,
    ]  # fmt: skip
    assert found.fact("near").of["all"] == 19
    assert found.fact("near_control").of["all"] == 38
    assert "byte for byte, in 2 of 19 rows with both pictures (10.5 %)" in sentences(found, 3)
    nearest = found.galleries[0]
    assert [case.facts["distance"] for case in nearest.cases[:2]] == ["same bytes"] * 2
    assert {case.facts["id"] for case in nearest.cases[2:5]} == {"person-2", "person-3", "person-4"}
    assert len(nearest.cases) == 12


def test_pictures_without_structure_have_no_hash_but_can_be_the_same(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    train = rows(0, 4)
    train[0]["mention_image"] = image(buffer.getvalue())
    train[1]["mention_image"] = image(buffer.getvalue())
    put(train[1], "candidate_images", image(buffer.getvalue()))
    found = audited(tmp_path, {"train": train})
    assert counts(found, "unhashed", "near", "same_bytes") == [1, 1, 1]
    assert found.fact("near").of["all"] == 3


def test_splits_that_share_something_are_counted_each_for_itself(tmp_path):
    train, validation, test = rows(0, 30), rows(30, 34), rows(40, 50)
    test[0]["context"], test[1]["context"] = train[0]["context"], train[1]["context"]
    test[1]["mention_image"] = train[1]["mention_image"]
    test[2]["mention_image"] = train[5]["mention_image"]
    test[3]["answer_qid"] = test[3]["candidate_qids"][test[3]["answer"]] = train[7]["answer_qid"]
    put(test[4], "candidate_qids", train[8]["candidate_qids"][(train[8]["answer"] + 1) % 3])
    test[4]["answer_qid"] = test[4]["candidate_qids"][test[4]["answer"]]
    put(test[5], "candidate_qids", train[9]["answer_qid"], (test[5]["answer"] + 1) % 3)
    test[6] |= {name: train[10][name] for name in ("mention", "context", "answer_qid", "candidate_qids", "answer")}
    test[7]["split_group"] = train[11]["split_group"]
    validation[0]["context"] = test[8]["context"]
    found = audited(tmp_path, {"train": train, "validation": validation, "test": test})
    leaks = {name: found.fact(f"leak_{name}").counts for name in LEAKS}
    assert {name: shared["test / train"] for name, shared in leaks.items()} == {
        "group": 1, "gold": 2, "distractor_gold": 1, "candidate": 4,
        "sentence": 3, "picture": 2, "sentence_picture": 1, "whole": 1,
    }  # fmt: skip
    assert {name: shared["test / validation"] for name, shared in leaks.items() if shared["test / validation"]} == {
        "sentence": 1
    }
    assert not any(shared["validation / train"] for shared in leaks.values())
    assert "in a row of another split: 1 of 10 test rows (10.0 %) with train." in sentences(found, 3)
    assert "Split groups" in sentences(found, 2)


def test_released_splits_may_share_groups(tmp_path):
    train, test = rows(0, 5), rows(5, 8)
    test[0]["split_group"] = train[0]["split_group"]
    found = audited(tmp_path, {"train": train, "test": test}, released_splits=True)
    assert "Split groups" in sentences(found, 1)


def test_names_that_decide_mislead_or_do_neither(tmp_path):
    train = rows(0, 10)
    put(train[0], "candidate_names", f" {train[0]['mention'].upper()} ")
    put(train[1], "candidate_names", train[1]["mention"])
    put(train[2], "candidate_names", train[2]["mention"], (train[2]["answer"] + 1) % 3)
    for place in (0, 1):
        put(train[3], "candidate_names", train[3]["mention"], place)
    train[4]["mention"] = ""
    put(train[4], "candidate_names", None)
    train[0]["mention_name_is_gold"] = train[1]["mention_name_is_gold"] = True
    found = audited(tmp_path, {"train": train})
    keys = ("name_is_gold", "name_decides", "name_misleads", "names_several", "names_none")
    assert counts(found, *keys) == [2, 2, 1, 1, 5]
    assert found.fact("name_decides").of["all"] == 9
    misleading = next(gallery for gallery in found.galleries if gallery.title == "Names that mislead")
    assert [case.facts["id"] for case in misleading.cases] == ["person-2"]
    assert len(misleading.cases[0].shown) == 3


def test_duplicates_and_contradictions(tmp_path):
    train, test = rows(0, 12), rows(12, 16)
    same = ("mention", "context")
    train[1] |= {name: train[0][name] for name in (*same, "mention_image", "answer_qid", "candidate_qids", "answer")}
    train[3] |= {name: train[2][name] for name in same}  # another answer, another picture
    train[5] |= {name: train[4][name] for name in (*same, "mention_image")}  # another answer, the same picture
    train[7]["mention_image"] = train[6]["mention_image"]
    test[0]["id"] = train[8]["id"]
    train[9]["context"] = train[10]["context"] = None  # nothing is known of these
    train[9]["mention"] = train[10]["mention"]
    found = audited(tmp_path, {"train": train, "test": test})
    keys = ("repeated_rows", "contradictions", "hopeless", "shared_pictures", "repeated_ids")
    assert counts(found, *keys) == [1, 4, 2, 4, 1]
    assert found.fact("repeated_ids").counts["test"] == 1  # the first is in train
    titles = {gallery.title: gallery for gallery in found.galleries}
    assert len(titles["One mention and sentence, several answers"].cases) == 2
    assert len(titles["One mention picture, several answers"].cases) == 2


def test_entities_that_are_doubled(tmp_path):
    train = rows(0, 8)
    for one in train[1:3]:  # Q00 stands in three rows, under two names and three descriptions
        put(one, "candidate_qids", "Q00", (one["answer"] + 1) % 3)
        put(one, "candidate_names", "name 0 0", (one["answer"] + 1) % 3)
    put(train[2], "candidate_names", "another name", (train[2]["answer"] + 1) % 3)
    put(train[4], "candidate_images", train[3]["candidate_images"][train[3]["answer"]])
    found = audited(tmp_path, {"train": train})
    assert counts(found, "several_names", "several_descriptions", "entity_pictures_shared") == [1, 1, 2]
    shared = next(gallery for gallery in found.galleries if gallery.title == "One picture, several entities")
    assert shared.cases[0].facts == {"entities": "name 3 0 (Q30); name 4 0 (Q40)"}


def test_what_is_missing_and_which_tasks_are_left(tmp_path):
    train, test = rows(0, 6), rows(6, 9)
    train[0]["mention"], train[1]["context"], train[2]["mention_image"] = " ", None, None
    put(train[3], "candidate_names", None)
    put(train[4], "candidate_images", None)
    put(test[0], "candidate_descriptions", None)
    found = audited(tmp_path, {"train": train, "test": test})
    keys = ("no_mention", "no_context", "no_picture")
    assert counts(found, *keys, "no_candidate_name", "no_candidate_description", "no_candidate_picture") == [1] * 6
    assert found.fact("no_candidate_name").of == {"all": 27, "train": 18, "test": 9}
    complete = {task: found.fact(f"task_{task}").counts["train"] for task in TASKS}
    assert complete == {
        "t2t": 4, "t2i": 4, "t2it": 3, "i2t": 4, "i2i": 4, "i2it": 3, "it2t": 3, "it2i": 3, "it2it": 2,
    }  # fmt: skip


def test_the_tasks_are_those_that_the_tasks_themselves_call_complete(tmp_path):
    train = rows(0, 12)
    for number, one in enumerate(train):
        one["mention"] = one["mention"] if number % 2 else None
        one["mention_image"] = one["mention_image"] if number % 3 else None
        put(one, "candidate_names", one["candidate_names"][0] if number % 5 else None, 0)
        put(one, "candidate_images", one["candidate_images"][0] if number % 4 else None, 0)
    found = audited(tmp_path, {"train": train})
    for name, task in TASKS.items():
        assert counts(found, f"task_{name}") == [sum(task.fits(one) for one in train)]


def test_candidates_and_the_place_of_the_gold(tmp_path):
    train = rows(0, 9)
    train[0] |= {name: train[0][name][:1] for name in train[0] if name.startswith("candidate_")}
    train[0]["answer"] = 0
    train[1] |= {name: train[1][name][:2] for name in train[1] if name.startswith("candidate_")}
    train[2]["answer"] = (train[2]["answer"] + 1) % 3
    train[8]["answer"] = 3
    train[4]["candidate_qids"][(train[4]["answer"] + 1) % 3] = train[4]["answer_qid"]
    train[5]["gold_position_released"] = 2
    found = audited(tmp_path, {"train": train})
    assert counts(found, "single_candidate", "answer_wrong", "candidate_twice", "first_released") == [1, 2, 1, 8]
    assert counts(found, "least_candidates", "median_candidates", "most_candidates") == [1, 3, 3]
    assert counts(found, "candidates_1", "candidates_2", "candidates_3") == [1, 1, 7]
    assert counts(found, "first_by_chance") == [pytest.approx(1 + 1 / 2 + 7 / 3)]
    assert "does not lead to the gold in 2 of 9 rows" in sentences(found, 3)
    position = next(chart for chart in found.charts if chart.key == "position")
    assert position.series["in the source"] == [88.889, 0.0, 11.111]


def test_a_set_that_was_not_shuffled_is_called_out(tmp_path):
    train = rows(0, 40)
    for one in train:
        for name in [name for name in one if name.startswith("candidate_")]:
            one[name].insert(0, one[name].pop(one["answer"]))
        one["answer"] = 0
    assert "ties must not go to the first" in sentences(audited(tmp_path, {"train": train}), 3)


def test_a_gold_that_is_first_now_and_then_among_many_is_no_finding(tmp_path):
    train = []
    for number in range(30):
        qids = [f"Q{number}-{place}" for place in range(100)]
        columns = {"qids": qids, "names": qids, "descriptions": qids, "images": [None] * 100}
        columns = {f"candidate_{name}": values for name, values in columns.items()}
        train.append(row(number, answer=number, answer_qid=qids[number], **columns))
    assert "comes first" not in sentences(audited(tmp_path, {"train": train}), 3)


@pytest.mark.parametrize(
    ("splits", "released", "groups", "level", "text"),
    [
        (
            {"train": 4},
            False,
            1,
            3,
            "no validation and no test split: all rows hang together in one group (shared golds",
        ),
        ({"train": 3, "test": 1}, False, 2, 3, "no validation split: all rows hang together in 2 groups (shared golds"),
        ({"train": 4}, False, 4, 3, "There is no validation and no test split."),
        ({"train": 2, "validation": 2}, True, 4, 2, "There is no test split: the source's own splits have none."),
        ({"train": 1}, False, 1, 3, "all rows hang together in one group"),
    ],
)
def test_a_split_without_rows_is_a_finding(tmp_path, splits, released, groups, level, text):
    content, start = {}, 0
    for name, size in splits.items():
        content[name] = [row(number, split_group=f"group {number % groups}") for number in range(start, start + size)]
        start += size
    assert text in sentences(audited(tmp_path, content, released_splits=released), level)


def test_the_sentences_read_right_for_a_single_row(tmp_path):
    train = rows(0, 1, mention_image=None, context=None, candidate_names=["a"] * 3)
    text = sentences(audited(tmp_path, {"train": train}), 1)
    assert "The mention has no picture in 1 of 1 rows (100 %)." in text
    assert "The mention has no sentence in 1 of 1 rows (100 %)." in text
    assert "all 1 " not in text


def test_generated_pictures_lie_in_no_files(tmp_path):
    with pytest.raises(KeyError):
        audited(tmp_path, {"train": rows(0, 2)}, source=None).fact("same_file")


def test_what_the_build_reported(tmp_path):
    broken = {f"M3EL/{number}.jpg": f"cannot be decoded (truncated at byte {number})" for number in range(5)}
    skipped = [f"person.json row {number}: no Qid" for number in range(23)]
    found = audited(
        tmp_path, {"train": rows(0, 4)}, read=30, skipped=skipped,
        unusable=broken | {"a.png": "is missing"}, counts={"something else": 3},
    )  # fmt: skip
    keys = ("read", "skipped", "rows_lost", "unusable_images", "counted: something else")
    assert counts(found, *keys) == [30, 23, 3, 6, 3]
    instances, pictures = found.listings
    assert (len(instances.lines), instances.more, instances.lines[0]) == (20, 3, "person.json row 0: no Qid")
    assert pictures.lines == [
        "5 × cannot be decoded (truncated at byte N): M3EL/0.jpg, M3EL/1.jpg, M3EL/2.jpg and 2 more",
        "1 × is missing: a.png",
    ]
    assert "The folder is not what was built: 3 of 30 instances (10.0 %)" in sentences(found, 3)


def test_deleaked_sets_say_how_many_pictures_were_removed(tmp_path):
    train = rows(0, 5)
    train[0]["mention_image"], train[0]["mention_image_is_gold"] = None, True
    found = audited(tmp_path, {"train": train}, protocol="deleaked")
    assert "byte for byte, in 1 of 5 rows with both pictures (20.0 %); the build removed it." in sentences(found, 1)
    assert counts(found, "same_bytes") == [0]


def test_a_stored_picture_that_cannot_be_decoded_stops_nothing(tmp_path):
    train = rows(0, 3)
    train[0]["mention_image"] = image(b"<html>")
    put(train[1], "candidate_images", image(picture(19)[:80]))
    found = audited(tmp_path, {"train": train})
    assert counts(found, "undecodable", "distinct_pictures") == [2, 12]
    assert found.fact("near").of["all"] == 1
    assert "2 of 12 distinct pictures (16.7 %) of this folder cannot be decoded." in sentences(found, 3)
    lines = " ".join(found.listings[0].lines)
    assert "mention of person-0" in lines and "entity Q10" in lines  # entities are read first


def test_licences_and_addresses_count_the_pictures_that_rows_show(tmp_path):
    train = rows(0, 3)
    train[0]["licences"] = ["CC BY 4.0", None, "CC0", "CC BY 4.0"]
    train[1]["licences"], train[2]["image_urls"] = None, None
    train[2]["mention_image"] = None
    found = audited(tmp_path, {"train": train})
    assert counts(found, "licence: CC BY 4.0", "licence: CC0", "unstated", "urls") == [2, 1, 8, 2]
    assert found.fact("unstated").of["all"] == 11


def test_odd_texts(tmp_path):
    train = rows(0, 6)
    train[1]["mention"], train[2]["mention"] = "a\x07b", "x" * 101
    train[3]["context"], train[4]["context"], train[5]["context"] = "safe\u202dgnp.exe", "two\nlines\t😀 é", "y" * 101
    found = audited(tmp_path, {"train": train})
    assert found.fact("long_names").counts == {"mention": 1, "entity name": 0}
    assert found.fact("control_characters").counts == {
        "mention": 1, "context": 1, "entity name": 0, "entity description": 0,
    }  # fmt: skip


def knowledge_base(count: int = 12) -> list[Row]:
    return [
        {"qid": f"Q{number}", "name": f"Name {number}", "description": None, "image": image(picture(1000 + number))}
        for number in range(count)
    ]


def mention(number: int, **changes: Any) -> Row:
    made = {name: value for name, value in row(number).items() if name in MENTION_FEATURES}
    return made | {"topic": None, "answer_qid": f"Q{number}", "image_urls": [None], "licences": [None]} | changes


def test_a_set_with_a_knowledge_base(tmp_path):
    entities = knowledge_base()
    train, test = [mention(number) for number in range(8)], [mention(number) for number in range(8, 12)]
    train[0]["answer_qid"], train[1]["answer_qid"], test[0]["answer_qid"] = NIL, NIL, NIL
    test[1]["answer_qid"] = "Q999"
    train[2]["mention_image"] = entities[2]["image"]
    train[3]["mention_image"] = image(picture(1003, kind="JPEG", quality=50))
    train[4]["mention"] = "name 4"
    train[5]["mention"] = "name 6"
    entities[7]["name"] = "Name 8"
    test[2]["mention"] = "NAME 8"
    test[3]["answer_qid"] = "Q7"
    entities[9]["image"] = entities[8]["image"]
    manifest = {
        "kind": "knowledge_base",
        "released_splits": True,
        "entities_read": 13,
        "entities_skipped": ["row 3: none"],
    }
    found = audited(tmp_path, {"train": train, "test": test}, entities, **manifest)
    assert counts(found, "nil", "gold_absent", "entities", "golds") == [3, 1, 12, 8]
    assert counts(found, "same_bytes", "near", "near_only", "near_control") == [1, 2, 1, 0]
    assert counts(found, "name_decides", "name_misleads", "names_several") == [1, 1, 1]
    assert counts(found, "entity_pictures_shared", "no_candidate_description", "entities_skipped") == [2, 12, 1]
    assert found.fact("leak_gold").counts == {"test / train": 1}
    assert found.fact("leak_gold").of == {"test / train": 3}  # NIL is no gold
    assert found.fact("rows_mentions").counts["all"] == 12
    assert found.fact("task_t2t").counts["all"] == 8
    assert {chart.key for chart in found.charts} == {"rows", "distance"}
    with pytest.raises(KeyError):
        found.fact("first_built")


def test_the_control_of_a_knowledge_base_pairs_no_mention_with_its_own_gold(tmp_path):
    entities = knowledge_base(3)
    train = [mention(number, answer_qid="Q0", mention_image=entities[0]["image"]) for number in range(3)]
    train += [mention(3, answer_qid="Q1", mention_image=entities[2]["image"]), mention(4, answer_qid="Q2")]
    found = audited(tmp_path, {"train": train}, entities, kind="knowledge_base")
    assert counts(found, "same_bytes", "near_control") == [3, 1]
    assert found.fact("near_control").of["all"] == 3  # the third, fourth and fifth row


def test_a_rare_flaw_counts_less_and_a_wrong_answer_does_not(tmp_path):
    train = rows(0, 150, mention_image=None, candidate_images=[None] * 3)
    train[1] |= {name: train[0][name] for name in ("mention", "context", "answer_qid", "candidate_qids", "answer")}
    train[2]["answer"] = (train[2]["answer"] + 1) % 3
    found = audited(tmp_path, {"train": train})
    assert "is repeated in 1 of 150 rows (0.7 %)." in sentences(found, 1)
    assert "does not lead to the gold in 1 of 150 rows (0.7 %)" in sentences(found, 3)


def test_a_pair_of_pictures_that_many_rows_show_is_shown_once(tmp_path):
    train = rows(0, 4)
    for one in train[:3]:
        one["mention_image"] = image(picture(5))
        put(one, "candidate_images", one["mention_image"])
    found = audited(tmp_path, {"train": train})
    assert counts(found, "same_bytes") == [3]
    assert [case.facts["id"] for case in found.galleries[0].cases] == ["person-0", "person-3"]


def test_every_picture_is_decoded_once(tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        audit_scan, "decode_image", lambda data, decode=audit_scan.decode_image: decoded.append(data) or decode(data)
    )
    train = rows(0, 60)
    for one in train:
        one["candidate_images"] = train[0]["candidate_images"]
    audited(tmp_path, {"train": train})
    assert len(decoded) == len(set(decoded)) == 63


PEAK = """
import re, sys
from pathlib import Path
from m3el_hf.data.audit.scan import Scan

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

Scan(Path(sys.argv[1]), progress=False)  # what the libraries need is not of interest
before = peak()
scan = Scan(Path(sys.argv[2]), progress=False)
print(len(scan.candidates["qid"]), round(scan.pictures.size_of_all / 1e6), round(peak() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_pictures_that_rows_share_lie_in_memory_once_and_of_one_row_group_at_a_time(tmp_path):
    small, large = (write_folder(tmp_path / name, {"train": rows(0, 2)}) for name in ("small", "large"))
    names = ["candidate_qids", "candidate_names", "candidate_descriptions"]
    table = pa.Table.from_pylist(
        [row(number) | {name: ["x"] * 100 for name in names} for number in range(2)], ROW_FEATURES.arrow_schema
    )
    numbers, place = pa.array(np.arange(200) % 10, pa.int32()), table.column_names.index("candidate_images")
    writer = None
    for group in range(24):  # of 2 rows with 100 candidates each, which share 10 pictures of 400 kB
        pictures = pa.array([bytes([group, number]) * 200_000 for number in range(10)], pa.binary())
        stored = pa.DictionaryArray.from_arrays(numbers, pictures)
        images = pa.StructArray.from_arrays([stored, pa.nulls(200, pa.string())], ["bytes", "path"])
        table = table.set_column(place, "candidate_images", pa.ListArray.from_arrays([0, 100, 200], images))
        writer = writer or pq.ParquetWriter(
            next(large.glob("data/*/*")), table.schema, compression="none", store_schema=False,
            dictionary_pagesize_limit=1 << 26,
        )  # fmt: skip
        writer.write_table(table)
    writer.close()
    found = subprocess.run([sys.executable, "-c", PEAK, small, large], capture_output=True, text=True, check=True)
    candidates, size, grown = map(int, found.stdout.split())
    assert (candidates, size // 10) == (4800, 192)  # MB, of all pictures together
    assert grown < 90  # MB; all distinct pictures have 96, those of the rows of one group 80


def test_a_folder_that_was_not_built_says_so(tmp_path):
    with pytest.raises(M3ELError, match="build it first with m3el-hf data build"):
        audit(tmp_path / "nowhere", progress=False)
    (tmp_path / "person.json").write_text("[]")
    with pytest.raises(M3ELError, match="build it first with m3el-hf data build"):
        audit(tmp_path, progress=False)


def break_columns(folder: Path) -> None:
    path = folder / "data" / "person" / "train-00000-of-00001.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["mention_name_is_gold"]), path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (break_columns, "lacks the columns mention_name_is_gold: build the dataset again"),
        (
            lambda folder: next(folder.glob("data/*/*")).write_bytes(b"PAR1 no"),
            "cannot be read .*: build the dataset again",
        ),
        (lambda folder: next(folder.glob("data/*/*")).unlink(), "holds no data: build the dataset again"),
        (lambda folder: next(folder.glob("entities/*")).unlink(), "holds no entities: build the dataset again"),
        (
            lambda folder: write(next(folder.glob("data/*/*")), ROW_FEATURES, []),
            "holds no data: build the dataset again",
        ),
        (lambda folder: (folder / "manifest.json").write_text("{"), "cannot be read"),
        (
            lambda folder: next(folder.glob("data/*/*")).rename(folder / "data" / "dev-00000-of-00001.parquet"),
            "is of no split",
        ),
    ],
)
def test_a_broken_folder_gets_one_clear_line(tmp_path, harm, message):
    write_folder(tmp_path, {"train": rows(0, 2)})
    harm(tmp_path)
    with pytest.raises(M3ELError, match=message) as caught:
        audit(tmp_path, progress=False)
    assert "\n" not in str(caught.value)


small = st.lists(st.integers(0, 4), max_size=12)


@given(small)
def test_repeats_are_all_but_the_first(keys):
    assert list(repeats(np.array(keys, dtype=np.uint64))) == [key in keys[:place] for place, key in enumerate(keys)]


@given(
    small.flatmap(
        lambda keys: st.tuples(st.just(keys), st.lists(st.integers(0, 3), min_size=len(keys), max_size=len(keys)))
    )
)
def test_several_values_of_a_key(both):
    keys, values = both
    pairs = list(zip(keys, values, strict=True))
    expected = [
        bool(key and value and any(other == key and one and one != value for other, one in pairs))
        for key, value in pairs
    ]
    assert list(several(*(np.array(one, dtype=np.uint64) for one in both))) == expected


@given(small, small)
def test_within_and_positions_pass_over_what_is_missing(sought, keys):
    first, second = np.array(sought, dtype=np.uint64), np.unique(np.array(keys, dtype=np.uint64))
    assert list(within(first, second)) == [bool(one) and one in keys for one in sought]
    found = positions(second, first)
    assert [int(second[place]) if place >= 0 else 0 for place in found] == [one if one in keys else 0 for one in sought]


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["train", "test"]), st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=10
    )
)
def test_leaks_agree_with_counting_one_by_one(tmp_path_factory, chosen):
    splits: dict[str, list[Row]] = {}
    for number, (split, sentence, group) in enumerate(chosen):
        one = row(number, context=f"Sentence {sentence}.", split_group=f"group {group}", mention_image=None)
        one["candidate_images"] = [None] * 3
        splits.setdefault(split, []).append(one)
    found = audited(tmp_path_factory.mktemp("set"), splits)
    if len(splits) == 2:
        for key, column in (("sentence", "context"), ("group", "split_group")):
            there = {one[column] for one in splits["train"]}
            expected = sum(one[column] in there for one in splits["test"])
            assert found.fact(f"leak_{key}").counts == {"test / train": expected}
