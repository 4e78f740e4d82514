"""Accuracy among as many candidates, and how long that takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from m3el_hf.evaluation.measure import CONTROL, MODEL
from m3el_hf.evaluation.outcomes import Evaluation
from m3el_hf.evaluation.ranking import sampled_hits
from m3el_hf.evaluation.report import Column, DataTable, Estimate, Report, Value
from m3el_hf.experiments.comparisons import Seeds, percent
from m3el_hf.experiments.findings.common import STRONGEST_ON, report_of, setting_of
from m3el_hf.experiments.runner import Look, Runner, sizes

MODELS = ((MODEL, "it2it"), (MODEL, "t2t"), (MODEL, "i2i"), (CONTROL, "it2it"))


def report_scale(runner: Runner) -> Report:
    """Makes the report."""
    arm, look = runner.experiment.arm(runner.experiment.reference), Look(in_base=True)
    evaluations, baselines = runner.evaluations(arm, look), runner.baselines(look)
    counts = sizes(len(runner.source.entities))
    rows: list[tuple[Value, ...]] = []
    for count in counts:
        cells = [_among(evaluations, system, task, count) for system, task in MODELS]
        cells += [_among([baselines], system, task, count) for task, some in STRONGEST_ON.items() for system in some]
        rows.append((f"{count:,}", *cells, Estimate(1 / count)))
    answers = []
    for place, (_, task) in enumerate(MODELS[:3], 1):
        first, last = rows[0][place], rows[-1][place]
        if isinstance(first, Estimate) and isinstance(last, Estimate):
            answers.append(
                f"{task}: from {percent(first)} among {counts[0]} candidates to {percent(last)} among all "
                f"{counts[-1]:,} entities."
            )
    times = {count: float(np.mean([one[str(count)] for one in runner.timings(arm)])) for count in counts}
    answers.append(
        f"A mention is scored in {times[counts[0]]:.3g} ms among {counts[0]}, in {times[counts[-1]]:.3g} ms among "
        f"{counts[-1]:,}."
    )
    names = [*MODELS, *((system, task) for task, some in STRONGEST_ON.items() for system in some)]
    columns = [Column(f"{system}, {task}", "%", is_strong=place == 0) for place, (system, task) in enumerate(names)]
    table = DataTable(
        key="accuracy",
        title="Accuracy by number of candidates",
        about="Accuracy in % where the gold stands among so many entities, the others drawn at random without "
        "replacement: computed exactly from the gold's rank among all entities, so that no draw adds noise.",
        setting=setting_of(runner, "random candidates of the knowledge base"),
        columns=(Column("candidates"), *columns, Column("chance", "%")),
        rows=tuple(rows),
        chart="lines",
    )
    return report_of(runner, answers, (table, _times(runner, times)), with_examples=False)


def _times(runner: Runner, times: dict[int, float]) -> DataTable:
    return DataTable(
        key="time",
        title="Time by number of candidates",
        about="Milliseconds in which one mention, of 64 that are scored together, is scored against so many encoded "
        "entities by all that both show; the mean over seeds of the fastest of three runs. Encoding is left out.",
        setting=setting_of(runner, "encoded entities"),
        columns=(Column("candidates"), Column("time", "ms", is_strong=True)),
        rows=tuple((f"{count:,}", Estimate(time)) for count, time in times.items()),
        chart="lines",
    )


def _among(evaluations: Sequence[Evaluation], system: str, task: str, count: int) -> Estimate | None:
    """A system's accuracy among so many candidates, over seeds; None where no row fits the task."""
    outcomes = [evaluation.outcomes[system][task] for evaluation in evaluations]
    if not len(outcomes[0].rows):
        return None
    values = np.stack([sampled_hits(one.greater, one.equal, one.candidates, count) for one in outcomes])
    return Seeds(values, evaluations[0].facts["gold"][outcomes[0].rows]).estimate
