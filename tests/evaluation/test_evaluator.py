from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from numpy.typing import NDArray
from PIL import Image

from m3el_hf import TASKS, ClipNDModel, ClipNDProcessor
from m3el_hf.data.collator import EntityRow
from m3el_hf.data.schema import ROW_FEATURES
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation import chunks, evaluator
from m3el_hf.evaluation.evaluator import evaluate, score_candidates
from m3el_hf.evaluation.outcomes import Evaluation
from m3el_hf.evaluation.systems import ModelSystem, Row, Scores
from m3el_hf.tasks import Task
from tests.conftest import tiny_model

WORDS = ("a band from Kansas", "known for a red star", "a state of the plains", "the star of a band")


def picture(seed: int) -> dict[str, Any]:
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def make_row(number: int, **changes: Any) -> dict[str, Any]:
    """A row with three candidates of its own, the gold at a place that takes turns; ``changes`` replace columns."""
    qids = [f"Q{number}{k}" for k in range(3)]
    row: dict[str, Any] = dict.fromkeys(ROW_FEATURES)
    row |= {
        "id": f"row-{number}",
        "topic": "person",
        "mention": f"Kansas {number}",
        "context": WORDS[number % 4],
        "mention_image": picture(1000 + number),
        "answer": number % 3,
        "answer_qid": qids[number % 3],
        "candidate_qids": qids,
        "candidate_names": [f"Kansas {number}", "star", f"band {number}"],
        "candidate_descriptions": [WORDS[(number + k) % 4] for k in range(3)],
        "candidate_images": [picture(10 * number + k) for k in range(3)],
    }
    return row | changes


def dataset(rows: Sequence[dict[str, Any]]) -> Dataset:
    return Dataset.from_list(list(rows), features=ROW_FEATURES)


class Judge:
    """Scores the gold by ``gold``, the others by ``other``."""

    fingerprint = None

    def __init__(self, name: str, gold: float, other: float) -> None:
        self.name, self.gold, self.other = name, gold, other

    def can_do(self, task: Task) -> bool:
        return True

    def encode_mentions(self, rows: Sequence[Row]) -> NDArray[np.str_]:
        return np.array([row["answer_qid"] for row in rows])

    def encode_entities(self, entities: Sequence[EntityRow]) -> NDArray[np.str_]:
        return np.array([entity.qid for entity in entities])

    def score(self, mentions: NDArray[np.str_], entities: NDArray[np.str_], tasks: Sequence[Task]) -> Scores:
        return np.array([np.where(mentions[:, None] == entities, self.gold, self.other)] * len(tasks))


CONSTANT, PERFECT, ANTI = Judge("constant", 0.5, 0.5), Judge("perfect", 1.0, 0.0), Judge("anti-perfect", -1.0, 0.0)


def lacking_pictures() -> Dataset:
    """Six rows: row 1 has no mention picture, row 2 lacks one candidate's, row 3 has no picture at all."""
    some = make_row(2)["candidate_images"]
    return dataset(
        [
            make_row(0),
            make_row(1, mention_image=None),
            make_row(2, candidate_images=[some[0], None, some[2]]),
            make_row(3, mention_image=None, candidate_images=[None] * 3),
            make_row(4),
            make_row(5),
        ]
    )


# The counts, and the figures that follow.


def cells(evaluation: Evaluation, system: str) -> dict[str, dict[str, float]]:
    """The figures of each task that has some."""
    found = {task.name: evaluation.figures(system, task.name) for task in evaluation.tasks}
    return {name: one for name, one in found.items() if one is not None}


def test_scoring_all_alike_is_chance_on_every_task():
    found = evaluate([CONSTANT], dataset(make_row(number) for number in range(4)))
    assert list(cells(found, "constant")) == list(TASKS)
    for cell in cells(found, "constant").values():
        assert (cell["accuracy"], cell["accuracy_low"], cell["accuracy_high"]) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
        assert cell["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
        assert (cell["tie_share"], cell["n"]) == (1, 4)
    assert found.mean("constant") == pytest.approx(1 / 3)


def test_a_model_that_scores_all_alike_is_chance_on_every_task(model, processor):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = evaluate([ModelSystem("dead", model, processor)], dataset(make_row(number) for number in range(4)))
    assert [cell["accuracy"] for cell in cells(found, "dead").values()] == pytest.approx([1 / 3] * 9)


def test_right_is_one_and_wrong_is_zero():
    found = evaluate([PERFECT, ANTI], dataset(make_row(number) for number in range(5)))
    for name in TASKS:
        right, wrong = found.figures("perfect", name), found.figures("anti-perfect", name)
        assert (right["accuracy"], right["mrr"], right["tie_share"]) == (1, 1, 0)
        assert (wrong["accuracy"], wrong["mrr"]) == (0, pytest.approx(1 / 3))
    assert (found.mean("perfect"), found.mean("anti-perfect")) == (1, 0)


def test_candidates_may_be_of_any_number():
    five = make_row(1, answer=4, answer_qid="e", candidate_qids=list("abcde"))
    five |= {f"candidate_{column}": ["x"] * 5 for column in ("names", "descriptions")}
    two = {name: value[:2] for name, value in make_row(0).items() if name.startswith("candidate_")}
    rows = dataset([make_row(0, **two), five | {"candidate_images": [None] * 5}])
    found = evaluate([CONSTANT], rows)
    assert found.figures("constant", "t2t")["accuracy"] == pytest.approx((1 / 2 + 1 / 5) / 2)
    assert found.outcomes["constant"]["t2t"].candidates.tolist() == [2, 5]
    assert found.protocol == "candidate sets of 2 to 5"
    assert evaluate([CONSTANT], dataset([make_row(0)])).protocol == "candidate set of 3"


def test_a_row_counts_only_for_the_tasks_that_it_has_pictures_for():
    found = evaluate([PERFECT, CONSTANT], lacking_pictures())
    expected = {
        "t2t": 6, "t2i": 4, "t2it": 4,
        "i2t": 4, "i2i": 3, "i2it": 3,
        "it2t": 4, "it2i": 3, "it2it": 3,
    }  # fmt: skip
    assert {name: found.evaluable(name) for name in TASKS} == expected
    assert found.missing["i2i"] == {"no mention picture": 2, "a candidate without a picture": 1}
    assert len(found) == 6
    for system in found.systems:
        assert {name: cell["n"] for name, cell in cells(found, system).items()} == expected
    assert found.mean("perfect") == 1


def test_a_row_without_candidates_counts_for_no_task_and_is_said_to():
    bare = {name: [] for name in make_row(1) if name.startswith("candidate_")}
    found = evaluate([PERFECT], dataset([make_row(0), make_row(1, **bare)]))
    assert {found.evaluable(name) for name in TASKS} == {1}
    assert found.missing["t2t"] == {"no candidates": 1}
    assert found.outcomes["perfect"]["t2t"].rows.tolist() == [0]


def test_a_gold_that_is_no_candidate_is_a_miss():
    found = evaluate([PERFECT], dataset([make_row(0), make_row(1, answer=-1, answer_qid="Q404")]))
    assert (found.figures("perfect", "t2t")["accuracy"], found.figures("perfect", "t2t")["misses"]) == (0.5, 1)


def test_a_task_without_rows_has_no_figures():
    rows = dataset(make_row(number, candidate_images=[None] * 3) for number in range(3))
    found = evaluate([CONSTANT, ShyJudge("shy", 1.0, 0.0)], rows)
    assert list(cells(found, "constant")) == ["t2t", "i2t", "it2t"]
    assert cells(found, "shy") == {}
    assert found.mean("constant") == pytest.approx(1 / 3)


class ShyJudge(Judge):
    """Links pictures to pictures alone."""

    def can_do(self, task: Task) -> bool:
        return task.name == "i2i"


def test_a_system_that_cannot_do_a_task_has_figures_only_where_it_can():
    found = evaluate([ShyJudge("shy", 1.0, 0.0), PERFECT], dataset([make_row(0), make_row(1)]))
    assert list(cells(found, "shy")) == ["i2i"]
    assert found.mean("shy") is None


def test_only_the_asked_tasks_are_measured():
    found = evaluate([PERFECT], lacking_pictures(), [TASKS["i2i"], TASKS["t2i"]])
    assert {task.name: found.evaluable(task.name) for task in found.tasks} == {"i2i": 3, "t2i": 4}
    assert list(cells(found, "perfect")) == ["i2i", "t2i"]


def test_bad_input_is_one_clear_line():
    with pytest.raises(M3ELError, match="no rows to evaluate"):
        evaluate([CONSTANT], dataset([make_row(0)]).select([]))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(M3ELError, match="broken scores row-1 with NaN or infinity on t2t"):
            evaluate([Judge("broken", bad, 0.0)], dataset([make_row(1)]))
    with pytest.raises(M3ELError, match="2 rows have the id row-3: each would be counted"):
        evaluate([CONSTANT], dataset([make_row(1), make_row(3), make_row(3)]))
    for answer in (3, -2, None):
        with pytest.raises(M3ELError, match=f"row row-1 has answer {answer} but 3 candidates"):
            evaluate([CONSTANT], dataset([make_row(0), make_row(1, answer=answer)]))
    golds = [("Q12", "stands at 2"), ("Q404", "stands at nowhere")]
    changes = [*(({"answer_qid": gold}, says) for gold, says in golds), ({"answer": -1}, "Q11 stands at 1")]
    changes.append(({"candidate_qids": ["Q11", "Q11", "Q12"]}, "Q11 stands at 0 and 1"))
    for change, says in changes:
        with pytest.raises(M3ELError, match=f"row row-1 has answer .*, but its gold .*{says}: make them agree"):
            evaluate([CONSTANT], dataset([make_row(1, **change)]))
    with pytest.raises(M3ELError, match="two systems have the same name"):
        evaluate([CONSTANT, CONSTANT], dataset([make_row(1)]))


# A model as a system.


def assert_same_scores(found: dict[str, list[Any]], expected: dict[str, list[Any]]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        for one, other in zip(found[name], expected[name], strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def scored_alone(model: ClipNDModel, processor: ClipNDProcessor, row: Row, task: Task) -> list[float]:
    """Each candidate in a batch of its own that is given no more than the task shows."""

    def shown(modality: Any, *columns: Any) -> list[Any]:
        name, detail, image = columns
        text = [[name], [detail]] if modality.has_text else [[None], [None]]
        return [*text, [image if modality.has_image else None]]

    with torch.no_grad():
        mention = processor.mentions(*shown(task.mention, row["mention"], row["context"], row["mention_image"]))
        encoded = model.encode_mentions(**mention)
        columns = (row["candidate_names"], row["candidate_descriptions"], row["candidate_images"])
        return [
            model.score(encoded, model.encode_entities(**processor.entities(*shown(task.candidate, *one)))).total.item()
            for one in zip(*columns, strict=True)
        ]


def test_a_model_scores_each_candidate_as_it_would_alone(model, processor):
    rows = [make_row(0), make_row(1, context=None), make_row(2, candidate_descriptions=[None, "a band", None])]
    scores = score_candidates(ModelSystem("model", model, processor), rows)
    for name, task in TASKS.items():
        for row, found in zip(rows, scores[name], strict=True):
            np.testing.assert_allclose(found, scored_alone(model, processor, row, task), rtol=1e-5, atol=1e-5)


def test_a_model_has_no_score_where_a_row_does_not_fit(model, processor):
    scores = score_candidates(ModelSystem("model", model, processor), [make_row(0), make_row(1, mention_image=None)])
    assert [one is None for one in scores["i2i"]] == [False, True]
    assert [one is None for one in scores["t2i"]] == [False, False]
    found = evaluate([ModelSystem("model", model, processor)], lacking_pictures())
    assert {name: cell["n"] for name, cell in cells(found, "model").items()} == {
        name: found.evaluable(name) for name in TASKS
    }


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_models_figures_do_not_depend_on_the_batch(model, processor, monkeypatch, batch_size):
    known = {name: value for name, value in make_row(0).items() if name.startswith(("candidate_", "answer"))}
    rows = dataset([*map(make_row, range(3)), make_row(3, mention_image=None), make_row(4, **known), make_row(5)])

    def measure(size: int) -> Evaluation:
        monkeypatch.setattr(evaluator, "BATCH_SIZE", size)
        monkeypatch.setattr(evaluator, "GROUP_SIZE", max(1, size // 2))
        for module in (evaluator, chunks):
            monkeypatch.setattr(module, "CHUNK", 3 * size)
        return evaluate([ModelSystem("model", model, processor)], rows)

    whole, parts = measure(64), measure(batch_size)
    assert parts.missing == whole.missing
    for name, cell in cells(whole, "model").items():
        assert cells(parts, "model")[name] == pytest.approx(cell, rel=1e-5)


def test_rows_are_scored_alike_together_and_one_by_one(model, processor):
    """Rows may describe one entity differently, and one of them may lack its picture."""
    one = make_row(0)
    other = make_row(
        1,
        candidate_qids=one["candidate_qids"],
        answer_qid=one["candidate_qids"][1],
        candidate_descriptions=["a star", None, "the plains"],
        candidate_images=[None, *one["candidate_images"][:2]],
    )
    for rows in ([one, other], [other, one]):
        system = ModelSystem("model", model, processor)
        separate = [score_candidates(system, [row]) for row in rows]
        expected = {name: [each[name][0] for each in separate] for name in TASKS}
        assert_same_scores(score_candidates(system, rows), expected)


def test_rows_that_have_nothing_to_score_are_left_out(model, processor):
    bare = make_row(1, candidate_names=["", "a", "b"], candidate_descriptions=[None] * 3, candidate_images=[None] * 3)
    blank = make_row(2, mention="", context=None, mention_image=None)
    system = ModelSystem("model", model, processor)
    found = evaluate([system], dataset([make_row(0), bare, blank]))
    assert {found.evaluable(name) for name in TASKS} == {1}
    alone = evaluate([system], dataset([make_row(0)]))
    assert {name: cell["n"] for name, cell in cells(found, "model").items()} == dict.fromkeys(TASKS, 1)
    for name, cell in cells(alone, "model").items():
        assert cells(found, "model")[name] == pytest.approx(cell)
    assert cells(evaluate([system], dataset([bare, blank])), "model") == {}


def test_measuring_leaves_the_model_in_the_mode_that_it_found(processor):
    model, rows = tiny_model(processor), dataset([make_row(0)])
    for training in (True, False):
        model.train(training)
        evaluate([ModelSystem("model", model, processor)], rows)
        assert model.training is training
        assert all(parameter.requires_grad for parameter in model.parameters())
    model.train().clip.vision_model.eval()  # as one that is not trained
    evaluate([ModelSystem("model", model, processor)], rows)
    assert (model.training, model.clip.text_model.training, model.clip.vision_model.training) == (True, True, False)
