"""From outcomes to a report: which tables an evaluation is shown by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m3el_hf.evaluation.facts import SEEN
from m3el_hf.evaluation.outcomes import Evaluation, Mask
from m3el_hf.evaluation.ranking import holm, share_interval
from m3el_hf.evaluation.report.document import Column, DataTable, Estimate, Example, Report, Setting, Value

KS = (1, 3, 5, 10, 20)

ABOUT_TASKS = "A task reads “mention 2 candidate”: t is text, i a picture, it both."


def evaluation_report(
    title: str,
    evaluation: Evaluation,
    setting: Setting,
    *,
    strong: str,
    examples: Sequence[Example] = (),
    notes: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
) -> Report:
    """Makes the report of one evaluation.

    Args:
        title: The heading.
        evaluation: What was counted.
        setting: What every figure carries.
        strong: The system that the report is about.
        examples: Mentions to look at.
        notes: What must be read with the figures.
        provenance: Where these come from.
    """
    tables = [accuracies(evaluation, setting, strong), differences(evaluation, setting, strong)]
    tables.append(rank_table(evaluation, setting, strong))
    facts = evaluation.facts
    if len(set(facts["topic"])) > 1:
        tables.append(topic_table(evaluation, setting, strong))
    if facts["seen"][0]:
        tables.append(familiarity(evaluation, setting, strong))
    if facts["own_picture"].any() or facts["like_picture"].any():
        tables.append(without_leaks(evaluation, setting, strong))
    if any(evaluation.missing.values()):
        tables.append(coverage(evaluation, setting))
    return Report(
        title, tables=tuple(tables), examples=tuple(examples), notes=tuple(notes), provenance=provenance or {}
    )


def accuracy(evaluation: Evaluation, system: str, task: str, where: Mask | None = None) -> Estimate | None:
    """A system's accuracy on a task with its interval, None where it has none."""
    found = evaluation.figures(system, task, where)
    if found is None:
        return None
    return Estimate(found["accuracy"], found["accuracy_low"], found["accuracy_high"], int(found["n"]))


def mean_accuracy(
    evaluation: Evaluation, system: str, where: Mask | None = None, figure: str = "accuracy"
) -> Estimate | None:
    """The mean over tasks with its interval, None as `Evaluation.mean` says."""
    found = evaluation.values(system, None, figure, where)
    if found is None:
        return None
    rows, values = found
    return Estimate(float(values.mean()), *share_interval(values, evaluation.facts["gold"][rows]), len(rows))


def pooled_accuracy(evaluation: Evaluation, system: str) -> Estimate | None:
    """The mean over all rows of all tasks (micro), None where the system cannot do a task that some row fits."""
    found = [evaluation.values(system, task.name) for task in evaluation.tasks if evaluation.evaluable(task.name)]
    parts = [part for part in found if part is not None]
    if not parts or len(parts) < len(found):
        return None
    values = np.concatenate([values for _, values in parts])
    golds = evaluation.facts["gold"][np.concatenate([rows for rows, _ in parts])]
    return Estimate(float(values.mean()), *share_interval(values, golds), len(values))


def accuracies(evaluation: Evaluation, setting: Setting, strong: str) -> DataTable:
    """Accuracy by task and system; last the mean of the tasks, and all rows of all tasks together."""
    tasks = [task.name for task in evaluation.tasks]
    rows: list[tuple[Value, ...]] = [
        (task, *(accuracy(evaluation, system, task) for system in evaluation.systems), evaluation.evaluable(task))
        for task in tasks
    ]
    if len(tasks) > 1:
        rows.append(("macro", *(mean_accuracy(evaluation, system) for system in evaluation.systems), None))
        rows.append(("micro", *(pooled_accuracy(evaluation, system) for system in evaluation.systems), None))
    chance = mean_accuracy(evaluation, "chance") if "chance" in evaluation.systems else None
    return DataTable(
        key="accuracy",
        title="Accuracy by task",
        about=f"Accuracy in % of linking each mention, Hits@1; macro is the mean of the tasks, micro all rows of all "
        f"tasks together. {ABOUT_TASKS}",
        setting=setting,
        columns=(Column("task"), *_systems(evaluation, strong), Column("n")),
        rows=tuple(rows),
        tags=(*({"task": task} for task in tasks), *({} for _ in rows[len(tasks) :])),
        chart="bars",
        chance=chance.value if chance else None,
        summary_rows=len(rows) - len(tasks),
    )


def differences(evaluation: Evaluation, setting: Setting, strong: str) -> DataTable:
    """By how much the strong system is better than each other, on each task and on their mean."""
    others = [system for system in evaluation.systems if system != strong]
    tasks = [task.name for task in evaluation.tasks]
    names = [None, *tasks] if len(tasks) > 1 else tasks
    found = [(other, task, evaluation.compare(strong, other, task)) for task in names for other in others]
    known = [(other, task, one) for other, task, one in found if one is not None]
    corrected = holm([one.p_value for *_, one in known])
    rows: list[tuple[Value, ...]] = [
        (other, task or "mean", Estimate(one.mean, one.low, one.high, one.n), Estimate(p_value))
        for (other, task, one), p_value in zip(known, corrected, strict=True)
    ]
    return DataTable(
        key="differences",
        title=f"{strong} beside each other system",
        about="Points of accuracy by which it is better on the same rows, with 95 % intervals, and the p-value of a "
        "paired randomisation test, corrected for all comparisons of this table (Holm).",
        setting=setting,
        columns=(Column("than"), Column("task"), Column("difference", "points"), Column("corrected p")),
        rows=tuple(rows),
        tags=tuple({"task": task, "system": other} if task else {"system": other} for other, task, _ in known),
    )


def rank_table(evaluation: Evaluation, setting: Setting, strong: str) -> DataTable:
    """Hits@k, MRR and ranks of every system on every task."""
    most = max(
        (int(one.candidates.max()) for by in evaluation.outcomes.values() for one in by.values() if one.rows.size),
        default=1,
    )
    ks = [k for k in KS if k < most]
    rows: list[tuple[Value, ...]] = []
    tags = []
    for task in evaluation.tasks:
        for system in evaluation.systems:
            found = evaluation.figures(system, task.name)
            if found is not None:
                shares = [Estimate(found[name], n=int(found["n"])) for name in (*(f"hits@{k}" for k in ks), "mrr")]
                ranks = [
                    Estimate(found[name]) if np.isfinite(found[name]) else None for name in ("mean_rank", "median_rank")
                ]
                others = [Estimate(found[name]) for name in ("tie_share", "ceiling")]
                rows.append((system, task.name, *shares, *ranks, *others, int(found["n"])))
                tags.append({"task": task.name, "system": system})
    columns = [Column(f"Hits@{k}", "%") for k in ks] + [Column("MRR", "%"), Column("mean rank"), Column("median rank")]
    columns += [Column("ties", "%"), Column("ceiling", "%"), Column("n")]
    return DataTable(
        key="ranks",
        title="Ranks of the gold",
        about="Ties: rows whose first place the gold shares. Ceiling: rows whose gold is among the candidates; others "
        "count as wrong, and are left out of mean and median rank.",
        setting=setting,
        columns=(Column("system"), Column("task"), *columns),
        rows=tuple(rows),
        tags=tuple(tags),
    )


def topic_table(evaluation: Evaluation, setting: Setting, strong: str) -> DataTable:
    """Accuracy of one system by topic and task; last over all rows, and the mean of the topics."""
    topics = sorted(set(evaluation.facts["topic"]))
    tasks = [task.name for task in evaluation.tasks]
    rows: list[tuple[Value, ...]] = []
    for topic in topics:
        where = evaluation.facts["topic"] == topic
        cells = [accuracy(evaluation, strong, task, where) for task in tasks]
        rows.append((topic or "without topic", *cells, mean_accuracy(evaluation, strong, where), int(where.sum())))
    micro = [accuracy(evaluation, strong, task) for task in tasks]
    rows.append(("all rows (micro)", *micro, mean_accuracy(evaluation, strong), len(evaluation)))
    columns = [[row[place] for row in rows[:-1]] for place in range(1, len(tasks) + 2)]
    rows.append(("mean of topics (macro)", *map(_mean, columns), None))
    return DataTable(
        key="topics",
        title=f"Accuracy of {strong} by topic and task",
        about=ABOUT_TASKS,
        setting=setting,
        columns=(Column("topic"), *(Column(task, "%") for task in tasks), Column("mean", "%"), Column("rows")),
        rows=tuple(rows),
        tags=(*({"topic": topic} for topic in topics), {}, {}),
        chart="heatmap",
        summary_rows=2,
    )


def familiarity(evaluation: Evaluation, setting: Setting, strong: str) -> DataTable:
    """Accuracy by how training has met the gold."""
    rows: list[tuple[Value, ...]] = []
    for seen in SEEN:
        where = evaluation.facts["seen"] == seen
        if where.any():
            cells = [mean_accuracy(evaluation, system, where) for system in evaluation.systems]
            rows.append((seen, *cells, int(where.sum())))
    return DataTable(
        key="seen",
        title="Golds that training has met, and others",
        about="Mean accuracy over the tasks by how the gold stands in the training rows.",
        setting=setting,
        columns=(Column("gold seen"), *_systems(evaluation, strong), Column("rows")),
        rows=tuple(rows),
    )


def without_leaks(evaluation: Evaluation, setting: Setting, strong: str) -> DataTable:
    """Accuracy without the rows whose mention shows the gold's own picture, on the tasks that show it."""
    rows: list[tuple[Value, ...]] = []
    for task in evaluation.tasks:
        fitting = next((one[task.name].rows for one in evaluation.outcomes.values() if task.name in one), None)
        if task.mention.has_image and fitting is not None and len(fitting):
            for name, near in (("the gold's own", False), ("near-same too", True)):
                kept = evaluation.deleaked(task.name, near)
                cells = [accuracy(evaluation, system, task.name, kept) for system in evaluation.systems]
                rows.append((task.name, name, *cells, int(kept[fitting].sum()), int((~kept[fitting]).sum())))
    return DataTable(
        key="deleaked",
        title="Without leaked rows",
        about="Accuracy in % without the rows whose mention's picture is the gold's own, byte for byte, and without "
        "those where it is near-same by its perceptual hash, which sees no colour.",
        setting=Setting(setting.split, f"{setting.protocol}, deleaked", setting.ties, setting.seed),
        columns=(
            Column("task"),
            Column("without pictures"),
            *_systems(evaluation, strong),
            Column("n"),
            Column("left out"),
        ),
        rows=tuple(rows),
        tags=tuple({"task": str(row[0])} for row in rows),
    )


def coverage(evaluation: Evaluation, setting: Setting) -> DataTable:
    """How many rows count for each task, and why others do not."""
    reasons = sorted({reason for counts in evaluation.missing.values() for reason in counts})
    rows: list[tuple[Value, ...]] = []
    for task in evaluation.tasks:
        missing = evaluation.missing[task.name]
        share = Estimate(evaluation.evaluable(task.name) / len(evaluation), n=len(evaluation))
        rows.append((task.name, evaluation.evaluable(task.name), share, *(missing.get(one, 0) for one in reasons)))
    return DataTable(
        key="coverage",
        title="Rows that count",
        about=f"A row counts for a task if it has what the task shows; there are {len(evaluation):,} rows.",
        setting=setting,
        columns=(Column("task"), Column("n"), Column("share", "%"), *map(Column, reasons)),
        rows=tuple(rows),
        tags=tuple({"task": task.name} for task in evaluation.tasks),
    )


def _systems(evaluation: Evaluation, strong: str) -> list[Column]:
    return [Column(system, "%", is_strong=system == strong) for system in evaluation.systems]


def _mean(cells: Sequence[Any]) -> Estimate | None:
    """The plain mean of figures, without an interval; None where one is missing."""
    if any(cell is None for cell in cells):
        return None
    return Estimate(float(np.mean([cell.value for cell in cells])))
