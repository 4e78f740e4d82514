"""One run of `m3el-hf evaluate`: load, measure, write the report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from datasets import Dataset

from m3el_hf.data.collator import EntityRow
from m3el_hf.data.manifest import Manifest
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.baselines import baselines
from m3el_hf.evaluation.examples import errors
from m3el_hf.evaluation.knowledge_base import Nil, evaluate_knowledge_base
from m3el_hf.evaluation.measure import CONTROL, CONTROL_NOTE, beside, measure
from m3el_hf.evaluation.outcomes import Evaluation
from m3el_hf.evaluation.report import Report, Setting, software
from m3el_hf.evaluation.report.contents import evaluation_report
from m3el_hf.evaluation.systems import ModelSystem
from m3el_hf.sources import fetch_built, load_built, load_model, public_name
from m3el_hf.tasks import TASKS, get_task

PLAIN_NAMES = ("best", "last", "model")
"""Names of folders that say nothing of the model in them."""

Against = Literal["candidates", "knowledge-base"]


@dataclass(frozen=True)
class EvaluationOptions:
    """What an evaluation can be told.

    Attributes:
        models: Folders or Hub ids of saved models, or of plain CLIPs. The last is the one that the report is about.
        data: Folder or Hub id of a built dataset.
        split: Which rows.
        tasks: Names of tasks; None for all nine among candidates, and ``it2it`` in a knowledge base.
        against: Among each mention's own candidates, or all entities of the dataset; None for candidates where there
            are some.
        nil: As `evaluate_knowledge_base` has it.
        nil_score: The score of NIL for the models and the control; baselines, whose scores are of other scales, never
            answer NIL.
        output: The folder for the report and all counts.
        cache_dir: Where encoded entities are kept for the next time; None to keep none.
    """

    models: Sequence[str]
    data: str
    split: str = "test"
    tasks: Sequence[str] | None = None
    against: Against | None = None
    nil: Nil = "drop"
    nil_score: float | None = None
    output: Path = Path("runs/evaluate")
    cache_dir: Path | None = None


def run_evaluation(options: EvaluationOptions) -> Report | None:
    """Measures, and writes the report; every process of a run calls it, and the main one alone writes.

    Returns:
        The report; None in the other processes.

    Raises:
        M3ELError: If the models, the data or a setting cannot be used.
    """
    manifest = Manifest.load(fetch_built(options.data))
    against = options.against or ("candidates" if manifest.kind == "candidates" else "knowledge-base")
    if against == "candidates" and manifest.kind == "knowledge_base":
        raise M3ELError(f"mentions in {options.data} have no candidates of their own: measure against knowledge-base")
    if against == "candidates" and (options.nil != "drop" or options.nil_score is not None):
        raise M3ELError("nil and nil_score are for a knowledge base: measure against knowledge-base, or leave them out")
    if (options.nil == "entity") != (options.nil_score is not None):
        raise M3ELError("NIL has a score just where it is an entity: pass --nil entity and --nil-score together")
    tasks = [get_task(name) for name in options.tasks or (TASKS if against == "candidates" else ("it2it",))]
    data = load_built(options.data, "all" if manifest.kind == "candidates" else "mentions")
    if options.split not in data:
        raise M3ELError(f"{options.data} has no split {options.split!r}: it has {', '.join(data)}")
    rows, training = data[options.split], data.get("train") if options.split != "train" else None
    accelerator = Accelerator() if int(os.environ.get("WORLD_SIZE", 1)) > 1 else None
    models = _load(options.models, accelerator)
    common: dict[str, Any] = {"training": training, "cache_dir": options.cache_dir, "accelerator": accelerator}
    if against == "candidates":
        evaluation = measure(models, rows, tasks, **common, progress=True)
    else:
        entities = load_built(options.data, "entities")["train"]
        systems = beside(models, rows, baselines(_texts_of(entities)), accelerator)
        nil: dict[str, Any] = {"nil": options.nil}
        if options.nil_score is not None:
            nil["nil_scores"] = dict.fromkeys([*(model.name for model in models), CONTROL], options.nil_score)
        evaluation = evaluate_knowledge_base(systems, rows, entities, tasks, **nil, **common, progress=True)
    if accelerator is not None and not accelerator.is_main_process:
        return None
    report = _report(options, manifest, evaluation, models[-1], rows if against == "candidates" else None)
    report.save(options.output)
    evaluation.save(options.output)
    return report


def _load(sources: Sequence[str], accelerator: Accelerator | None) -> list[ModelSystem]:
    systems = []
    for source, name in zip(sources, _names(sources), strict=True):
        model, processor = load_model(source)
        if accelerator is not None:
            model.to(accelerator.device)
        systems.append(ModelSystem(name, model, processor))
    return systems


def _names(sources: Sequence[str]) -> list[str]:
    """What models are called: a Hub id, or as much of a folder's path as tells them apart and says something."""
    parts = [Path(source).resolve().parts if Path(source).is_dir() else (source,) for source in sources]
    least = 1
    while any(len(own) > least and own[-least] in PLAIN_NAMES for own in parts) or (
        len({own[-least:] for own in parts}) < len({*parts})
    ):
        least += 1
    return ["/".join(own[-least:]) for own in parts]


def _report(
    options: EvaluationOptions, manifest: Manifest, evaluation: Evaluation, model: ModelSystem, rows: Dataset | None
) -> Report:
    names = ", ".join(_names(options.models))
    return evaluation_report(
        f"{names} on {public_name(options.data)}, {options.split}",
        evaluation,
        Setting(
            options.split,
            f"{evaluation.protocol}, {manifest.protocol.replace('_', ' ')}",
            "expected rank",
            f"{manifest.seed} (splits and order)",
        ),
        strong=model.name,
        examples=errors(evaluation, model, rows) if rows is not None else (),
        notes=[CONTROL_NOTE],
        provenance={
            "data": f"{public_name(options.data)}, revision {manifest.revision}",
            "models": names,
            "versions": software(),
        },
    )


def _texts_of(entities: Dataset) -> Iterator[EntityRow]:
    """Yields the entities without their pictures, which baselines that count words have no use for."""
    for row in entities.select_columns(["qid", "name", "description"]):
        yield EntityRow(**row, image=None)
