"""From each topic to each topic; topics and sets that training has not seen."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    for arm in runner.experiment.arms:
        evaluations = runner.evaluations(arm)
        cells = [estimate_of(evaluations, MODEL, where=on_topic(baselines, topic)) for topic in topics]
        rows.append((arm.name, *cells))
        blind = (estimate_of(evaluations, CONTROL, where=on_topic(baselines, topic)) for topic in topics)
        controls.append((arm.name, *blind))
    by_topic = zip(*(baseline_cells(baselines, on_topic(baselines, topic)) for topic in topics), strict=True)
    others = [(column.name, *cells) for column, cells in zip(baseline_columns(), by_topic, strict=True)]
    answers = ["On no topic are there both a model that was trained on it and one that was not."]
    if pair := _home_and_away(runner, topics):
        home, away = pair
        [compared] = compare([pair])
        answers = [
            f"A model that was trained on a mention's topic links it with {percent(home.estimate)}, the others with "
            f"{percent(away.estimate)} on average: the accuracy of the former {compared.said}."
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


def _home_and_away(runner: Runner, topics: list[str]) -> tuple[Seeds, Seeds] | None:
    """On the same rows, models trained on their topic, and the mean of the others; None where either is missing."""
    parts: list[tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64]]] = []
    for topic in topics:
        kinds: dict[bool, list[Seeds]] = {True: [], False: []}
        for arm in runner.experiment.arms:
            evaluations = runner.evaluations(arm)
            found = Seeds.of(evaluations, MODEL, None, on_topic(evaluations[0], topic))
            if found is not None:
                kinds[arm.topics is None or topic in arm.topics].append(found)
        if kinds[True] and kinds[False]:
            home, away = (np.mean([one.values for one in kinds[kind]], axis=0) for kind in (True, False))
            parts.append((kinds[True][0].golds, home, away))
    if not parts:
        return None
    golds = np.concatenate([golds for golds, *_ in parts])
    home, away = (np.concatenate([part[place] for part in parts], axis=1) for place in (1, 2))
    return Seeds(home, golds), Seeds(away, golds)


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
