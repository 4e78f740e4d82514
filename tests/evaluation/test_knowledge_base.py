from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from m3el_hf import TASKS
from m3el_hf.data.schema import ENTITY_FEATURES, NIL
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation import chunks, knowledge_base
from m3el_hf.evaluation.knowledge_base import evaluate_knowledge_base
from m3el_hf.evaluation.outcomes import Evaluation
from m3el_hf.evaluation.systems import ModelSystem
from m3el_hf.tasks import Task
from tests.evaluation.test_evaluator import Judge, ShyJudge, dataset, make_row, picture

BOTH = TASKS["it2it"]


def base(count: int, **changes: Any) -> Dataset:
    """A knowledge base of the golds of rows 0, 1, ... and as many others; ``changes`` replace columns by place."""
    rows = [
        {
            "qid": f"Q{number // 3}{number % 3}",
            "name": f"name {number}",
            "description": f"the {number}th of them",
            "image": picture(number),
        }
        for number in range(count)
    ]
    for column, values in changes.items():
        for place, value in values.items():
            rows[place][column] = value
    columns = {name: [row[name] for row in rows] for name in ENTITY_FEATURES}
    return Dataset.from_dict(columns, features=ENTITY_FEATURES)


def exhaustive(system: ModelSystem, rows: Sequence[dict[str, Any]], entities: Dataset, task: Task) -> Any:
    """All scores at once, ``[B, N]``."""
    model, processor = system.model, system.collator.processor
    with torch.inference_mode():
        mentions = model.encode_mentions(**processor.from_rows(list(rows), side="mention"))
        known = model.encode_entities(**processor.from_rows(list(entities), side="entity"))
        shown = mentions.show(task.mention.has_text, task.mention.has_image)
        return model.score(shown, known.show(task.candidate.has_text, task.candidate.has_image)).total.numpy()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, blocks and rounds, though there are few of all."""
    monkeypatch.setattr(chunks, "CHUNK", 4)
    for name, size in (("CHUNK", 4), ("BLOCK", 3), ("MENTIONS", 6)):
        monkeypatch.setattr(knowledge_base, name, size)


@pytest.mark.usefixtures("small_blocks")
def test_ranks_are_those_of_all_scores_at_once(model, processor):
    rows, entities = [make_row(number) for number in range(8)], base(27)
    system = ModelSystem("model", model, processor)
    found = evaluate_knowledge_base([system], dataset(rows), entities, tuple(TASKS.values()))
    golds = [entities["qid"].index(row["answer_qid"]) for row in rows]
    for name, task in TASKS.items():
        scores = exhaustive(system, rows, entities, task)
        mine = scores[np.arange(8), golds][:, None]
        outcome = found.outcomes["model"][name]
        assert outcome.rows.tolist() == list(range(8))
        np.testing.assert_array_equal(outcome.greater, (scores > mine).sum(1))
        np.testing.assert_array_equal(outcome.equal, (scores == mine).sum(1))
        assert set(outcome.candidates) == {27}


@pytest.mark.usefixtures("small_blocks")
def test_figures_do_not_depend_on_the_order_of_the_knowledge_base(processor, model):
    rows, entities = dataset(make_row(number) for number in range(7)), base(25)
    system = ModelSystem("model", model, processor)

    def counts(known: Dataset) -> Any:
        outcome = evaluate_knowledge_base([system], rows, known).outcomes["model"]["it2it"]
        return np.stack([outcome.rows, outcome.greater, outcome.equal]).tolist()

    order = np.random.default_rng(0).permutation(25).tolist()
    assert counts(entities) == counts(entities.select(order))


def counted(found: Evaluation, system: str, task: str = "it2it") -> list[tuple[int, ...]]:
    """Row, greater and equal of each row that counts."""
    outcome = found.outcomes[system][task]
    return list(zip(outcome.rows.tolist(), outcome.greater.tolist(), outcome.equal.tolist(), strict=True))


PERFECT, CONSTANT, ANTI = Judge("perfect", 1.0, 0.0), Judge("constant", 0.0, 0.0), Judge("anti-perfect", -1.0, 0.0)


@pytest.mark.usefixtures("small_blocks")
def test_right_wrong_and_undecided():
    found = evaluate_knowledge_base([PERFECT, CONSTANT, ANTI], dataset(map(make_row, range(5))), base(21))
    assert counted(found, "perfect") == [(row, 0, 1) for row in range(5)]
    assert counted(found, "constant") == [(row, 0, 21) for row in range(5)]
    assert counted(found, "anti-perfect") == [(row, 20, 1) for row in range(5)]
    assert found.figures("constant", "it2it")["accuracy"] == pytest.approx(1 / 21)
    assert found.protocol == "full knowledge base of 21 entities, NIL: drop"


@pytest.mark.usefixtures("small_blocks")
def test_a_gold_that_the_knowledge_base_lacks_is_a_miss_and_counts():
    rows = dataset([make_row(0), make_row(1, answer_qid="Q404"), make_row(2)])
    found = evaluate_knowledge_base([PERFECT], rows, base(21))
    assert counted(found, "perfect") == [(0, 0, 1), (1, 21, 0), (2, 0, 1)]
    figures = found.figures("perfect", "it2it")
    assert (figures["n"], figures["misses"]) == (3, 1)
    assert figures["accuracy"] == figures["ceiling"] == figures["mrr"] == pytest.approx(2 / 3)


def nil_rows() -> Dataset:
    return dataset([make_row(0), make_row(1, answer_qid=NIL), make_row(2)])


@pytest.mark.usefixtures("small_blocks")
def test_nil_is_dropped_a_miss_or_an_entity():
    dropped = evaluate_knowledge_base([PERFECT], nil_rows(), base(21))
    assert (counted(dropped, "perfect"), dropped.missing) == ([(0, 0, 1), (2, 0, 1)], {"it2it": {"NIL": 1}})
    missed = evaluate_knowledge_base([PERFECT], nil_rows(), base(21), nil="miss")
    assert (counted(missed, "perfect"), missed.missing) == ([(0, 0, 1), (1, 21, 0), (2, 0, 1)], {"it2it": {}})
    entity = evaluate_knowledge_base([PERFECT], nil_rows(), base(21), nil="entity", nil_scores={"perfect": 0.5})
    assert counted(entity, "perfect") == [(0, 0, 1), (1, 0, 1), (2, 0, 1)]
    assert set(entity.outcomes["perfect"]["it2it"].candidates) == {22}
    high = evaluate_knowledge_base([PERFECT], nil_rows(), base(21), nil="entity", nil_scores={"perfect": 1.0})
    assert counted(high, "perfect") == [(0, 0, 2), (1, 0, 1), (2, 0, 2)]
    other = [PERFECT, Judge("unsure", 1.0, 0.0)]
    never = evaluate_knowledge_base(other, nil_rows(), base(21), nil="entity", nil_scores={"perfect": 0.5})
    assert counted(never, "unsure") == [(0, 0, 1), (1, 21, 1), (2, 0, 1)]  # which has no threshold
    low = evaluate_knowledge_base([PERFECT], nil_rows(), base(21), nil="entity", nil_scores={"perfect": -1.0})
    assert counted(low, "perfect") == [(0, 0, 1), (1, 21, 1), (2, 0, 1)]


@pytest.mark.usefixtures("small_blocks")
def test_what_an_entity_does_not_show_cannot_win():
    """Entity 5 has no picture, entity 6 nothing at all: neither is a rival of pictures, nor comes before them."""
    entities = base(21, image={5: None, 6: None}, name={6: ""}, description={6: None})
    pictured = evaluate_knowledge_base([ANTI], dataset([make_row(0), make_row(1)]), entities, [TASKS["i2i"], BOTH])
    assert counted(pictured, "anti-perfect", "i2i") == [(0, 18, 1), (1, 18, 1)]
    assert counted(pictured, "anti-perfect") == [(0, 19, 1), (1, 19, 1)]


@pytest.mark.usefixtures("small_blocks")
def test_a_gold_that_shows_nothing_ties_with_the_others_that_do_not():
    row = make_row(1)
    place = base(21)["qid"].index(row["answer_qid"])
    bare = {place: None, 9: None}
    blank = base(21, image=bare, description=bare, name={place: "", 9: ""})
    found = evaluate_knowledge_base([PERFECT], dataset([make_row(0), row]), blank)
    assert counted(found, "perfect") == [(0, 0, 1), (1, 19, 2)]
    found = evaluate_knowledge_base([PERFECT], dataset([row]), base(21, image=bare), [TASKS["i2i"]])
    assert counted(found, "perfect", "i2i") == [(0, 19, 2)]


@pytest.mark.usefixtures("small_blocks")
def test_a_mention_counts_where_it_shows_something():
    rows = dataset(
        [make_row(0, mention_image=None), make_row(1, mention="", context=None), make_row(2, mention="")]
        + [make_row(3, mention="", context=None, mention_image=None)]
    )
    found = evaluate_knowledge_base([PERFECT], rows, base(21), [TASKS["t2t"], TASKS["i2t"], BOTH])
    assert found.outcomes["perfect"]["t2t"].rows.tolist() == [0, 2]
    assert found.outcomes["perfect"]["i2t"].rows.tolist() == [1, 2]
    assert found.outcomes["perfect"]["it2it"].rows.tolist() == [0, 1, 2]
    assert found.missing == {
        "t2t": {"no mention text": 2},
        "i2t": {"no mention picture": 2},
        "it2it": {"no mention text or picture": 1},
    }


def test_a_system_that_can_do_none_of_the_tasks_is_not_asked():
    found = evaluate_knowledge_base([ShyJudge("shy", 1.0, 0.0), PERFECT], dataset([make_row(0)]), base(9))
    assert (found.figures("shy", "it2it"), found.mean("shy"), found.mean("perfect")) == (None, None, 1)


def test_scores_that_are_not_the_same_twice_are_no_miss():
    class Moody(Judge):
        def score(self, *arguments: Any) -> Any:
            self.gold += 1
            return super().score(*arguments)

    with pytest.raises(M3ELError, match="moody scores the gold of row-0 on it2it in two ways"):
        evaluate_knowledge_base([Moody("moody", 1.0, 0.0)], dataset([make_row(0)]), base(9))


def test_pictures_of_candidates_are_not_opened():
    """Candidates of rows are not asked about: the knowledge base's entities are."""
    broken = [{"bytes": b"not a picture", "path": None}] * 3
    found = evaluate_knowledge_base([PERFECT], dataset([make_row(0, candidate_images=broken)]), base(9))
    assert found.mean("perfect") == 1


def test_entities_of_one_hash_are_not_taken_for_one(monkeypatch):
    monkeypatch.setattr(knowledge_base, "hash", lambda name: len(name), raising=False)
    entities = base(9)
    assert len(set(map(len, entities["qid"]))) < 9
    assert evaluate_knowledge_base([PERFECT], dataset([make_row(0)]), entities).mean("perfect") == 1
    with pytest.raises(M3ELError, match="entity Q11 stands 2 times"):
        evaluate_knowledge_base([PERFECT], dataset([make_row(0)]), base(9, qid={7: "Q11"}))


def test_bad_input_is_one_clear_line():
    rows = dataset([make_row(0)])
    with pytest.raises(M3ELError, match="the knowledge base is empty"):
        evaluate_knowledge_base([PERFECT], rows, base(0))
    with pytest.raises(M3ELError, match="no rows to evaluate"):
        evaluate_knowledge_base([PERFECT], rows.select([]), base(3))
    with pytest.raises(M3ELError, match="entity Q11 stands 2 times in the knowledge base"):
        evaluate_knowledge_base([PERFECT], rows, base(9, qid={7: "Q11"}))
    with pytest.raises(M3ELError, match="pass nil_scores with nil='entity'"):
        evaluate_knowledge_base([PERFECT], rows, base(3), nil="entity")
    with pytest.raises(M3ELError, match="pass nil_scores with nil='entity'"):
        evaluate_knowledge_base([PERFECT], rows, base(3), nil_scores={"perfect": 0.0})
    for score in (float("nan"), float("inf")):
        with pytest.raises(M3ELError, match="NIL cannot have the score (nan|inf) for perfect"):
            evaluate_knowledge_base([PERFECT], rows, base(3), nil="entity", nil_scores={"perfect": score})
    with pytest.raises(M3ELError, match="nil cannot be 'ignore': choose drop, miss, entity"):
        evaluate_knowledge_base([PERFECT], rows, base(3), nil="ignore")  # type: ignore[arg-type]
    with pytest.raises(M3ELError, match="broken scores row-0 with NaN or infinity on it2it"):
        evaluate_knowledge_base([Judge("broken", float("nan"), 0)], rows, base(3))
