"""The other sources, from their files to what a user loads and what the audit says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard
from PIL import Image

from m3el_hf.data.audit import audit
from m3el_hf.data.builder import load_m3el
from m3el_hf.data.readers import READERS
from m3el_hf.data.schema import ENTITY_FEATURES, MENTION_FEATURES, NIL, ROW_FEATURES, Entity, Report
from m3el_hf.data.store import build

WIKI = "https://en.wikipedia.org/wiki/"


def draw(path: Path, shade: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_mandelbrot((48, 48), (-2, -1.5, 1, 1.5), 10 + shade).convert("RGB").save(path)
    return path.name


def write_mimic(folder: Path) -> Path:
    """Ten entities; mentions 0 and 8 show their gold's picture, 8 and 9 share sentence and picture over splits."""
    folder.mkdir()
    kb = [
        {"id": k, "qid": f"Q{k}", "entity_name": f"Entity%20{k}", "desc": f"number {k}", "type": "entity"}
        | {"image_list": [draw(folder / "kb_image" / f"Q{k}.jpg", k)]}
        for k in range(10)
    ]
    (folder / "kb_entity.json").write_text(json.dumps(kb))

    def mention(number: int, answer: str, picture: int | None, sentence: str | None = None) -> dict[str, Any]:
        name = "" if picture is None else f"p{picture}.x.png"
        if picture is not None:
            draw(folder / "mention_image" / f"p{picture}.jpg", picture)
        return {
            "id": f"{number}",
            "sentence": sentence or f"Sentence {number}.",
            "mentions": f"Entity%20{number}",
            "entities": "",
            "imgPath": name,
            "answer": answer,
        }

    splits = {
        "train": [mention(0, "Q0", 0), mention(1, "Q1", 31), mention(9, "Q9", 8, "Both."), mention(2, "nil", None)],
        "dev": [mention(3, "Q3", 33), mention(4, "Q77", None)],
        "test": [mention(8, "Q8", 8, "Both."), mention(5, "Q5", 35), mention(6, "nil", None)],
    }
    for split, rows in splits.items():
        (folder / f"RichpediaMEL_{split}.json").write_text(json.dumps(rows))
    return folder


def undecoded(rows: Any) -> list[dict[str, Any]]:
    return rows.with_format("arrow")[:].to_pylist()


def test_a_knowledge_base_and_its_mentions_are_two_configs(tmp_path):
    manifest = build("mimic", write_mimic(tmp_path / "raw"), tmp_path / "kb", progress=False)
    assert (manifest.kind, manifest.released_splits, manifest.rows) == (
        "knowledge_base",
        True,
        {"mentions": {"train": 4, "validation": 2, "test": 3}},
    )
    assert (manifest.read, manifest.entities_read, manifest.entities) == (9, 10, 10)
    assert manifest.title == "RichpediaMEL"
    mentions, entities = load_dataset(str(tmp_path / "kb")), load_dataset(str(tmp_path / "kb"), "entities")
    assert {name: str(kind) for name, kind in mentions["test"].features.items()} == {
        name: str(kind) for name, kind in MENTION_FEATURES.items()
    }
    assert entities["train"].features == ENTITY_FEATURES
    assert [row["qid"] for row in entities["train"]] == [f"Q{k}" for k in range(10)]
    assert entities["train"][3]["name"] == "Entity 3"
    assert all(row["image"] is not None for row in entities["train"])
    assert sorted(row["answer_qid"] for row in mentions["train"]) == sorted(["Q0", "Q1", "Q9", NIL])
    flags = {row["answer_qid"]: row["mention_image_is_gold"] for row in undecoded(mentions["train"])}
    assert flags == {"Q0": True, "Q1": False, "Q9": False, NIL: None}
    card = DatasetCard.load(tmp_path / "kb" / "README.md")
    assert [entry["config_name"] for entry in card.data.to_dict()["configs"]] == ["mentions", "entities"]


@pytest.mark.parametrize("config", ["mentions", "entities"])
def test_raw_and_built_are_the_same(tmp_path, config):
    raw = write_mimic(tmp_path / "raw")
    build("mimic", raw, tmp_path / "kb", progress=False, num_proc=2)
    one = load_m3el(config, data_dir=raw, reader="mimic", cache_dir=tmp_path / "cache")
    other = load_m3el(config, data_dir=tmp_path / "kb", cache_dir=tmp_path / "cache")
    streamed = load_m3el(config, data_dir=tmp_path / "kb", streaming=True)
    assert one.keys() == other.keys() == streamed.keys()
    for split, rows in one.items():
        assert undecoded(rows) == undecoded(other[split]) == list(streamed[split].decode(False))


def test_a_lost_entity_is_noticed(tmp_path, monkeypatch):
    whole = READERS["mimic"].entities

    def lossy(folder: Path, report: Report) -> Iterator[Entity]:
        entities = whole(folder, report)
        next(entities)  # read, neither passed on nor reported
        yield from entities

    monkeypatch.setitem(READERS, "mimic", replace(READERS["mimic"], entities=lossy))
    with pytest.raises(RuntimeError, match="^10 entities read, but 9 written$"):
        build("mimic", write_mimic(tmp_path / "raw"), tmp_path / "m3el", progress=False)


def test_the_deleaked_protocol_takes_the_golds_own_picture_away(tmp_path):
    build("mimic", write_mimic(tmp_path / "raw"), tmp_path / "kb", progress=False, protocol="deleaked")
    rows = [row for split in load_dataset(str(tmp_path / "kb")).values() for row in undecoded(split)]
    assert {row["answer_qid"] for row in rows if row["mention_image_is_gold"]} == {"Q0", "Q8"}
    assert all(row["mention_image"] is None for row in rows if row["mention_image_is_gold"])
    assert sum(row["mention_image"] is not None for row in rows) == 4


def test_the_audit_counts_nil_absent_golds_and_what_released_splits_share(tmp_path):
    build("mimic", write_mimic(tmp_path / "raw"), tmp_path / "kb", progress=False)
    found = audit(tmp_path / "kb", progress=False)
    facts = {fact.key: fact.counts for section in found.sections for fact in section.facts}
    assert facts["leak_sentence_picture"]["test / train"] == 1
    assert facts["leak_sentence"]["validation / train"] == 0
    assert facts["nil"]["all"] == 2
    assert facts["gold_absent"]["all"] == 1


def test_melbench_builds(tmp_path):
    (tmp_path / "raw").mkdir()
    entries = {
        str(k): {
            "id": str(k),
            "sentence": f"{k}.",
            "mentions": ["a", "b"],
            "entities": ["A", "B"],
            "answer": [f"Q{k}", "Q99"],
        }
        for k in range(30)
    }
    (tmp_path / "raw" / "Wikidata-MEL.json").write_text(json.dumps(entries))
    manifest = build("melbench", tmp_path / "raw", tmp_path / "built", progress=False)
    assert (manifest.total, manifest.entities, manifest.skipped) == (60, 31, [])
    data = load_dataset(str(tmp_path / "built"))
    assert {row["answer_qid"] for rows in data.values() for row in rows} == {"Q99", *(f"Q{k}" for k in range(30))}
    assert len(audit(tmp_path / "built", progress=False).sections) > 3


def test_both_forms_of_wikidiverse_build(tmp_path):
    passages, rows = [], []
    for k in range(6):
        caption = f"Lions number {k} won."
        passages.append([caption, f"https://x.org/{k}.jpg", "Sports", [["Lions", "Org", 0, 5, f"{WIKI}Lions_{k}"]]])
        candidates = [f"{WIKI}Lions_{k}", f"{WIKI}Lion"]
        rows.append(
            [
                caption,
                f"https://x.org/{k}.jpg",
                "Lions",
                "Org",
                "",
                " won.",
                f"{WIKI}Lions_{k}",
                candidates,
                "Sports",
                0,
                5,
            ]
        )
    for name, content in (("passages", passages), ("candidates", rows)):
        (tmp_path / name).mkdir()
        for split, cut in (("train", slice(0, 4)), ("valid", slice(4, 5)), ("test", slice(5, 6))):
            (tmp_path / name / f"{split}.json").write_text(json.dumps(content[cut]))
    manifest = build("wikidiverse", tmp_path / "passages", tmp_path / "a", progress=False)
    assert (manifest.rows, manifest.entities) == ({"mentions": {"train": 4, "validation": 1, "test": 1}}, 6)
    manifest = build("wikidiverse-candidates", tmp_path / "candidates", tmp_path / "b", progress=False)
    assert (manifest.rows, manifest.entities) == ({"sports": {"train": 4, "validation": 1, "test": 1}}, 7)
    data = load_dataset(str(tmp_path / "b"), "sports")
    assert {name: str(kind) for name, kind in data["test"].features.items()} == {
        name: str(kind) for name, kind in ROW_FEATURES.items()
    }
    for built in ("a", "b"):
        assert audit(tmp_path / built, progress=False).fact("rows") is not None


def test_a_set_of_nil_alone_is_built_and_audited(tmp_path):
    (tmp_path / "raw").mkdir()
    one = {"sentence": "He left.", "mentions": ["He"], "entities": ["-"], "answer": ["nil"]}
    (tmp_path / "raw" / "Wikidata-MEL.json").write_text(json.dumps({"a": one, "b": one | {"sentence": "She left."}}))
    manifest = build("melbench", tmp_path / "raw", tmp_path / "m3el", progress=False)
    assert (manifest.total, manifest.entities) == (2, 0)
    assert audit(tmp_path / "m3el", progress=False).fact("nil").counts["all"] == 2
