"""Measures systems on the nine tasks, among each mention's own candidates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from m3el_hf.data.collator import Batch, LinkingCollator, undecoded
from m3el_hf.errors import M3ELError
from m3el_hf.metrics import load_metric
from m3el_hf.modeling.encoded_clipnd import Encoded
from m3el_hf.modeling.modeling_clipnd import ClipNDModel
from m3el_hf.modeling.offload_clipnd import home_of
from m3el_hf.modeling.processing_clipnd import ClipNDProcessor
from m3el_hf.tasks import TASKS, Task

Row = Mapping[str, Any]
Scores = NDArray[np.float64]

BATCH_SIZE = 64


class System(Protocol):
    """Anything that scores candidates: a baseline, a model, a control."""

    name: str

    def can_do(self, task: Task) -> bool:
        """Whether the system has a say on the task at all."""
        ...

    def scores(self, rows: Sequence[Row], tasks: Sequence[Task]) -> dict[str, list[Scores | None]]:
        """Scores each row's candidates for each task, by task name; None where the row does not fit the task."""
        ...


@dataclass(frozen=True)
class Table:
    """Figures by system and task.

    Attributes:
        cells: What the `linking_accuracy` metric returned, by system and task name. A task of which no row fits, or
            that a system cannot do, has no cell.
        evaluable: By task name, the rows that fit it.
        rows: All rows.
    """

    cells: dict[str, dict[str, dict[str, float]]]
    evaluable: dict[str, int]
    rows: int

    def mean(self, system: str, figure: str = "accuracy") -> float | None:
        """The mean over the tasks that some row fits; None where the system cannot do one of them, or none fits."""
        values = [self.cells[system].get(name) for name, count in self.evaluable.items() if count]
        if not values or None in values:
            return None
        return float(np.mean([value[figure] for value in values if value is not None]))


def evaluate(
    systems: Sequence[System], rows: Dataset, tasks: Sequence[Task] = tuple(TASKS.values()), *, progress: bool = False
) -> Table:
    """Measures every system on every task.

    A row counts for a task if it has everything that the task shows (`Task.fits`); how many do stands in the table.

    Args:
        systems: With names that differ.
        rows: Rows of `m3el_hf.data.schema.ROW_FEATURES`.
        tasks: The tasks; all nine by default.
        progress: Show a progress bar.

    Raises:
        M3ELError: If there are no rows, or a system's score is NaN.
    """
    if not len(rows):
        raise M3ELError("no rows to evaluate: choose a split that has some")
    collected: dict[str, dict[str, list[Scores]]] = {
        system.name: {task.name: [] for task in tasks if system.can_do(task)} for system in systems
    }
    golds: dict[str, list[int]] = {task.name: [] for task in tasks}
    for batch in tqdm(list(_batches(undecoded(rows))), desc="evaluating", unit=" batches", disable=not progress):
        for task in tasks:
            golds[task.name].extend(row["answer"] for row in batch if task.fits(row))
        for system in systems:
            able = [task for task in tasks if system.can_do(task)]
            for name, scores in system.scores(batch, able).items():
                collected[system.name][name].extend(one for one in scores if one is not None)
    metric = load_metric()
    cells = {
        system: {
            name: metric.compute(scores=scores, references=golds[name])
            for name, scores in by_task.items()
            if golds[name]
        }
        for system, by_task in collected.items()
    }
    return Table(cells, {name: len(gold) for name, gold in golds.items()}, len(rows))


class ModelSystem:
    """A model as a `System`: each mention and entity of a batch is encoded once for all tasks.

    Args:
        name: Its name in the table.
        model: The model.
        processor: Its processor, or a collator that holds it (and has cached the pictures).
        average: The average mention, by `average_mention`, which replaces each mention. None to look at the mentions.
    """

    def __init__(
        self,
        name: str,
        model: ClipNDModel,
        processor: ClipNDProcessor | LinkingCollator,
        average: Encoded | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.collator = processor if isinstance(processor, LinkingCollator) else LinkingCollator(processor)
        self.average = average

    def can_do(self, task: Task) -> bool:
        """Every task."""
        return True

    @torch.inference_mode()
    def scores(self, rows: Sequence[Row], tasks: Sequence[Task]) -> dict[str, list[Scores | None]]:
        """Scores each row's candidates, as that row describes them, for each task."""
        result: dict[str, list[Scores | None]] = {task.name: [None] * len(rows) for task in tasks}
        fitting = {place: row for place, row in enumerate(rows) if any(task.fits(row) for task in tasks)}
        if not fitting:
            return result
        training, device = self.model.training, home_of(self.model)
        self.model.eval()
        batch = self.collator([_with_own_candidates(row) for row in fitting.values()])
        entities = self.model.encode_entities(**to_device(batch.entities, device))
        if self.average is None:
            mentions = self.model.encode_mentions(**to_device(batch.mentions, device))
        else:
            mentions = self.average[torch.zeros(len(fitting), dtype=torch.long, device=device)]
        for task in tasks:
            scores = self._score_task(list(fitting.values()), task, batch, mentions, entities)
            for place, one in zip(fitting, scores, strict=True):
                result[task.name][place] = one
        self.model.train(training)
        return result

    def _score_task(
        self, rows: Sequence[Row], task: Task, batch: Batch, mentions: Encoded, entities: Encoded
    ) -> list[Scores | None]:
        mentions = mentions.show(task.mention.has_text, task.mention.has_image)
        entities = entities.show(task.candidate.has_text, task.candidate.has_image)
        total = self.model.score(mentions, entities).total.double().cpu().numpy()
        return [
            total[position, own] if task.fits(row) else None
            for position, (row, own) in enumerate(zip(rows, batch.candidates, strict=True))
        ]


@torch.inference_mode()
def average_mention(model: ClipNDModel, processor: ClipNDProcessor | LinkingCollator, rows: Dataset) -> Encoded:
    """Encodes all mentions and returns their average, one row and one token, for the mention-blind control.

    What a model links correctly by the average mention it knows without looking at mentions: a shortcut in the data or
    the split. The control must sit at chance.
    """
    device = home_of(model)
    collator = processor if isinstance(processor, LinkingCollator) else LinkingCollator(processor)
    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    training = model.training
    model.eval()
    for batch in _batches(undecoded(rows)):
        one = model.encode_mentions(**to_device(collator(batch).mentions, device))
        for name, value in one.tensors().items():
            if value.is_floating_point():
                chosen = value[_present(one, name)]
                sums[name] = sums.get(name, torch.zeros(())) + chosen.sum(0)
                counts[name] = counts.get(name, 0) + len(chosen)
    model.train(training)
    average: dict[str, Any] = {name: (value / max(1, counts[name])).unsqueeze(0) for name, value in sums.items()}
    average |= {name: F.normalize(average[name], dim=-1) for name in ("text", "image")}
    average |= {name: value.unsqueeze(1) for name, value in average.items() if name.endswith(("_keys", "_values"))}
    average |= {f"has_{kind}": torch.tensor([counts[kind] > 0], device=device) for kind in ("text", "image")}
    if "text_keys" in average:
        average["text_mask"] = torch.ones(1, 1, dtype=torch.bool, device=device)
    return replace(one, **average)


def _present(mentions: Encoded, name: str) -> Tensor:
    """Which rows, or which tokens of which rows, of an attribute say something."""
    if name == "cross":
        return mentions.has_text & mentions.has_image
    present = mentions.has_text if name.startswith("text") else mentions.has_image
    if not name.endswith(("_keys", "_values")):
        return present
    values = mentions.tensors()
    shown = present.unsqueeze(1).expand(values[name].shape[:2])
    return shown & values["text_mask"] if name.startswith("text") else shown


def to_device(inputs: Mapping[str, Tensor | None], device: torch.device) -> dict[str, Any]:
    """Moves the arguments of an encoder to a device."""
    return {name: value.to(device) if value is not None else None for name, value in inputs.items()}


def _with_own_candidates(row: Row) -> Row:
    """Makes every description an entity of its own: of each Qid, the collator keeps a batch's first description."""
    columns = (row[f"candidate_{name}"] for name in ("qids", "names", "descriptions", "images"))
    keys = [(qid, name, text, image and image["bytes"]) for qid, name, text, image in zip(*columns, strict=True)]
    return {**row, "candidate_qids": keys, "answer_qid": keys[row["answer"]]}


def _batches(rows: Dataset) -> Iterator[list[Row]]:
    for start in range(0, len(rows), BATCH_SIZE):
        yield [rows[index] for index in range(start, min(start + BATCH_SIZE, len(rows)))]
