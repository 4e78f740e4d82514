"""A model's figures beside what they must be read with: the baselines, and the model blind to mentions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from datasets import Dataset

from m3el_hf.data.collator import EntityRow, undecoded
from m3el_hf.evaluation.baselines import baselines
from m3el_hf.evaluation.control import MentionBlind, average_mention
from m3el_hf.evaluation.evaluator import evaluate
from m3el_hf.evaluation.facts import near_same_pictures
from m3el_hf.evaluation.outcomes import Evaluation
from m3el_hf.evaluation.systems import ModelSystem, System
from m3el_hf.tasks import TASKS, Task

MODEL, CONTROL = "model", "mention-blind control"

CONTROL_NOTE = (
    "The mention-blind control replaces every mention by the average mention: it must sit at chance, and how far it "
    "does not is the size of a shortcut."
)


def measure(
    models: Sequence[System],
    rows: Dataset,
    tasks: Sequence[Task] = tuple(TASKS.values()),
    *,
    training: Dataset | None = None,
    cache_dir: Path | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measures the baselines, the systems given, and, if the last is a model, its mention-blind control as `CONTROL`.

    The arguments are those of `m3el_hf.evaluation.evaluator.evaluate`.

    Raises:
        M3ELError: As `evaluate` does.
    """
    systems = beside(models, rows, baselines(described(rows)), accelerator)
    found = evaluate(
        systems,
        rows,
        tasks,
        training=training,
        cache_dir=cache_dir,
        accelerator=accelerator,
        progress=progress,
    )
    return with_near_same(found, rows)


def with_near_same(evaluation: Evaluation, rows: Dataset) -> Evaluation:
    """Marks the rows of an evaluation whose mention shows a picture near-same to the gold's."""
    near = near_same_pictures(undecoded(rows))
    return replace(evaluation, facts=evaluation.facts | {"like_picture": near})


def beside(
    models: Sequence[System], rows: Dataset, others: Sequence[System], accelerator: Accelerator | None = None
) -> list[System]:
    """Returns the baselines, the systems and, if the last is a model, its control, in the order of the tables."""
    systems = [*others, *models]
    if isinstance(models[-1], ModelSystem):
        systems.append(MentionBlind(CONTROL, models[-1], average_mention(models[-1], rows, accelerator)))
    return systems


def described(rows: Dataset) -> Iterator[EntityRow]:
    """Yields the texts of all candidates, each description once, without pictures."""
    columns = ["candidate_qids", "candidate_names", "candidate_descriptions"]
    seen: set[EntityRow] = set()
    for row in rows.select_columns(columns):
        for qid, name, description in zip(*(row[column] for column in columns), strict=True):
            entity = EntityRow(qid, name, description, None)
            if entity not in seen:
                seen.add(entity)
                yield entity
