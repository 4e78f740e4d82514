"""From an experiment's evaluations to its report: figures, what they say, and what is within noise."""

from __future__ import annotations

from collections.abc import Callable

from m3el_hf.evaluation.report import Report
from m3el_hf.experiments.config import Arm, Kind
from m3el_hf.experiments.findings.arms import report_arms
from m3el_hf.experiments.findings.familiarity import report_familiarity
from m3el_hf.experiments.findings.robustness import report_conditions
from m3el_hf.experiments.findings.scale import report_scale
from m3el_hf.experiments.findings.topics import report_topics, report_transfer
from m3el_hf.experiments.runner import PLAIN, Look, Runner

REPORTS: dict[Kind, Callable[[Runner], Report]] = {
    "arms": report_arms,
    "topics": report_topics,
    "transfer": report_transfer,
    "familiarity": report_familiarity,
    "conditions": report_conditions,
    "scale": report_scale,
}


def run_experiment(runner: Runner) -> Report:
    """Does what an experiment needs, and returns its report.

    Raises:
        M3ELError: If the data does not have what the experiment asks for, or a run was told to stop.
    """
    runner.do(_looks(runner))
    return REPORTS[runner.experiment.kind](runner)


def _looks(runner: Runner) -> list[tuple[Arm, Look]]:
    experiment = runner.experiment
    reference = experiment.arm(experiment.reference)
    if experiment.kind == "scale":
        return [(reference, Look(in_base=True))]
    looks = [(arm, PLAIN) for arm in experiment.arms]
    looks += [(reference, Look(condition=name)) for name in experiment.conditions]
    if experiment.kind == "transfer" and runner.other is not None:
        looks.append((reference, Look(on_other=True)))
    return looks
