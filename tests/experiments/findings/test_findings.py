"""Each kind of experiment from its text to its report; what is trained takes two steps, and the folder is shared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3el_hf import TASKS
from m3el_hf.data.manifest import Manifest
from m3el_hf.evaluation.ranking import paired_difference, sampled_hits
from m3el_hf.evaluation.report import DataTable, Estimate, Report
from m3el_hf.experiments.comparisons import RESAMPLES, Seeds, holm
from m3el_hf.experiments.findings import REPORTS, run_experiment
from m3el_hf.experiments.findings.common import setting_of
from m3el_hf.experiments.runner import Look, Runner
from tests.experiments.conftest import ARMS

ONE = """
title: One arm
question: What does it do?
kind: KIND
arms:
  CLIPND: {}
"""


def table_of(report: Report, key: str) -> DataTable:
    (found,) = (table for table in report.tables if table.key == key)
    return found


def cells(table: DataTable) -> dict[str, dict[str, Any]]:
    """The cells of a table by row and column."""
    names = [column.name for column in table.columns]
    return {str(row[0]): dict(zip(names, row, strict=True)) for row in table.rows}


@pytest.fixture(scope="module")
def done(runner: Callable[..., Runner], shared: Path) -> Callable[..., tuple[Runner, Report]]:
    """Runs an experiment in the shared folder."""

    def run(text: str, **options: object) -> tuple[Runner, Report]:
        one = runner(text, shared, **options)
        return one, run_experiment(one)

    return run


def test_arms_stand_beside_the_reference_and_the_baselines(done):
    runner, report = done(ARMS)
    found = {arm.name: runner.evaluations(arm) for arm in runner.experiment.arms}
    means = cells(table_of(report, "means"))
    for name, evaluations in found.items():
        figures = [one.mean("model") for one in evaluations]
        assert means[name]["mean"].value == pytest.approx(np.mean(figures))
        assert means[name]["mean"].deviation == pytest.approx(np.std(figures, ddof=1))
        assert means[name]["mention-blind control"].value == pytest.approx(
            np.mean([one.mean("mention-blind control") for one in evaluations])
        )
    difference = means["names"]["difference"].value
    assert difference == pytest.approx(means["names"]["mean"].value - means["whole"]["mean"].value)
    assert means["whole"]["difference"] is None
    by_task = cells(table_of(report, "tasks"))
    assert list(by_task) == [*runner.baselines().systems, "whole", "names"]
    assert by_task["chance"]["i2i"].value == pytest.approx(1 / 3)
    assert by_task["BM25"]["i2i"] is None
    assert by_task["names"]["i2t"].value == pytest.approx(
        np.mean([one.figures("model", "i2t")["accuracy"] for one in found["names"]])
    )
    differences = table_of(report, "differences").rows
    assert len(differences) == len(TASKS)
    golds, pair = runner.baselines().facts["gold"], (found["names"], found["whole"])
    raw = [
        paired_difference(*(Seeds.of(one, "model", task).values.mean(0) for one in pair), golds, resamples=RESAMPLES)
        for task in TASKS
    ]
    assert [row[3].value for row in differences] == holm([one.p_value for one in raw])  # of all tasks together
    assert report.answers[0].startswith("whole: ") and report.answers[1].startswith("names ")
    assert {example.system for example in report.examples} == {"model"}


def test_every_figure_carries_what_it_is_of(done):
    runner, report = done(ARMS)
    for table in report.tables:
        assert table.setting.line() == "test · candidate set of 3, as released · ties: expected rank · seed 0, 1"
    assert report.provenance["versions"]["torch"] and report.provenance["data"].startswith("m3el, revision ")
    assert report.provenance["settings of names"] == "template N"
    estimates = [value for table in report.tables for row in table.rows for value in row if isinstance(value, Estimate)]
    assert all(one.n == len(runner.source.rows) or one.low is None or one.n for one in estimates)
    assert json.loads(report.to_json())["tables"][0]["key"] == "means"


def test_data_without_leaks_are_not_said_to_be_as_released(runner, shared, store, tmp_path):
    deleaked = tmp_path / "deleaked"
    shutil.copytree(store, deleaked)
    replace(Manifest.load(store), protocol="deleaked").save(deleaked)
    one = runner(ARMS, shared, data=str(deleaked))
    assert setting_of(one, "encoded entities").protocol == "encoded entities, deleaked"


def test_one_seed_is_said_to_be_one(done):
    _, report = done(ARMS, seeds=(0,))
    assert any("trained with one seed" in note for note in report.notes)
    assert cells(table_of(report, "means"))["whole"]["mean"].deviation is None


def test_rows_that_chose_the_weights_are_said_to_flatter_them(done):
    notes = {split: done(ARMS, seeds=(0,), split=split)[1].notes for split in ("validation", "test")}
    assert any("chosen on the rows that are measured" in note for note in notes["validation"])
    assert not any("flatter" in note for note in notes["test"])


def test_topics_make_a_matrix(done):
    text = ARMS.replace("kind: arms", "kind: topics").replace("whole: {}", "person: {topics: [person]}")
    text = text.replace("names: {template: N}", "books: {topics: [books]}").replace("reference: whole\n", "")
    runner, report = done(text, seeds=(0,))
    matrix = cells(table_of(report, "topics"))
    [evaluation] = runner.evaluations(runner.experiment.arm("books"))
    where = evaluation.facts["topic"] == "person"
    assert matrix["books"]["person"].value == pytest.approx(evaluation.mean("model", where=where))
    assert matrix["books"]["person"].n == where.sum()
    home, away = [], []
    for topic, arms in (("person", ("person", "books")), ("books", ("books", "person"))):
        on = evaluation.facts["topic"] == topic
        figures = [runner.evaluations(runner.experiment.arm(arm))[0].values("model", where=on)[1] for arm in arms]
        home, away = [*home, *figures[0]], [*away, *figures[1]]
    assert f"topic links it with {100 * np.mean(home):.1f} %" in report.answers[0]
    assert f"the others with {100 * np.mean(away):.1f} %" in report.answers[0]
    assert "within noise" in report.answers[0] or "points" in report.answers[0]
    baselines = runner.baselines()
    assert matrix["chance"]["person"].value == pytest.approx(baselines.mean("chance", where=where))
    assert matrix["image hash, i2i"]["person"].value == baselines.figures("image hash", "i2i", where)["accuracy"]
    control = cells(table_of(report, "control"))
    assert control["books"]["person"].value == pytest.approx(evaluation.mean("mention-blind control", where=where))


def test_a_matrix_of_models_that_know_every_topic_has_no_others(done):
    _, report = done(ARMS.replace("kind: arms", "kind: topics"), seeds=(0,))
    assert report.answers == ("On no topic are there both a model that was trained on it and one that was not.",)


def test_what_training_lacked_is_measured_apart(done, store):
    text = ARMS.replace("kind: arms", "kind: transfer")
    text = text.replace("names: {template: N}", "without person: {topics: [movies, common, books, sports]}")
    runner, report = done(text, seeds=(0,), other_data=str(store))
    [[topic, full, without, control, difference, verdict, chance, *_]] = table_of(report, "held-out-topics").rows
    assert chance.value == pytest.approx(1 / 3)
    [evaluation] = runner.evaluations(runner.experiment.arm("without person"))
    where = evaluation.facts["topic"] == "person"
    assert (topic, without.n) == ("person", where.sum())
    assert without.value == pytest.approx(evaluation.mean("model", where=where))
    assert difference.value == pytest.approx(without.value - full.value)
    assert verdict in ("within noise", "higher", "lower") and control is not None
    other = table_of(report, "other-set").rows  # the same data once more: the same figures
    assert other[0][1] == other[1][1]
    [away] = runner.evaluations(runner.experiment.arm("whole"), Look(on_other=True))
    [home] = runner.evaluations(runner.experiment.arm("whole"))
    assert away.facts["seen"].tolist() == home.facts["seen"].tolist()  # by what the model was trained on
    _, alone = done(text, seeds=(0,))
    assert "pass one with --other-data" in alone.answers[-1]


def test_rare_entities_are_told_from_others(done):
    runner, report = done(ONE.replace("KIND", "familiarity") + "split_by_row: true\n", seeds=(0,))
    facts = runner.baselines().facts
    table = cells(table_of(report, "frequency"))
    for name, where in (("never", facts["train_golds"] == 0), ("once", facts["train_golds"] == 1)):
        assert (name in table) == where.any()
        if where.any():
            assert table[name]["rows"] == where.sum()
    for key in ("frequency", "popularity", "seen"):
        assert sum(row[-1] for row in table_of(report, key).rows) == len(facts["id"])
    assert all(table.setting.split == "test, split by row" for table in report.tables)
    assert any("memory of entities" in note for note in report.notes)


def test_conditions_are_compared_with_rows_as_they_are(done):
    text = ONE.replace("KIND", "conditions") + "conditions: [mention-without-picture, distractors-at-random]\n"
    runner, report = done(text, seeds=(0,))
    [arm] = runner.experiment.arms
    [plain], [changed] = runner.evaluations(arm), runner.evaluations(arm, Look("mention-without-picture"))
    changes = cells(table_of(report, "changes"))
    assert changes["mention-without-picture"]["change"].value == pytest.approx(
        changed.mean("model") - plain.mean("model")
    )
    assert changed.missing == plain.missing  # rows count as they were
    assert changed.figures("model", "i2i")["accuracy"] == pytest.approx(1 / 3)  # of which nothing is shown
    figures = cells(table_of(report, "conditions"))
    assert list(figures) == ["as it is", "mention-without-picture", "distractors-at-random"]
    assert "What a condition draws is drawn once, with the seed 0." in report.notes
    assert figures["distractors-at-random"]["string match, t2t"].value > figures["as it is"]["string match, t2t"].value


def test_scale_is_exact_and_falls(done):
    runner, report = done(ONE.replace("KIND", "scale"))
    [arm], look = runner.experiment.arms, Look(in_base=True)
    table = cells(table_of(report, "accuracy"))
    most = len(runner.source.entities)
    assert list(table)[0] == "3" and list(table)[-1] == str(most)
    outcomes = [one.outcomes["model"]["it2it"] for one in runner.evaluations(arm, look)]
    expected = np.mean([sampled_hits(one.greater, one.equal, one.candidates, 10).mean() for one in outcomes])
    assert table["10"]["model, it2it"].value == pytest.approx(expected)
    whole = [one.figures("model", "it2it")["accuracy"] for one in runner.evaluations(arm, look)]
    assert table[str(most)]["model, it2it"].value == pytest.approx(np.mean(whole))
    for name in ("model, it2it", "BM25, t2t", "chance"):
        values = [row[name].value for row in table.values()]
        assert values == sorted(values, reverse=True)
    assert all(time.value > 0 for _, time in table_of(report, "time").rows)


def test_there_is_a_report_of_every_kind(tmp_path, done):
    assert len(REPORTS) == 6
    _, report = done(ARMS)
    report.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"report.html", "report.md", "results.csv", "tables.tex"}
