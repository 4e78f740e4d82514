"""The reference under each condition."""

from __future__ import annotations

from m3el_hf.evaluation.measure import CONTROL, MODEL
from m3el_hf.evaluation.report import Column, DataTable, Estimate, Report, Value
from m3el_hf.experiments.comparisons import RULE, Comparison, Seeds, compare, percent
from m3el_hf.experiments.conditions import CONDITIONS
from m3el_hf.experiments.findings.common import (
    baseline_cells,
    baseline_columns,
    estimate_of,
    needed,
    report_of,
    setting_of,
)
from m3el_hf.experiments.runner import DRAWN_WITH, PLAIN, Look, Runner

RANDOM = "distractors-at-random"

WORST = 6
"""Conditions that the answers name."""


def report_conditions(runner: Runner) -> Report:
    """Makes the report."""
    arm = runner.experiment.arm(runner.experiment.reference)
    plain = needed(Seeds.of(runner.evaluations(arm), MODEL))
    names = runner.experiment.conditions
    changed = {name: needed(Seeds.of(runner.evaluations(arm, Look(name)), MODEL)) for name in names}
    changes = dict(zip(names, compare([(one, plain) for one in changed.values()]), strict=True))
    worst = sorted((one for one in changes if not changes[one].is_noise), key=lambda one: changes[one].difference.mean)
    noise = [name for name, one in changes.items() if one.is_noise]
    answers = [f"As it is: {percent(plain.estimate)}, the mean over the tasks."]
    answers += [f"Where {CONDITIONS[name].about}, it {changes[name].said}." for name in worst[:WORST]]
    if worst[WORST:]:
        answers.append(f"More than noise too: {', '.join(worst[WORST:])}.")
    if noise:
        answers.append(f"Within noise: {', '.join(noise)}.")
    alike = [name for name in names if name.startswith("distractors-of-")]
    if RANDOM in names:  # else other distractors and more alike ones would be one change
        compared = compare([(changed[name], changed[RANDOM]) for name in alike])
        answers += [
            f"Where {CONDITIONS[name].about}, it {one.said}, beside distractors at random."
            for name, one in zip(alike, compared, strict=True)
        ]
    tables = (_changes(runner, changes), _figures(runner), _meanings(runner))
    return report_of(runner, answers, tables, [f"What a condition draws is drawn once, with the seed {DRAWN_WITH}."])


def _changes(runner: Runner, changes: dict[str, Comparison]) -> DataTable:
    return DataTable(
        key="changes",
        title="What each condition changes",
        about=f"Points of the mean accuracy over the tasks, paired by row. Training knows no condition. {RULE}",
        setting=setting_of(runner),
        columns=(
            Column("condition"),
            Column("change", "points", is_strong=True),
            Column("corrected p"),
            Column("verdict"),
        ),
        rows=tuple((name, one.estimate, Estimate(one.p_value), one.verdict) for name, one in changes.items()),
        chart="bars",
    )


def _meanings(runner: Runner) -> DataTable:
    return DataTable(
        key="meanings",
        title="What is done",
        about="What each condition does to the rows that are measured.",
        setting=setting_of(runner),
        columns=(Column("condition"), Column("what it does")),
        rows=tuple((name, CONDITIONS[name].about) for name in runner.experiment.conditions),
    )


def _figures(runner: Runner) -> DataTable:
    arm = runner.experiment.arm(runner.experiment.reference)
    rows: list[tuple[Value, ...]] = []
    for look in (PLAIN, *map(Look, runner.experiment.conditions)):
        evaluations = runner.evaluations(arm, look)
        cells = [estimate_of(evaluations, MODEL, task) for task in (None, "t2t", "i2i", "it2it")]
        others = baseline_cells(runner.baselines(look))
        rows.append((look.condition or "as it is", *cells, estimate_of(evaluations, CONTROL), *others))
    columns = [Column("mean", "%", is_strong=True), *(Column(task, "%") for task in ("t2t", "i2i", "it2it"))]
    return DataTable(
        key="conditions",
        title="Under each condition",
        about="Accuracy of the model in %, the mean over seeds: the mean over the tasks, and three tasks; then the "
        "control and baselines under the same condition. Rows count for the tasks that they fit as they were; what "
        "then shows nothing of a task is at chance.",
        setting=setting_of(runner),
        columns=(Column("condition"), *columns, Column(CONTROL, "%"), *baseline_columns()),
        rows=tuple(rows),
        chart="heatmap",
    )
