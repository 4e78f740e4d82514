from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor

from m3el_hf.data.collator import Batch, LinkingCollator, undecoded
from m3el_hf.errors import M3ELError
from m3el_hf.modeling.processing_clipnd import ClipNDProcessor


@pytest.fixture(scope="module")
def rows(data: DatasetDict) -> list[dict[str, Any]]:
    """Rows that share candidates; some have no mention picture."""
    kept = undecoded(data["train"])
    named = {name: [row for row in kept if row["mention"] == name] for name in kept["mention"][:40]}
    chosen = [row for group in named.values() if len(group) > 2 for row in group][:12]
    return [{**row, "mention_image": None} if number % 5 == 4 else row for number, row in enumerate(chosen)]


@pytest.fixture
def batch(rows: list[dict[str, Any]], processor: ClipNDProcessor) -> Batch:
    return LinkingCollator(processor)(rows)


def qids_of(rows: list[dict[str, Any]]) -> list[str]:
    """The candidates of all rows, each once, in the order of their first appearance."""
    return list(dict.fromkeys(qid for row in rows for qid in row["candidate_qids"]))


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, Tensor) else value is other[key] is None


def test_each_entity_stands_once(batch, rows):
    qids = qids_of(rows)
    assert len(qids) < sum(len(row["candidate_qids"]) for row in rows)
    assert batch.entities["input_ids"].shape[0] == batch.entities["pixel_values"].shape[0] == len(qids)


def test_candidates_and_labels_point_at_the_entities(batch, rows):
    qids = qids_of(rows)
    assert [[qids[index] for index in one] for one in batch.candidates] == [row["candidate_qids"] for row in rows]
    assert [qids[index] for index in batch.labels] == [row["answer_qid"] for row in rows]
    for row, candidates, label in zip(rows, batch.candidates, batch.labels, strict=True):
        assert candidates[row["answer"]] == label


def test_each_side_is_what_the_processor_makes_of_it(batch, rows, processor):
    shown = processor.mentions(*([row[key] for row in rows] for key in ("mention", "context", "mention_image")))
    same(batch.mentions, shown)
    entities: dict[str, tuple[Any, ...]] = {}
    for row in rows:
        for number, qid in enumerate(row["candidate_qids"]):
            columns = ("candidate_names", "candidate_descriptions", "candidate_images")
            entities.setdefault(qid, tuple(row[column][number] for column in columns))
    same(batch.entities, processor.entities(*map(list, zip(*entities.values(), strict=True))))


def test_a_missing_picture_is_marked(batch, rows):
    assert batch.mentions["has_image"].tolist() == [row["mention_image"] is not None for row in rows]
    assert not batch.mentions["has_image"].all()


def test_rows_without_any_picture_have_no_pixels(rows, processor):
    bare = [row | {"mention_image": None, "candidate_images": [None] * 3} for row in rows]
    batch = LinkingCollator(processor)(bare)
    for side in (batch.mentions, batch.entities):
        assert side["pixel_values"] is None
        assert not side["has_image"].any()


def test_an_entity_is_as_its_first_row_describes_it(rows, processor):
    one = rows[0]
    other = rows[1] | {key: one[key] for key in ("candidate_qids", "answer", "answer_qid")}
    collator = LinkingCollator(processor)
    same(collator([one, other]).entities, collator([one]).entities)


@pytest.mark.parametrize("cache_bytes", [0, 200_000, 1 << 29])
def test_the_cache_changes_nothing(rows, batch, processor, cache_bytes):
    collator = LinkingCollator(processor, cache_bytes)
    for _ in range(2):
        again = collator(rows)
        same(again.mentions, batch.mentions)
        same(again.entities, batch.entities)


def test_the_cache_spares_preparing_again(rows, processor, monkeypatch):
    collator, prepared = LinkingCollator(processor), []
    whole = processor.pixel_values
    monkeypatch.setattr(processor, "pixel_values", lambda image: (prepared.append(image), whole(image))[1])
    collator(rows)
    first = sum(isinstance(image, bytes) for image in prepared)
    collator(rows)
    pictures = {image["bytes"] for row in rows for image in (row["mention_image"], *row["candidate_images"]) if image}
    assert sum(isinstance(image, bytes) for image in prepared) == first == len(pictures)


def test_the_cache_keeps_to_its_size(rows, processor):
    size = 3 * 64 * 64 * 4
    collator = LinkingCollator(processor, cache_bytes=3 * size + 1)
    collator(rows)
    assert len(collator._pixels) == 3


def test_undecoded_rows_hold_bytes(data):
    rows: Dataset = undecoded(data["train"])
    assert isinstance(rows[0]["candidate_images"][0]["bytes"], bytes)
    assert rows.column_names == data["train"].column_names
    assert len(rows) == len(data["train"])


@pytest.mark.parametrize("template", ["N", "D"])
def test_entities_show_what_the_processor_s_template_says(rows, processor, template):
    chosen = ClipNDProcessor(processor.image_processor, processor.tokenizer, template=template)
    entities = {
        qid: (name, text)
        for row in rows
        for qid, name, text in zip(
            row["candidate_qids"], row["candidate_names"], row["candidate_descriptions"], strict=True
        )
    }
    shown = processor.entities([one["ND".index(template)] for one in entities.values()])
    assert torch.equal(LinkingCollator(chosen)(rows).entities["input_ids"], shown["input_ids"])


def test_a_candidate_that_the_template_leaves_without_text_is_named(rows, processor):
    chosen = ClipNDProcessor(processor.image_processor, processor.tokenizer, template="D")
    bare = rows[0] | {"candidate_names": ["Kansas", "a", "b"], "candidate_descriptions": [None, "a band", "a state"]}
    with pytest.raises(M3ELError, match="^candidate 'Kansas' has no description, all that .* template 'D' shows: use"):
        LinkingCollator(chosen)([bare])
