"""Which rows a step sees, and what it sees of them."""

from __future__ import annotations

import hashlib
import math
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader

from m3el_hf.data.collator import NEEDED, Batch, EntityRow, LinkingCollator, Row, undecoded
from m3el_hf.errors import M3ELError
from m3el_hf.modeling.losses_clipnd import seen_of_mentions
from m3el_hf.modeling.texts_clipnd import clean
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.augmentation import (
    augment_pictures,
    draw_tasks,
    draw_template,
    drop_tokens,
    task_views,
)
from m3el_hf.training.distributions import parse_stages, parse_templates, weights_at
from m3el_hf.training.negatives import HardNegatives
from m3el_hf.training.objective import TrainingBatch
from m3el_hf.training.schedule import Clock


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
    # A generator sees 32 bits of its seed alone: both must be in these.
    generator = torch.Generator().manual_seed(random.Random(f"{seed}:{epoch}:order").getrandbits(32))
    order = torch.randperm(rows, generator=generator).split(size * processes)
    return [batch.tensor_split(processes)[process].tolist() for batch in order if len(batch) >= processes]


class Feed:
    """The batches of this process, from any step on.

    Args:
        rows: The training rows; those of a streamed dataset are divided among processes as `datasets` does, shuffled
            through a buffer, and begin anew when they end.
        collator: Prepares both sides.
        arguments: The run's settings.
        processes: How many processes divide each batch.
        process: Which of them this is.

    Attributes:
        row_count: How many rows there are; None for a streamed dataset.
        steps_per_epoch: Likewise.
        negatives: Hard negatives of mentions, by the row's id; those of the epoch that is under way.

    Raises:
        M3ELError: If there are no rows, they lack a column, or hard negatives are asked for of a streamed dataset.
    """

    def __init__(
        self,
        rows: Dataset | IterableDataset,
        collator: LinkingCollator,
        arguments: TrainingArguments,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        _check_columns(rows)
        self._collator, self._arguments = collator, arguments
        self._processes, self._process = processes, process
        self._rows: Any = undecoded(rows)
        self.row_count = len(rows) if isinstance(rows, Dataset) else None
        self.steps_per_epoch: int | None = None
        if isinstance(rows, Dataset):
            if len(rows) < processes:
                raise M3ELError(
                    f"there are {len(rows)} training rows for {processes} processes: build the data with more"
                )
            self.steps_per_epoch = len(self._order(0))
        elif arguments.mine_negatives:
            raise M3ELError("hard negatives are looked for among all rows: leave mine_negatives out, or stream no rows")
        elif processes > 1:
            self._rows = split_dataset_by_node(self._rows, process, processes)
        self.negatives = HardNegatives(self._rows)

    def batches(self, clock: Clock, on_epoch: Callable[[int], None]) -> Iterator[TrainingBatch]:
        """Yields batches for ever, from the clock's step on.

        Args:
            clock: The run's.
            on_epoch: Called with the number of each epoch that begins, before its first batch.
        """
        if self.steps_per_epoch is None:
            yield from self._loader(_Given(), self._streamed(clock))
            return
        step, size = clock.step, self.steps_per_epoch
        while True:
            is_first = step % size == 0
            if is_first:  # before workers start: they have copies of the hard negatives
                on_epoch(step // size)
            for batch in self._loader(self._rows, self._planned(step, clock)):
                if step % size == 0 and not is_first:
                    on_epoch(step // size)
                is_first, step = False, step + 1
                yield batch

    def _planned(self, step: int, clock: Clock) -> Iterator[_Plan]:
        """Yields steps over epochs, so that workers need not stop, until hard negatives are looked for again."""
        epoch, done = divmod(step, self.steps_per_epoch or 1)
        every = self._arguments.mine_negatives
        end = (epoch // every + 1) * every if every else math.inf
        while epoch < end:
            for rows in self._order(epoch)[done:]:
                yield _Plan(epoch, clock.share(step), rows)
                step += 1
            epoch, done = epoch + 1, 0

    def _streamed(self, clock: Clock) -> Iterator[_Plan]:
        """Yields steps with the rows themselves, read in this process: the number of workers changes no batch."""
        step, begin = 0, clock.step
        for epoch in count():
            rows = self._rows.shuffle(seed=self._arguments.seed, buffer_size=SHUFFLE_BUFFER)
            rows.set_epoch(epoch)
            first = step
            for some in _batches(rows, self._arguments.batch_size):
                if step >= begin:
                    yield _Plan(epoch, clock.share(step), some)
                step += 1
            if step == first:
                raise M3ELError("there are no training rows: build the data with a train split")

    def _order(self, epoch: int) -> list[list[int]]:
        arguments = self._arguments
        return epoch_order(len(self._rows), arguments.batch_size, arguments.seed, epoch, self._processes, self._process)

    def _loader(self, rows: Any, plans: Iterator[_Plan]) -> DataLoader:
        return DataLoader(
            _RowsByPlan(rows),
            sampler=plans,
            batch_size=None,
            collate_fn=self._collate,
            num_workers=self._arguments.dataloader_num_workers,
            worker_init_fn=_ignore_termination,
            generator=torch.Generator(),  # it draws a number at each start, which dropout must not miss after a resume
        )

    def _collate(self, planned: Any) -> TrainingBatch:
        plan, rows = planned
        return TrainingCollator(self._collator, self._arguments, plan.epoch, plan.share, self.negatives)(rows)


class _Plan(NamedTuple):
    """A step: which epoch it is of, how far the run is, and the rows, or their indices."""

    epoch: int
    share: float
    rows: list[Any]


class _RowsByPlan(torch.utils.data.Dataset):
    """Rows by the plan of a step."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __getitem__(self, plan: _Plan) -> tuple[_Plan, list[Row]]:
        return plan, self._rows.__getitems__(plan.rows)


class _Given:
    """Rows whose indices are the rows themselves."""

    def __getitems__(self, rows: list[Row]) -> list[Row]:
        return rows


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    some = iter(rows)
    while batch := list(islice(some, size)):
        yield batch


def _ignore_termination(worker: int) -> None:
    """A SIGTERM to all processes is for the run to answer, which still needs its workers; they end when it does."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


SHUFFLE_BUFFER = 1000
"""Rows of a streamed dataset that are drawn from; they are in memory with their pictures."""


def _check_columns(rows: Dataset | IterableDataset) -> None:
    columns = rows.column_names
    if columns is None:
        raise M3ELError("the streamed rows do not name their columns: make them with features=ROW_FEATURES")
    if lacking := [name for name in NEEDED if name not in columns]:
        raise M3ELError(f"the rows have no {lacking[0]}: training takes the config all, or a topic, of a built dataset")


class TrainingCollator:
    """Makes a batch of rows, with an epoch's tasks and augmentation.

    Args:
        collator: Prepares both sides.
        arguments: The run's settings.
        epoch: Which pass over the rows it is.
        share: How far the run is, which says what stage of the tasks it is in.
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
        """Draws tasks and masks what they hide of the mentions; of the entities `backward` does, for all processes."""
        arguments = self._arguments
        negatives = [one for row in rows for one in self._negatives.get(row["id"], ())]
        batch = self._collator(rows, negatives, template=self._template)
        drawn = [draw_tasks(row, arguments.tasks_per_mention, arguments.seed, self._epoch, self._tasks) for row in rows]
        indices, views = task_views(drawn)
        seen = seen_of_mentions(indices, views, len(rows))
        for column, kind in enumerate(("has_text", "has_image")):
            batch.mentions[kind] = batch.mentions[kind] & seen[:, column]
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
            wanted=self._wanted(rows, batch, seen[:, 2:]),
            names=names,
            candidates=sum(map(len, batch.candidates)) + len(negatives),
        )

    def _wanted(self, rows: Sequence[Row], batch: Batch, shown: Tensor) -> Tensor:
        """What the rows that bring each entity along show of it, ``[N, 2]``, by what each mention's show ``[B, 2]``."""
        index = {qid: position for position, qid in enumerate(batch.qids)}
        wanted = torch.zeros(len(index), 2, dtype=torch.bool)
        for row, candidates, kinds in zip(rows, batch.candidates, shown, strict=True):
            wanted[[*candidates, *(index[one.qid] for one in self._negatives.get(row["id"], ()))]] |= kinds
        return wanted

    def _template(self, entity: EntityRow) -> str | None:
        if self._templates is None:
            return None
        described = bool(clean(entity.name)), bool(clean(entity.description))
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
