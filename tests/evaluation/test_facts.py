from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from m3el_hf import TASKS
from m3el_hf.data.schema import MENTION_FEATURES
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.evaluator import evaluate
from m3el_hf.evaluation.facts import SEEN, Familiar, near_same_pictures, row_facts, why_not
from m3el_hf.evaluation.knowledge_base import evaluate_knowledge_base
from m3el_hf.evaluation.measure import measure
from m3el_hf.evaluation.systems import ModelSystem
from tests.evaluation.test_evaluator import PERFECT, dataset, make_row
from tests.evaluation.test_knowledge_base import base


def test_training_has_met_a_gold_as_one_as_a_distractor_or_never():
    own, other = make_row(0), make_row(1)
    gold, rival = own["answer_qid"], own["candidate_qids"][1]
    training = dataset([own, make_row(0, id="again"), other])
    rows = dataset(
        [
            make_row(0),
            make_row(2, answer_qid=rival, candidate_qids=["Q20", "Q21", rival]),
            make_row(3),
        ]
    )
    facts = evaluate([PERFECT], rows, training=training).facts
    assert facts["gold"].tolist() == [gold, rival, "Q30"]
    assert facts["seen"].tolist() == list(SEEN)
    assert facts["train_golds"].tolist() == [2, 0, 0]
    assert facts["train_rows"].tolist() == [2, 2, 0]


def test_a_candidate_that_stands_twice_in_a_row_is_met_once():
    familiar = Familiar.of(dataset([make_row(0, candidate_qids=["Q00", "Q1", "Q1"])]))
    assert familiar.candidates == Counter({"Q00": 1, "Q1": 1})


def test_training_rows_of_a_knowledge_base_have_golds_alone():
    rows = [{name: make_row(number)[name] for name in MENTION_FEATURES} for number in (0, 0, 1)]
    training = Dataset.from_list(rows, features=MENTION_FEATURES)
    facts = evaluate_knowledge_base([PERFECT], dataset([make_row(0), make_row(2)]), base(9), training=training).facts
    assert facts["seen"].tolist() == [SEEN[0], SEEN[2]]
    assert (facts["train_golds"].tolist(), facts["train_rows"].tolist()) == ([2, 0], [2, 0])


def test_without_training_rows_nobody_knows():
    facts = evaluate([PERFECT], dataset([make_row(0), make_row(1, topic=None)])).facts
    assert facts["id"].tolist() == ["row-0", "row-1"]
    assert facts["topic"].tolist() == ["person", ""]
    assert facts["own_picture"].tolist() == [False, False]
    assert facts["seen"].tolist() == ["", ""]
    assert facts["train_golds"].tolist() == facts["train_rows"].tolist() == [-1, -1]
    none_met = row_facts([make_row(0)], Familiar())
    assert (none_met["seen"].tolist(), none_met["train_golds"].tolist()) == ([SEEN[2]], [0])


def test_a_picture_that_is_the_golds_own_is_a_fact():
    rows = [make_row(number, mention_image_is_gold=value) for number, value in enumerate((True, False, None))]
    assert row_facts(rows, None)["own_picture"].tolist() == [True, False, False]


def test_ids_that_stand_twice_are_refused():
    rows = [make_row(number, id=name) for number, name in enumerate(("a", "b", "a", "c", "a"))]
    with pytest.raises(M3ELError, match="3 rows have the id a: each would be counted"):
        row_facts(rows, None)
    with pytest.raises(M3ELError, match="3 rows have the id a: each would be counted"):
        evaluate_knowledge_base([PERFECT], dataset(rows), base(21))


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, {}),
        ({"context": None, "candidate_descriptions": [None] * 3}, {}),
        ({"mention": ""}, dict.fromkeys(("t2t", "t2i", "t2it", "it2t", "it2i", "it2it"), "no mention text")),
        ({"mention_image": None}, dict.fromkeys(("i2t", "i2i", "i2it", "it2t", "it2i", "it2it"), "no mention picture")),
        (
            {"candidate_names": ["a", "", "c"]},
            dict.fromkeys(("t2t", "i2t", "it2t", "t2it", "i2it", "it2it"), "a candidate without a name"),
        ),
        (
            {"candidate_images": [None] * 3},
            dict.fromkeys(("t2i", "i2i", "it2i", "t2it", "i2it", "it2it"), "a candidate without a picture"),
        ),
        (
            {name: [] for name in make_row(0) if name.startswith("candidate_")},
            dict.fromkeys(TASKS, "no candidates"),
        ),
    ],
)
def test_a_reason_is_what_the_row_lacks_of_what_the_task_shows(changes: dict[str, Any], reasons: dict[str, str]):
    row = make_row(0) | changes
    assert {name: why for name, task in TASKS.items() if (why := why_not(row, task))} == reasons


def test_every_row_fits_or_has_one_reason():
    generator = np.random.default_rng(0)
    rows = [
        make_row(
            number,
            mention="" if generator.random() < 0.3 else "a",
            mention_image=None if generator.random() < 0.3 else make_row(0)["mention_image"],
            candidate_images=[None if generator.random() < 0.1 else image for image in make_row(0)["candidate_images"]],
            candidate_names=["" if generator.random() < 0.1 else "a" for _ in range(3)],
        )
        for number in range(40)
    ]
    found = evaluate([PERFECT], dataset(rows))
    for name, task in TASKS.items():
        fitting = [number for number, row in enumerate(rows) if task.fits(row)]
        assert found.outcomes["perfect"][name].rows.tolist() == fitting
        assert found.evaluable(name) == len(fitting) == 40 - sum(found.missing[name].values())


def test_near_same_pictures_are_found_whatever_their_size_and_format():
    blocks = np.random.default_rng(3).integers(0, 256, (6, 6, 3))
    picture = Image.fromarray(np.kron(blocks, np.ones((20, 20, 1))).astype(np.uint8))

    def encoded(image: Image.Image, kind: str) -> dict[str, Any]:
        file = io.BytesIO()
        image.save(file, kind)
        return {"bytes": file.getvalue(), "path": None}

    row = make_row(0)
    images = [encoded(picture, "PNG"), *row["candidate_images"][1:]]
    shrunk = encoded(picture.resize((70, 70)), "JPEG")
    rows = [
        row | {"candidate_images": images, "mention_image": shrunk},
        row | {"candidate_images": images},  # another picture
        row | {"candidate_images": [None, *images[1:]], "mention_image": shrunk},
        row | {"candidate_images": images, "mention_image": None},
    ]
    assert near_same_pictures(rows).tolist() == [True, False, False, False]


def test_near_same_pictures_are_left_out_only_where_they_are_shown_and_asked_for(model, processor):
    found = measure([ModelSystem("model", model, processor)], dataset([make_row(0), make_row(1)]))
    assert not found.facts["like_picture"].any()
    marked = replace(found, facts=found.facts | {"like_picture": np.array([True, False])})
    assert marked.deleaked("i2t").all() and marked.deleaked("t2i", near=True).all()
    assert marked.deleaked("i2t", near=True).tolist() == [False, True]
