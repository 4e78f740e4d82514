"""Accuracy by how often training has met a row's entity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from m3el_hf.evaluation.facts import SEEN
from m3el_hf.evaluation.measure import CONTROL, MODEL
from m3el_hf.evaluation.outcomes import Evaluation, Mask
from m3el_hf.evaluation.report import Column, DataTable, Report, Value
from m3el_hf.experiments.comparisons import Seeds, percent, unpaired
from m3el_hf.experiments.findings.common import baseline_cells, baseline_columns, estimate_of, report_of, setting_of
from m3el_hf.experiments.runner import Runner

NOTE = (
    "Rows were split anew at random, so that training has met entities of test rows: these figures measure memory of "
    "entities beside linking, and are not to be compared with those of other experiments. Rows of one name may stand "
    "in training and in test."
)


def report_familiarity(runner: Runner) -> Report:
    """Makes the report."""
    evaluations, facts = (
        runner.evaluations(runner.experiment.arm(runner.experiment.reference)),
        runner.baselines().facts,
    )
    golds, rows = facts["train_golds"], facts["train_rows"]
    frequency = [
        ("never", golds == 0),
        ("once", golds == 1),
        ("twice", golds == 2),
        ("3 or 4 times", (golds >= 3) & (golds <= 4)),
    ]
    frequency.append(("5 times or more", golds >= 5))
    popularity = [
        (f"{low} to {high} rows" if low < high else f"{low} rows", (rows >= low) & (rows <= high))
        for low, high in _quarters(rows)
    ]
    tables = [
        _table(runner, "frequency", "By how often training has the entity as a gold", frequency),
        _table(runner, "popularity", "By the number of training rows that list the entity", popularity),
        _table(runner, "seen", "By how training has met the entity", [(one, facts["seen"] == one) for one in SEEN]),
    ]
    middle = float(np.median(rows))
    answers = [
        _contrast(evaluations, "entities that were golds in training", golds > 0, "those that never were", golds == 0),
        _contrast(
            evaluations,
            f"entities that more than {middle:g} training rows list",
            rows > middle,
            "those that as many or fewer list",
            rows <= middle,
        ),
    ]
    return report_of(runner, answers, tables, [NOTE])


def _table(runner: Runner, key: str, title: str, buckets: Sequence[tuple[str, Mask]]) -> DataTable:
    evaluations = runner.evaluations(runner.experiment.arm(runner.experiment.reference))
    baselines = runner.baselines()
    rows: list[tuple[Value, ...]] = []
    for name, where in buckets:
        if where.any():
            systems = [estimate_of(evaluations, system, where=where) for system in (MODEL, CONTROL)]
            rows.append((name, *systems, *baseline_cells(baselines, where), int(where.sum())))
    return DataTable(
        key=key,
        title=title,
        about="Mean accuracy over the tasks in %, the mean over seeds; baselines on one task each.",
        setting=setting_of(runner),
        columns=(
            Column("entity"),
            Column(MODEL, "%", is_strong=True),
            Column(CONTROL, "%"),
            *baseline_columns(),
            Column("rows"),
        ),
        rows=tuple(rows),
        chart="bars",
    )


def _contrast(evaluations: list[Evaluation], one: str, ones: Mask, other: str, others: Mask) -> str:
    """Compares two groups of rows, which are not paired."""
    mine, theirs = (Seeds.of(evaluations, MODEL, None, where) for where in (ones, others))
    if mine is None or theirs is None:
        return f"There are no rows to compare {one} with {other}."
    found, seeds_agree = unpaired(mine, theirs)
    assert found.low is not None and found.high is not None, "a bootstrap gives both"
    points = f"{100 * found.value:+.1f} points (95 % interval {100 * found.low:+.1f} to {100 * found.high:+.1f})"
    verdict = "more than noise" if seeds_agree and not found.low <= 0 <= found.high else "within noise"
    return (
        f"Of {one} {percent(mine.estimate)} are linked, of {other} {percent(theirs.estimate)}: {points}, which is "
        f"{verdict}."
    )


def _quarters(values: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Ranges of whole numbers that hold about a quarter of the values each; fewer where few values differ."""
    ends = sorted({int(np.quantile(values, share, method="higher")) for share in (0.25, 0.5, 0.75, 1)})
    starts = [int(values.min()), *(end + 1 for end in ends[:-1])]
    return list(zip(starts, ends, strict=True))
