"""From each topic to each topic; topics and sets that training has not seen."""

from __future__ import annotations

import numpy as np

from m3el_hf.evaluation.measure import CONTROL, MODEL
from m3el_hf.evaluation.outcomes import Evaluation
from m3el_hf.evaluation.report import Column, DataTable, Report, Value
from m3el_hf.experiments.comparisons import RULE, Seeds, compare, percent
from m3el_hf.experiments.config import Arm
from m3el_hf.experiments.findings.common import (
    baseline_cells,
    baseline_columns,
    estimate_of,
    on_topic,
    report_of,
    setting_of,
    topics_of,
)
from m3el_hf.experiments.runner import PLAIN, Look, Runner


def report_topics(runner: Runner) -> Report:
    """Shows every arm, which is trained on one topic, on each topic."""
    topics, baselines = topics_of(runner), runner.baselines()
    rows: list[tuple[Value, ...]] = []
    controls: list[tuple[Value, ...]] = []
    home: list[float] = []
    away: list[float] = []
    for arm in runner.experiment.arms:
        evaluations = runner.evaluations(arm)
        cells = [estimate_of(evaluations, MODEL, where=on_topic(baselines, topic)) for topic in topics]
        rows.append((arm.name, *cells))
        blind = (estimate_of(evaluations, CONTROL, where=on_topic(baselines, topic)) for topic in topics)
        controls.append((arm.name, *blind))
        for topic, cell in zip(topics, cells, strict=True):
            if cell is not None:
                (home if topic in (arm.topics or topics) else away).append(cell.value)
    by_topic = zip(*(baseline_cells(baselines, on_topic(baselines, topic)) for topic in topics), strict=True)
    others = [(column.name, *cells) for column, cells in zip(baseline_columns(), by_topic, strict=True)]
    answers = ["No model is measured both on a topic that it was trained on and on another."]
    if home and away:
        answers = [
            f"On the topic that it was trained on a model reaches {100 * np.mean(home):.1f} %, on the others "
            f"{100 * np.mean(away):.1f} %: means of {len(home)} and {len(away)} cells of the matrix, each with its own "
            "interval there."
        ]
    columns = (Column("trained on"), *(Column(topic, "%") for topic in topics))
    matrix = DataTable(
        key="topics",
        title="Trained on a row's topic, tested on a column's",
        about="Mean accuracy over the tasks in %, the mean over seeds; last chance, and baselines on one task each.",
        setting=setting_of(runner),
        columns=columns,
        rows=(*rows, *others),
        chart="heatmap",
        summary_rows=len(others),
    )
    control = DataTable(
        key="control",
        title="The same models blind to mentions",
        about="Mean accuracy over the tasks in %, the mean over seeds, of each model's mention-blind control.",
        setting=setting_of(runner),
        columns=columns,
        rows=tuple(controls),
        chart="heatmap",
    )
    return report_of(runner, answers, [matrix, control])


def report_transfer(runner: Runner) -> Report:
    """Shows the arms that lack a topic on that topic, beside the reference, which has it; and another set."""
    reference = runner.experiment.arm(runner.experiment.reference)
    table, answers = _held_out(runner, runner.evaluations(reference))
    tables = [table]
    if runner.other is None:
        answers.append("Another set was not measured: pass one with --other-data.")
    else:
        tables.append(_other_set(runner, reference))
        away = estimate_of(runner.evaluations(reference, Look(on_other=True)), MODEL)
        said = "lacks what every task shows" if away is None else f"is linked with {percent(away)}"
        answers.append(f"{runner.other.name}, which is of another source, {said}.")
    return report_of(runner, answers, tables)


def _held_out(runner: Runner, full: list[Evaluation]) -> tuple[DataTable, list[str]]:
    left_out = [
        (arm, topic)
        for arm in runner.experiment.arms
        for topic in topics_of(runner)
        if arm.topics is not None and topic not in arm.topics
    ]
    pairs = []
    for arm, topic in left_out:
        where = on_topic(full[0], topic)
        mine, theirs = Seeds.of(runner.evaluations(arm), MODEL, None, where), Seeds.of(full, MODEL, None, where)
        if mine is not None and theirs is not None:
            pairs.append((arm, topic, mine, theirs))
    compared = compare([(mine, theirs) for *_, mine, theirs in pairs])
    rows: list[tuple[Value, ...]] = []
    answers = []
    for (arm, topic, mine, theirs), one in zip(pairs, compared, strict=True):
        control = estimate_of(runner.evaluations(arm), CONTROL, where=on_topic(full[0], topic))
        others = baseline_cells(runner.baselines(), on_topic(full[0], topic))
        rows.append((topic, theirs.estimate, mine.estimate, control, one.estimate, one.verdict, *others))
        answers.append(f"On {topic}, the accuracy of a model that was not trained on it {one.said}.")
    columns = [Column("trained on it", "%"), Column("not trained on it", "%", is_strong=True), Column(CONTROL, "%")]
    table = DataTable(
        key="held-out-topics",
        title="Topics that training has not seen",
        about=f"Mean accuracy over the tasks in %, the mean over seeds; baselines on one task each. {RULE}",
        setting=setting_of(runner),
        columns=(Column("topic"), *columns, Column("difference", "points"), Column("verdict"), *baseline_columns()),
        rows=tuple(rows),
        tags=tuple({"topic": str(row[0])} for row in rows),
        chart="bars",
    )
    return table, answers


def _other_set(runner: Runner, reference: Arm) -> DataTable:
    assert runner.other is not None, "asked for where there is one"
    rows: list[tuple[Value, ...]] = []
    for name, look in ((runner.source.name, PLAIN), (runner.other.name, Look(on_other=True))):
        evaluations = runner.evaluations(reference, look)
        systems = [estimate_of(evaluations, system) for system in (MODEL, CONTROL)]
        rows.append((name, *systems, *baseline_cells(runner.baselines(look))))
    return DataTable(
        key="other-set",
        title="Another set",
        about=f"The model was trained on {runner.source.name}. Mean accuracy over the tasks in %; baselines on a task.",
        setting=setting_of(runner),
        columns=(Column("measured on"), Column(MODEL, "%", is_strong=True), Column(CONTROL, "%"), *baseline_columns()),
        rows=tuple(rows),
        chart="bars",
    )
