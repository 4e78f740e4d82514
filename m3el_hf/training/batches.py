"""Which rows a step sees, and what it sees of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from m3el_hf.data.collator import EntityRow, LinkingCollator, Row
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.augmentation import (
    augment_pictures,
    draw_tasks,
    draw_template,
    drop_tokens,
    parse_stages,
    parse_templates,
    task_views,
    weights_at,
)
from m3el_hf.training.objective import TrainingBatch


def epoch_order(rows: int, size: int, seed: int, epoch: int, processes: int = 1, process: int = 0) -> list[list[int]]:
    """Returns the rows of each batch of an epoch, for one of the processes that divide each batch.

    The batches that all processes make together depend on ``size * processes`` alone. Of the last batch each gets a
    row at least, or it is left out.

    Args:
        rows: How many there are.
        size: Of a process's batch.
        seed: The run's.
        epoch: Which pass over the rows it is.
        processes: How many there are.
        process: Which of them asks.
    """
    generator = torch.Generator().manual_seed((seed << 32) + epoch)
    order = torch.randperm(rows, generator=generator).split(size * processes)
    return [batch.tensor_split(processes)[process].tolist() for batch in order if len(batch) >= processes]


class TrainingCollator:
    """Makes a batch of rows, with an epoch's tasks and augmentation.

    Args:
        collator: Prepares both sides.
        arguments: The run's settings.
        epoch: Which pass over the rows it is.
        share: How far the run is when the epoch begins.
        negatives: Hard negatives of mentions, by the row's id.
    """

    def __init__(
        self,
        collator: LinkingCollator,
        arguments: TrainingArguments,
        epoch: int,
        share: float = 0.0,
        negatives: Mapping[str, Sequence[EntityRow]] | None = None,
    ) -> None:
        self._collator, self._arguments, self._epoch = collator, arguments, epoch
        self._tasks = weights_at(parse_stages(arguments.tasks), share)
        self._templates = parse_templates(arguments.entity_text)
        self._negatives = negatives or {}

    def __call__(self, rows: Sequence[Row]) -> TrainingBatch:
        """Draws tasks and masks what they hide of the mentions; of the entities `Objective` does, for all processes."""
        arguments = self._arguments
        batch = self._collator(
            rows, [one for row in rows for one in self._negatives.get(row["id"], ())], template=self._template
        )
        drawn = [draw_tasks(row, arguments.tasks_per_mention, arguments.seed, self._epoch, self._tasks) for row in rows]
        indices, views = task_views(drawn)
        for column, kind in enumerate(("has_text", "has_image")):
            shown = torch.zeros_like(batch.mentions[kind])
            shown[indices[views[:, column]]] = True
            batch.mentions[kind] = batch.mentions[kind] & shown
        names = [row["id"] for row in rows]
        for side, keys in ((batch.mentions, names), (batch.entities, batch.qids)):
            self._augment(side, [f"{arguments.seed}:{self._epoch}:{key}" for key in keys])
        return TrainingBatch(
            mentions=batch.mentions,
            entities=batch.entities,
            entity_ids=torch.tensor([_number(qid) for qid in batch.qids]),
            labels=batch.labels,
            rows=indices,
            views=views,
            names=names,
        )

    def _template(self, entity: EntityRow) -> str | None:
        if self._templates is None:
            return None
        described = bool(entity.name), bool(entity.description)
        return draw_template(entity.qid, described, self._templates, self._arguments.seed, self._epoch)

    def _augment(self, side: dict[str, Tensor], names: list[str]) -> None:
        arguments = self._arguments
        if arguments.augment_pictures and side["pixel_values"] is not None:
            side["pixel_values"] = augment_pictures(side["pixel_values"], [f"{name}:picture" for name in names])
        if arguments.token_dropout and side["attention_mask"] is not None:
            masks = drop_tokens(side["attention_mask"], arguments.token_dropout, [f"{name}:tokens" for name in names])
            side["attention_mask"] = masks


def _number(qid: str) -> int:
    """A 63-bit number of an entity, the same in every process."""
    return int.from_bytes(hashlib.blake2b(qid.encode(), digest_size=8).digest()) >> 1
