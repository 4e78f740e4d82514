from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image

from m3el_hf import ClipNDModel, ClipNDProcessor
from m3el_hf.errors import M3ELError
from m3el_hf.linking import linker
from m3el_hf.linking.linker import EntityLinker, Link
from tests.conftest import tiny_model

Entity = dict[str, Any]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8))


ENTITIES: list[Entity] = [
    {"qid": "Q1", "name": "Kansas", "description": "a band known for a red star", "image": picture(1)},
    {"qid": "Q2", "name": "Kansas", "description": "a state of the plains", "image": None},
    {"qid": "Q3", "name": "star", "description": None, "image": picture(3)},
    {"qid": "Q4", "name": "", "description": None, "image": picture(4)},
    {"qid": "Q5", "name": "the plains", "description": None, "image": None},
]
MENTIONS: list[dict[str, Any]] = [
    {"name": "Kansas", "context": "Kansas toured with a band.", "image": picture(7)},
    {"name": "a band"},
    {"context": "a red star"},
    {"image": picture(1)},
]


def scores_one_by_one(model: ClipNDModel, processor: ClipNDProcessor, mention: dict[str, Any]) -> list[float]:
    asked = processor.mentions([mention.get("name")], [mention.get("context")], [mention.get("image")])
    scores = []
    with torch.no_grad():
        for entity in ENTITIES:
            known = processor.entities([entity["name"]], [entity["description"]], [entity["image"]])
            total = model.score(model.encode_mentions(**asked), model.encode_entities(**known)).total
            scores.append(total.item())
    return scores


@pytest.mark.parametrize("mention", MENTIONS, ids=["all", "name", "context", "image"])
def test_links_are_all_entities_best_first_as_each_scores_alone(model, processor, mention):
    links = EntityLinker(model, processor, ENTITIES)(**mention, top_k=5)
    scores = scores_one_by_one(model, processor, mention)
    order = sorted(range(5), key=lambda number: -scores[number])
    assert [link.qid for link in links] == [ENTITIES[number]["qid"] for number in order]
    for link, number in zip(links, order, strict=True):
        entity = ENTITIES[number]
        assert (link.name, link.description) == (entity["name"], entity["description"])
        assert link.score == pytest.approx(scores[number], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("top_k", "found"), [(1, 1), (2, 2), (5, 5), (6, 5), (1000, 5)])
def test_top_k_is_the_start_of_the_whole_list_and_no_longer_than_it(model, processor, top_k, found):
    link = EntityLinker(model, processor, ENTITIES)
    assert link(**MENTIONS[0], top_k=top_k) == link(**MENTIONS[0], top_k=5)[:found]


def test_five_links_are_the_default(processor):
    many = [{"qid": f"Q{number}", "name": "x" * number, "description": None, "image": None} for number in range(1, 9)]
    assert len(EntityLinker(tiny_model(processor), processor, many)(name="x")) == 5


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_do_not_matter(model, processor, monkeypatch, batch_size):
    def link_all() -> list[list[Link]]:
        link = EntityLinker(model, processor, (dict(entity) for entity in ENTITIES))
        return [link(**mention) for mention in MENTIONS]

    whole = link_all()
    monkeypatch.setattr(linker, "BATCH_SIZE", batch_size)
    for one, other in zip(link_all(), whole, strict=True):
        assert [link.qid for link in one] == [link.qid for link in other]
        assert [link.score for link in one] == pytest.approx([link.score for link in other], rel=1e-5, abs=1e-5)


def test_an_entity_finds_itself(processor):
    link = EntityLinker(tiny_model(processor, "clip"), processor, ENTITIES)
    for entity in ENTITIES:
        found = link(name=entity["name"], context=entity["description"], image=entity["image"], top_k=1)
        assert found[0].qid == entity["qid"]


def test_a_picture_may_be_given_as_a_dataset_holds_it(model, processor):
    file = io.BytesIO()
    picture(7).save(file, "PNG")
    link = EntityLinker(model, processor, ENTITIES)
    expected = link(image=picture(7))
    for image in (file.getvalue(), {"bytes": file.getvalue(), "path": None}):
        assert link(image=image) == expected


def test_linking_repeats_itself_and_trains_nothing(processor):
    model = tiny_model(processor).train()
    link = EntityLinker(model, processor, ENTITIES)
    first = link(**MENTIONS[0])
    assert link(**MENTIONS[0]) == first
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("empty", [[], iter(())])
def test_an_empty_knowledge_base_is_an_error(model, processor, empty):
    with pytest.raises(M3ELError, match="knowledge base is empty"):
        EntityLinker(model, processor, empty)


def test_an_entity_with_nothing_is_named(model, processor, monkeypatch):
    monkeypatch.setattr(linker, "BATCH_SIZE", 2)
    bare = {"qid": "Q77", "name": "", "description": " ", "image": None}
    with pytest.raises(
        M3ELError, match="entity Q77 has neither text nor picture under the template 'ND': leave it out"
    ):
        EntityLinker(model, processor, [*ENTITIES, bare])


def test_a_knowledge_base_shows_what_the_processor_s_template_says(model, processor):
    described = [{"qid": str(k), "name": "Kansas", "description": f"band {k}", "image": None} for k in range(3)]
    by_name = ClipNDProcessor(processor.image_processor, processor.tokenizer, template="N")
    scores = [
        [link.score for link in EntityLinker(model, one, described)(name="a band")] for one in (by_name, processor)
    ]
    assert np.ptp(scores[0]) < 1e-4 < np.ptp(scores[1])
    by_description = ClipNDProcessor(processor.image_processor, processor.tokenizer, template="D")
    with pytest.raises(M3ELError, match="^entity 7 has neither text nor picture under the template 'D': leave it out$"):
        EntityLinker(model, by_description, [{"qid": "7", "name": "Kansas", "description": None, "image": None}])


@pytest.mark.parametrize("mention", [{}, {"name": "", "context": " "}, {"name": None, "image": None}])
def test_a_mention_with_nothing_is_an_error(model, processor, mention):
    with pytest.raises(ValueError, match="neither text nor picture"):
        EntityLinker(model, processor, ENTITIES)(**mention)


def test_a_broken_picture_is_an_error(model, processor):
    with pytest.raises(ValueError, match="is not a picture"):
        EntityLinker(model, processor, ENTITIES)(name="Kansas", image=b"broken")


def entities_of(store: Path) -> Iterator[Entity]:
    yield from load_dataset(str(store), "entities", split="train")


def test_a_saved_model_links_among_a_built_datasets_entities(model, processor, store, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = EntityLinker.from_pretrained(tmp_path, knowledge_base=store)
    expected = EntityLinker(model, processor, entities_of(store))
    one, other = (link(name="Kansas", top_k=7) for link in (loaded, expected))
    assert [link.qid for link in one] == [link.qid for link in other]
    assert [link.score for link in one] == pytest.approx([link.score for link in other], rel=1e-5)
    assert len(loaded(name="Kansas", top_k=10**6)) == len(list(entities_of(store)))
