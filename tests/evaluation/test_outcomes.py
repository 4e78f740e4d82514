from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m3el_hf import TASKS
from m3el_hf.data.store import build
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.evaluator import evaluate
from m3el_hf.evaluation.knowledge_base import evaluate_knowledge_base
from m3el_hf.evaluation.outcomes import COUNTS, Evaluation, Outcome
from m3el_hf.evaluation.ranking import hits_at_k, paired_difference, reciprocal_ranks
from m3el_hf.evaluation.systems import ModelSystem
from m3el_hf.tasks import Task
from tests.conftest import instance, write_release
from tests.evaluation.test_evaluator import ANTI, CONSTANT, PERFECT, ShyJudge, dataset, lacking_pictures, make_row
from tests.evaluation.test_knowledge_base import base
from tests.evaluation.test_sharing import assert_same

THREE: tuple[Task, ...] = (TASKS["t2t"], TASKS["i2i"], TASKS["it2it"])


def drawn(seed: int = 0, rows: int = 30, systems: tuple[str, ...] = ("one", "other")) -> Evaluation:
    """An evaluation of drawn counts: every row fits t2t, about half i2i, and none it2it."""
    generator = np.random.default_rng(seed)
    fitting = {"t2t": np.arange(rows), "i2i": np.flatnonzero(generator.random(rows) < 0.5), "it2it": np.arange(0)}

    def outcome(of: Any) -> Outcome:
        greater, equal = generator.integers(0, 3, len(of)), generator.integers(0, 3, len(of))
        greater[equal == 0] = 5  # a miss
        return Outcome(of, greater, equal, np.full(len(of), 5))

    return Evaluation(
        facts={
            "id": np.array([f"row {number}" for number in range(rows)]),
            "topic": np.array(["person", "books"])[generator.integers(0, 2, rows)],
            "gold": np.array([f"Q{number}" for number in generator.integers(0, rows // 2, rows)]),
            "own_picture": generator.random(rows) < 0.3,
        },
        outcomes={system: {task: outcome(of) for task, of in fitting.items()} for system in systems},
        tasks=THREE,
        protocol="candidate set",
        missing={task: {"no mention picture": rows - len(of)} for task, of in fitting.items()},
    )


# Figures.


def test_the_figures_of_some_rows_are_those_of_an_evaluation_of_these_rows_alone(model, processor):
    system = ModelSystem("model", model, processor)
    rows = dataset(make_row(number, topic=("person", "books")[number % 2]) for number in range(8))
    found = evaluate([system], rows, THREE)
    where = found.facts["topic"] == "books"
    alone = evaluate([system], rows.select([1, 3, 5, 7]), THREE)
    for task in THREE:
        assert found.figures("model", task.name, where) == alone.figures("model", task.name)
    assert found.mean("model", where=where) == alone.mean("model")
    assert found.figures("model", "t2t", np.zeros(8, bool)) is None
    assert found.mean("model", where=np.zeros(8, bool)) is None


def test_a_mask_is_of_all_rows_though_few_fit():
    found = drawn()
    outcome = found.outcomes["one"]["i2i"]
    where = np.arange(len(found)) == outcome.rows[3]
    figures = found.figures("one", "i2i", where)
    assert (figures["n"], figures["accuracy"]) == (1, outcome.values("accuracy")[3])


def test_the_interval_draws_whole_golds():
    """All rows of one gold: however often it is drawn, the mean is the same."""
    found = drawn()
    same = Evaluation(found.facts | {"gold": np.array(["Q1"] * 30)}, found.outcomes, THREE, "", found.missing)
    figures = same.figures("one", "t2t")
    assert figures["accuracy_low"] == figures["accuracy"] == figures["accuracy_high"]
    assert found.figures("one", "t2t")["accuracy_low"] < figures["accuracy"]


# The mean over tasks.


def values(outcome: Outcome, figure: str) -> Any:
    if figure == "mrr":
        return reciprocal_ranks(outcome.greater, outcome.equal)
    return hits_at_k(outcome.greater, outcome.equal, 1)


@pytest.mark.parametrize("figure", ["accuracy", "mrr"])
def test_the_mean_is_that_of_the_tasks_that_some_row_fits(figure):
    found = drawn()
    of_tasks = [values(found.outcomes["one"][task], figure).mean() for task in ("t2t", "i2i")]
    assert found.mean("one", figure) == pytest.approx(sum(of_tasks) / 2)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_the_mean_of_some_rows_is_that_of_their_tasks(seed, share):
    found = drawn(seed)
    where = np.random.default_rng(seed + 1).random(len(found)) < share
    of_tasks = [found.figures("one", task.name, where) for task in THREE]
    expected = [figures["accuracy"] for figures in of_tasks if figures]
    if expected:
        assert found.mean("one", where=where) == pytest.approx(np.mean(expected))
        rows, shares = found.values("one", where=where)
        assert shares.mean() == pytest.approx(np.mean(expected))
        assert set(rows) == set(np.flatnonzero(where))
    else:
        assert found.mean("one", where=where) is None


def test_the_mean_of_what_cannot_vary_has_no_interval():
    """Chance is a third of every task, however many rows fit which."""
    found = evaluate([CONSTANT], lacking_pictures())
    _, values = found.values("constant")
    assert values.tolist() == pytest.approx([1 / 3] * 6, abs=1e-15)


def test_a_system_that_cannot_do_a_task_that_rows_fit_has_no_mean():
    rows = dataset([make_row(0), make_row(1)])
    found = evaluate([ShyJudge("shy", 1.0, 0.0), PERFECT], rows, THREE)
    assert (found.mean("shy"), found.mean("perfect")) == (None, 1)
    assert found.mean("shy", where=np.array([True, False])) is None
    assert evaluate([ShyJudge("shy", 1.0, 0.0)], rows, [TASKS["i2i"]]).mean("shy") == 1


# Comparing systems.


@pytest.mark.parametrize("figure", ["accuracy", "mrr"])
def test_a_comparison_is_the_paired_difference_of_the_rows(figure):
    found = drawn()
    outcomes = [found.outcomes[system]["i2i"] for system in ("one", "other")]
    pair = [values(outcome, figure) for outcome in outcomes]
    assert found.compare("one", "other", "i2i", figure) == paired_difference(
        *pair, found.facts["gold"][outcomes[0].rows]
    )
    assert found.compare("one", "one", "i2i").mean == 0


def test_a_comparison_of_the_means_is_their_difference():
    found = drawn()
    difference = found.compare("one", "other")
    assert difference.mean == pytest.approx(found.mean("one") - found.mean("other"))
    assert difference.low < difference.mean < difference.high
    assert difference.n == len(found)


def test_there_is_nothing_to_compare_without_rows_or_where_one_cannot_do_it():
    assert drawn().compare("one", "other", "it2it") is None
    found = evaluate([ShyJudge("shy", 1.0, 0.0), PERFECT], dataset([make_row(0), make_row(1)]), THREE)
    assert found.compare("shy", "perfect", "t2t") is None
    assert found.compare("shy", "perfect") is None
    assert found.compare("shy", "perfect", "i2i").mean == 0


# Leaks.


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release in which every other mention's picture is the gold's own file."""
    instances = []
    for number in range(12):
        one = instance(number)
        if number % 2:
            one["image"] = one["candidates"][0]["image"]
        instances.append(one)
    folder = write_release(tmp_path_factory.mktemp("leaky"), instances)
    generator = np.random.default_rng(0)
    for path in sorted(folder.rglob("*.png")):  # no two alike
        Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(path)
    return folder


def built(release: Path, output: Path, protocol: str) -> Any:
    build("m3el", release, output, progress=False, protocol=protocol)
    return load_dataset(str(output))


def test_what_is_deleaked_is_an_evaluation_of_data_without_the_leak(leaky, model, processor, tmp_path):
    released, deleaked = (built(leaky, tmp_path / name, name) for name in ("as_released", "deleaked"))
    assert {split: rows["id"][:] for split, rows in released.items()} == {
        split: rows["id"][:] for split, rows in deleaked.items()
    }
    system = ModelSystem("model", model, processor)
    rows = released["train"]
    found, expected = evaluate([system], rows), evaluate([system], deleaked["train"])
    assert 0 < found.facts["own_picture"].sum() < len(rows)
    hidden = [image is None for image in deleaked["train"]["mention_image"]]
    assert hidden == found.facts["own_picture"].tolist()
    for name, task in TASKS.items():
        where = found.deleaked(name)
        outcome, other = found.outcomes["model"][name], expected.outcomes["model"][name]
        assert outcome.rows[where[outcome.rows]].tolist() == other.rows.tolist()
        assert where.all() == (not task.mention.has_image)
        assert found.figures("model", name, where) == expected.figures("model", name)


# On disk.


def test_what_is_loaded_is_what_was_saved(tmp_path):
    """Of tasks without rows, of a system that can do none of them, and of both protocols."""
    rows = dataset(make_row(number, candidate_images=[None] * 3, topic=None) for number in range(3))
    for number, found in enumerate(
        [
            evaluate([ShyJudge("shy", 1.0, 0.0), CONSTANT, ANTI], rows, training=rows),
            evaluate([PERFECT], rows, [TASKS["i2i"]]),
            evaluate_knowledge_base([PERFECT, ShyJudge("shy", 1.0, 0.0)], rows, base(9)),
            drawn(),
        ]
    ):
        found.save(tmp_path / str(number))
        loaded = Evaluation.load(tmp_path / str(number))
        assert_same(loaded, found)
        assert loaded.protocol == found.protocol
        for system in found.systems:
            for task in found.tasks:
                assert loaded.figures(system, task.name) == found.figures(system, task.name)
            for outcome in loaded.outcomes[system].values():
                assert {getattr(outcome, name).dtype for name in COUNTS} == {np.dtype(np.int64)}


def test_a_later_save_takes_the_place_of_an_earlier(tmp_path):
    for found in (drawn(1), drawn(2, rows=10, systems=("third",))):
        found.save(tmp_path)
        assert_same(Evaluation.load(tmp_path), found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outcomes.parquet", "rows.parquet"]


def test_a_save_that_was_cut_short_is_none(tmp_path, monkeypatch):
    drawn(1).save(tmp_path)
    written = []

    def cut(table: Any, path: Path) -> None:
        written.append(path)
        path.write_bytes(b"PAR1")
        raise OSError("no space left")

    monkeypatch.setattr("m3el_hf.evaluation.outcomes.pq.write_table", cut)
    with pytest.raises(OSError, match="no space left"):
        drawn(2).save(tmp_path)
    assert written == [tmp_path / "rows.parquet"]
    with pytest.raises(M3ELError, match=r"holds no outcomes\.parquet"):
        Evaluation.load(tmp_path)


def test_a_folder_without_an_evaluation_is_one_line(tmp_path):
    with pytest.raises(M3ELError, match=r"holds no outcomes\.parquet: pass a folder that"):
        Evaluation.load(tmp_path)
