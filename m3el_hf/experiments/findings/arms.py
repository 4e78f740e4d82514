"""Every arm on every task, and how it differs from the reference."""

from __future__ import annotations

from collections.abc import Iterable

from m3el_hf.evaluation.measure import CONTROL, MODEL
from m3el_hf.evaluation.outcomes import Evaluation
from m3el_hf.evaluation.report import Column, DataTable, Estimate, Report, Value
from m3el_hf.evaluation.report.contents import ABOUT_TASKS, accuracy, mean_accuracy
from m3el_hf.experiments.comparisons import RULE, Comparison, Seeds, compare, percent
from m3el_hf.experiments.findings.common import estimate_of, needed, report_of, setting_of
from m3el_hf.experiments.runner import Runner
from m3el_hf.tasks import TASKS

Found = dict[str, list[Evaluation]]


def report_arms(runner: Runner) -> Report:
    """Makes the report."""
    reference = runner.experiment.reference
    found = {arm.name: runner.evaluations(arm) for arm in runner.experiment.arms}
    baselines = runner.baselines()
    means = {name: compared for (name, _), compared in _compared(found, reference, [None]).items()}
    answers = [f"{reference}: {percent(needed(Seeds.of(found[reference], MODEL)).estimate)}, the mean over the tasks."]
    answers += [f"{name} {compared.said}." for name, compared in means.items()]
    tables = (
        _means(runner, found, baselines, means),
        _by_task(runner, found, baselines),
        _differences(runner, found),
    )
    return report_of(runner, answers, tables)


def _compared(found: Found, reference: str, tasks: Iterable[str | None]) -> dict[tuple[str, str | None], Comparison]:
    """All arms beside the reference on each task, where both have it; all are corrected together."""
    pairs = {}
    for task in tasks:
        theirs = Seeds.of(found[reference], MODEL, task)
        for name in (name for name in found if name != reference):
            mine = Seeds.of(found[name], MODEL, task)
            if mine is not None and theirs is not None:
                pairs[name, task] = (mine, theirs)
    return dict(zip(pairs, compare(list(pairs.values())), strict=True))


def _means(runner: Runner, found: Found, baselines: Evaluation, means: dict[str, Comparison]) -> DataTable:
    rows: list[tuple[Value, ...]] = []
    leaks = baselines.facts["own_picture"] | baselines.facts["like_picture"]
    for name, evaluations in found.items():
        compared = means.get(name)
        cells = (compared.estimate, Estimate(compared.p_value), compared.verdict) if compared else (None, None, "")
        figures = [estimate_of(evaluations, MODEL), estimate_of(evaluations, CONTROL)]
        rows.append((name, *figures, *cells, *([estimate_of(evaluations, MODEL, where=~leaks)] if leaks.any() else [])))
    return DataTable(
        key="means",
        title="Mean over the tasks",
        about=f"Accuracy in %, and its difference from {runner.experiment.reference} in points, paired by row. {RULE}"
        + (
            f" Leaked are {leaks.sum()} rows: their mention shows the gold's or a near-same picture."
            if leaks.any()
            else ""
        ),
        setting=setting_of(runner),
        columns=(
            Column("model"),
            Column("mean", "%", is_strong=True),
            Column(CONTROL, "%"),
            Column("difference", "points"),
            Column("corrected p"),
            Column("verdict"),
            *([Column("without leaked rows", "%")] if leaks.any() else []),
        ),
        rows=tuple(rows),
        chart="bars",
        chance=baselines.mean("chance"),
    )


def _by_task(runner: Runner, found: Found, baselines: Evaluation) -> DataTable:
    tasks = [task.name for task in baselines.tasks]
    rows: list[tuple[Value, ...]] = [
        (name, mean_accuracy(baselines, name), *(accuracy(baselines, name, task) for task in tasks))
        for name in baselines.systems
    ]
    rows += [
        (name, *(estimate_of(evaluations, MODEL, task) for task in (None, *tasks)))
        for name, evaluations in found.items()
    ]
    return DataTable(
        key="tasks",
        title="By task, beside the baselines",
        about=f"Accuracy in %, the mean over seeds, with ± their standard deviation. {ABOUT_TASKS}",
        setting=setting_of(runner),
        columns=(Column("system"), Column("mean", "%"), *(Column(task, "%") for task in tasks)),
        rows=tuple(rows),
        tags=tuple({"system": str(row[0])} for row in rows),
        chart="heatmap",
    )


def _differences(runner: Runner, found: Found) -> DataTable:
    rows: list[tuple[Value, ...]] = [
        (name, task, compared.estimate, Estimate(compared.p_value), compared.verdict)
        for (name, task), compared in _compared(found, runner.experiment.reference, TASKS).items()
    ]
    return DataTable(
        key="differences",
        title=f"Differences from {runner.experiment.reference}, by task",
        about=f"Points of accuracy, paired by row; p-values are corrected for all comparisons of this table. {RULE}",
        setting=setting_of(runner),
        columns=(
            Column("model"),
            Column("task"),
            Column("difference", "points"),
            Column("corrected p"),
            Column("verdict"),
        ),
        rows=tuple(rows),
        tags=tuple({"task": str(row[1]), "system": str(row[0])} for row in rows),
    )
