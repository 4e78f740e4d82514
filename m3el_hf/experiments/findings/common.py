"""What the reports of all experiments share."""

from __future__ import annotations

from collections.abc import Sequence

from m3el_hf.evaluation.examples import errors
from m3el_hf.evaluation.measure import CONTROL_NOTE
from m3el_hf.evaluation.outcomes import Evaluation, Mask
from m3el_hf.evaluation.report import Column, DataTable, Estimate, Report, Setting, Value
from m3el_hf.evaluation.report.contents import accuracy, mean_accuracy
from m3el_hf.experiments.comparisons import Seeds
from m3el_hf.experiments.runner import Runner
from m3el_hf.tasks import TOPICS

STRONGEST_ON = {"t2t": ("string match", "character match", "BM25"), "i2i": ("image hash",)}
"""Baselines that stand beside a model, by the task on which they do."""


def report_of(
    runner: Runner,
    answers: Sequence[str],
    tables: Sequence[DataTable],
    notes: Sequence[str] = (),
    *,
    with_examples: bool = True,
) -> Report:
    """Makes the report of an experiment; its examples are errors of the reference's first model."""
    experiment, seeds = runner.experiment, runner.options.seeds
    examples = []
    if with_examples:
        arm = experiment.arm(experiment.reference)
        examples = errors(runner.evaluations(arm)[0], runner.model(arm, seeds[0]), runner.source.rows)
    about_seeds = (
        f"Each model was trained with {len(seeds)} seeds; so few say little of what another seed would do."
        if len(seeds) > 1
        else "Each model was trained with one seed: what another would do is not known, and no difference is sure."
    )
    used = {"train": "trained on", "validation": "chosen on"}.get(runner.options.split)
    flattered = [f"Weights were {used} the rows that are measured: these figures flatter them."] if used else []
    return Report(
        title=experiment.title,
        question=experiment.question,
        answers=tuple(answers),
        tables=tuple(tables),
        examples=tuple(examples),
        notes=(*([experiment.note] if experiment.note else []), *notes, *flattered, CONTROL_NOTE, about_seeds),
        provenance=runner.provenance,
    )


def setting_of(runner: Runner, protocol: str | None = None) -> Setting:
    """What every figure of an experiment carries.

    Args:
        runner: What was measured.
        protocol: Among what the gold was sought; None for each mention's own candidates.
    """
    protocol = f"{protocol or runner.baselines().protocol}, {runner.source.protocol}"
    split = runner.options.split + (", split by row" if runner.experiment.split_by_row else "")
    return Setting(split, protocol, "expected rank", ", ".join(map(str, runner.options.seeds)))


def estimate_of(
    evaluations: list[Evaluation], system: str, task: str | None = None, where: Mask | None = None
) -> Estimate | None:
    """A system's accuracy over seeds, the mean over tasks where the task is None; None where there is none."""
    found = Seeds.of(evaluations, system, task, where)
    return None if found is None else found.estimate


def needed(found: Seeds | None) -> Seeds:
    """A model's values, which there are: a model scores every task that some row fits."""
    assert found is not None, "no row fits any task, which the evaluation would have refused"
    return found


def baseline_columns() -> list[Column]:
    """Chance over all tasks, and a column for each other baseline, on the task on which it does most."""
    strong = [Column(f"{system}, {task}", "%") for task, systems in STRONGEST_ON.items() for system in systems]
    return [Column("chance", "%"), *strong]


def baseline_cells(baselines: Evaluation, where: Mask | None = None) -> list[Value]:
    """The figures of `baseline_columns`."""
    strong = [accuracy(baselines, one, task, where) for task, systems in STRONGEST_ON.items() for one in systems]
    return [mean_accuracy(baselines, "chance", where), *strong]


def topics_of(runner: Runner) -> list[str]:
    """The topics that measured rows have, M³EL's first, in its order."""
    known = {topic for topic in runner.source.rows["topic"] if topic is not None}
    return [topic for topic in TOPICS if topic in known] + sorted(known - {*TOPICS})


def on_topic(evaluation: Evaluation, topic: str) -> Mask:
    """Which rows are of a topic."""
    where: Mask = evaluation.facts["topic"] == topic
    return where
