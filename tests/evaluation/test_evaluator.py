from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from m3el_hf import TASKS, ClipNDModel, ClipNDProcessor
from m3el_hf.data.collator import LinkingCollator
from m3el_hf.data.schema import ROW_FEATURES
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation import evaluator
from m3el_hf.evaluation.baselines import ImageHash, StringMatch
from m3el_hf.evaluation.evaluator import ModelSystem, Row, Scores, Table, average_mention, evaluate
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
    """Scores the gold by ``gold``, the others by ``other``, and counts what it was asked."""

    def __init__(self, name: str, gold: float, other: float) -> None:
        self.name, self.gold, self.other = name, gold, other

    def can_do(self, task: Task) -> bool:
        return True

    def scores(self, rows: Sequence[Row], tasks: Sequence[Task]) -> dict[str, list[Scores | None]]:
        return {task.name: [self.score(row) if task.fits(row) else None for row in rows] for task in tasks}

    def score(self, row: Row) -> Scores:
        scores = np.full(len(row["candidate_names"]), self.other)
        scores[row["answer"]] = self.gold
        return scores


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


# The table.


def test_scoring_all_alike_is_chance_on_every_task():
    table = evaluate([CONSTANT], dataset(make_row(number) for number in range(4)))
    assert list(table.cells["constant"]) == list(TASKS)
    for cell in table.cells["constant"].values():
        assert (cell["accuracy"], cell["accuracy_low"], cell["accuracy_high"]) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
        assert cell["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
        assert (cell["tie_share"], cell["n"]) == (1, 4)
    assert table.mean("constant") == pytest.approx(1 / 3)


def test_a_model_that_scores_all_alike_is_chance_on_every_task(model, processor):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    table = evaluate([ModelSystem("dead", model, processor)], dataset(make_row(number) for number in range(4)))
    assert [cell["accuracy"] for cell in table.cells["dead"].values()] == pytest.approx([1 / 3] * 9)


def test_right_is_one_and_wrong_is_zero():
    table = evaluate([PERFECT, ANTI], dataset(make_row(number) for number in range(5)))
    for name in TASKS:
        right, wrong = table.cells["perfect"][name], table.cells["anti-perfect"][name]
        assert (right["accuracy"], right["mrr"], right["tie_share"]) == (1, 1, 0)
        assert (wrong["accuracy"], wrong["mrr"]) == (0, pytest.approx(1 / 3))
    assert (table.mean("perfect"), table.mean("anti-perfect")) == (1, 0)


def test_candidates_may_be_of_any_number():
    five = make_row(1, answer=3, **{f"candidate_{column}": ["x"] * 5 for column in ("qids", "names", "descriptions")})
    two = {name: value[:2] for name, value in make_row(0).items() if name.startswith("candidate_")}
    rows = dataset([make_row(0, **two), five | {"candidate_images": [None] * 5}])
    assert evaluate([CONSTANT], rows).cells["constant"]["t2t"]["accuracy"] == pytest.approx((1 / 2 + 1 / 5) / 2)


def test_a_row_counts_only_for_the_tasks_that_it_has_pictures_for():
    table = evaluate([PERFECT, CONSTANT], lacking_pictures())
    expected = {
        "t2t": 6, "t2i": 4, "t2it": 4,
        "i2t": 4, "i2i": 3, "i2it": 3,
        "it2t": 4, "it2i": 3, "it2it": 3,
    }  # fmt: skip
    assert table.evaluable == expected
    assert table.rows == 6
    for cells in table.cells.values():
        assert {name: cell["n"] for name, cell in cells.items()} == expected
    assert table.mean("perfect") == 1


def test_a_task_without_rows_has_no_cell():
    rows = dataset(make_row(number, candidate_images=[None] * 3) for number in range(3))
    table = evaluate([CONSTANT, ImageHash()], rows)
    assert [name for name, count in table.evaluable.items() if count] == ["t2t", "i2t", "it2t"]
    assert list(table.cells["constant"]) == ["t2t", "i2t", "it2t"]
    assert table.cells["image hash"] == {}
    assert table.mean("constant") == pytest.approx(1 / 3)


def test_only_the_asked_tasks_are_measured():
    table = evaluate([PERFECT], lacking_pictures(), [TASKS["i2i"], TASKS["t2i"]])
    assert table.evaluable == {"i2i": 3, "t2i": 4}
    assert list(table.cells["perfect"]) == ["i2i", "t2i"]


def test_no_rows_and_scores_without_a_rank_are_errors():
    with pytest.raises(M3ELError, match="no rows to evaluate"):
        evaluate([CONSTANT], dataset([make_row(0)]).select([]))
    with pytest.raises(M3ELError, match="NaN"):
        evaluate([Judge("broken", float("nan"), 0.0)], dataset([make_row(0)]))


def test_the_mean_is_over_all_evaluable_tasks_or_none():
    def cell(accuracy: float) -> dict[str, float]:
        return {"accuracy": accuracy, "mrr": accuracy / 2}

    cells = {"all": {"t2t": cell(0.2), "i2i": cell(0.6)}, "some": {"t2t": cell(0.9)}, "none": {}}
    table = Table(cells, {"t2t": 5, "i2i": 2, "t2i": 0}, 5)
    assert table.mean("all") == pytest.approx(0.4)
    assert table.mean("all", "mrr") == pytest.approx(0.2)
    assert table.mean("some") is None and table.mean("none") is None
    assert Table({"all": {}}, {"t2t": 0}, 5).mean("all") is None


def test_a_system_that_cannot_do_a_task_has_a_cell_only_where_it_can():
    table = evaluate([StringMatch(), PERFECT], dataset([make_row(0), make_row(1)]))
    assert list(table.cells["string match"]) == ["t2t", "t2it", "it2t", "it2it"]
    assert table.mean("string match") is None


# A model as a system.


def raw_scores(system: ModelSystem, rows: Sequence[Row]) -> dict[str, list[Scores | None]]:
    return system.scores(rows, list(TASKS.values()))


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
    scores = raw_scores(ModelSystem("model", model, processor), rows)
    for name, task in TASKS.items():
        for row, found in zip(rows, scores[name], strict=True):
            np.testing.assert_allclose(found, scored_alone(model, processor, row, task), rtol=1e-5, atol=1e-5)


def test_a_model_has_no_score_where_a_row_does_not_fit(model, processor):
    scores = raw_scores(ModelSystem("model", model, processor), [make_row(0), make_row(1, mention_image=None)])
    assert [one is None for one in scores["i2i"]] == [False, True]
    assert [one is None for one in scores["t2i"]] == [False, False]
    table = evaluate([ModelSystem("model", model, processor)], lacking_pictures())
    assert {name: cell["n"] for name, cell in table.cells["model"].items()} == table.evaluable


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_models_figures_do_not_depend_on_the_batch(model, processor, monkeypatch, batch_size):
    known = {name: value for name, value in make_row(0).items() if name.startswith(("candidate_", "answer"))}
    rows = dataset([*map(make_row, range(3)), make_row(3, mention_image=None), make_row(4, **known), make_row(5)])

    def measure(size: int) -> Table:
        monkeypatch.setattr(evaluator, "BATCH_SIZE", size)
        return evaluate([ModelSystem("model", model, processor)], rows)

    whole, parts = measure(64), measure(batch_size)
    assert parts.evaluable == whole.evaluable
    for name, cell in whole.cells["model"].items():
        assert parts.cells["model"][name] == pytest.approx(cell, rel=1e-5)


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
        separate = [raw_scores(system, [row]) for row in rows]
        expected = {name: [each[name][0] for each in separate] for name in TASKS}
        assert_same_scores(raw_scores(system, rows), expected)


def test_rows_that_have_nothing_to_score_are_left_out(model, processor):
    bare = make_row(1, candidate_names=["", "a", "b"], candidate_descriptions=[None] * 3, candidate_images=[None] * 3)
    blank = make_row(2, mention="", context=None, mention_image=None)
    system = ModelSystem("model", model, processor)
    table = evaluate([system], dataset([make_row(0), bare, blank]))
    assert set(table.evaluable.values()) == {1}
    alone = evaluate([system], dataset([make_row(0)]))
    assert {name: cell["n"] for name, cell in table.cells["model"].items()} == dict.fromkeys(TASKS, 1)
    for name, cell in alone.cells["model"].items():
        assert table.cells["model"][name] == pytest.approx(cell)
    assert evaluate([system], dataset([bare, blank])).cells["model"] == {}


def test_measuring_leaves_the_model_in_the_mode_that_it_found(processor):
    model, rows = tiny_model(processor), dataset([make_row(0)])
    for training in (True, False):
        model.train(training)
        evaluate([ModelSystem("model", model, processor)], rows)
        average_mention(model, processor, rows)
        assert model.training is training
        assert all(parameter.requires_grad for parameter in model.parameters())


# The mention-blind control.


def test_the_average_mention_is_the_mean_over_what_mentions_have(model, processor, monkeypatch):
    monkeypatch.setattr(evaluator, "BATCH_SIZE", 2)
    rows = [make_row(0), make_row(1, mention_image=None), make_row(2, context=None), make_row(3), make_row(4)]
    average = average_mention(model, processor, dataset(rows))
    assert len(average) == 1
    with torch.no_grad():
        alone = [
            model.encode_mentions(**processor.mentions([row["mention"]], [row["context"]], [row["mention_image"]]))
            for row in rows
        ]
    pictured = [one for one in alone if one.has_image[0]]
    assert len(pictured) == 4

    def mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
        return sum(values) / len(values)

    expected = {"text": mean([one.text[0] for one in alone]), "image": mean([one.image[0] for one in pictured])}
    expected = {name: value / value.norm() for name, value in expected.items()}
    if model.config.head == "matching":
        for name in ("text_keys", "text_values"):
            expected[name] = mean([token for one in alone for token in getattr(one, name)[0]])[None]
        for name in ("image_keys", "image_values"):
            expected[name] = mean([token for one in pictured for token in getattr(one, name)[0]])[None]
        for name in ("image_cls", "cross"):
            expected[name] = mean([getattr(one, name)[0] for one in pictured])
        assert average.text_mask.all()
    for name, value in expected.items():
        torch.testing.assert_close(getattr(average, name)[0], value, rtol=1e-4, atol=1e-5)
    assert average.has_text.all() and average.has_image.all()


def test_without_a_picture_the_average_has_none(model, processor):
    average = average_mention(model, processor, dataset(make_row(number, mention_image=None) for number in range(3)))
    assert (average.has_text.tolist(), average.has_image.tolist()) == ([True], [False])
    mentions = average.show(text=False)
    assert not (mentions.has_text | mentions.has_image).any()


def test_the_control_scores_alike_whatever_the_mention_is(model, processor):
    rows = [make_row(0)]
    for number in (1, 2):
        other = make_row(number)
        rows.append(rows[0] | {name: other[name] for name in ("mention", "context", "mention_image")})
    average = average_mention(model, processor, dataset(rows))
    blind = raw_scores(ModelSystem("control", model, processor, average), rows)
    seeing = raw_scores(ModelSystem("model", model, processor), rows)
    for name in TASKS:
        assert all(np.array_equal(one, blind[name][0]) for one in blind[name])
        assert not np.allclose(seeing[name][0], seeing[name][1], rtol=1e-3)
    entities = model.encode_entities(**LinkingCollator(processor)(rows[:1]).entities)
    with torch.no_grad():
        expected = model.score(average.show(image=False), entities.show(text=False)).total[0]
    np.testing.assert_allclose(blind["t2i"][0], expected, rtol=1e-5)
