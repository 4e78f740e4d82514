"""A plain Accelerate loop: draw tasks, score, step; keep the checkpoint with the best validation MRR."""

from __future__ import annotations

import copy
import math
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from m3el_hf.data.collator import LinkingCollator, Row, undecoded
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.evaluator import ModelSystem, evaluate
from m3el_hf.modeling.modeling_clipnd import ClipNDModel
from m3el_hf.modeling.processing_clipnd import ClipNDProcessor
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.augmentation import augment_pictures, draw_tasks, drop_tokens, task_views
from m3el_hf.training.lora import add_lora


@dataclass
class TrainingResult:
    """What a run did.

    Attributes:
        history: One entry a validation run: step, seconds, mean training loss since the one before, validation MRR.
        steps: Optimiser steps taken.
        best_step: The step whose weights the model has now.
        best_mrr: Their validation MRR, the mean over the tasks that some row fits.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    best_step: int = 0
    best_mrr: float = -1.0


class TrainingCollator:
    """Makes the arguments of `ClipNDModel.forward` of rows, with this epoch's tasks and augmentation.

    Args:
        collator: Prepares both sides.
        arguments: The run's settings.
    """

    def __init__(self, collator: LinkingCollator, arguments: TrainingArguments) -> None:
        self.collator = collator
        self.arguments = arguments
        self.epoch = 0

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Draws tasks and masks what they hide. Of the entities all is kept that some row's task shows."""
        arguments, batch = self.arguments, self.collator(rows)
        drawn = [draw_tasks(row, arguments.tasks_per_mention, arguments.seed, self.epoch) for row in rows]
        indices, views = task_views(drawn)
        for column, kind in enumerate(("has_text", "has_image")):
            shown = torch.zeros_like(batch.mentions[kind])
            shown[indices[views[:, column]]] = True
            batch.mentions[kind] = batch.mentions[kind] & shown
            batch.entities[kind] = batch.entities[kind] & views[:, 2 + column].any()
        generator = torch.Generator().manual_seed(_seed_of(rows, arguments.seed, self.epoch))
        for side in (batch.mentions, batch.entities):
            if arguments.augment_pictures and side["pixel_values"] is not None:
                side["pixel_values"] = augment_pictures(side["pixel_values"], generator)
            if arguments.token_dropout and side["attention_mask"] is not None:
                side["attention_mask"] = drop_tokens(side["attention_mask"], arguments.token_dropout, generator)
        return {
            "mentions": batch.mentions,
            "entities": batch.entities,
            "labels": batch.labels,
            "rows": indices,
            "views": views,
        }


def train(
    model: ClipNDModel,
    processor: ClipNDProcessor | LinkingCollator,
    train_rows: Dataset,
    validation_rows: Dataset,
    arguments: TrainingArguments,
    *,
    progress: bool = True,
) -> tuple[ClipNDModel, TrainingResult]:
    """Trains the model and leaves it with the weights of the best validation MRR.

    The best checkpoint so far lies in ``output_dir/best``, adapters merged, and is written whole before the one before
    is replaced.

    Args:
        model: The model; changed in place.
        processor: Its processor, or a collator that holds it (and has cached the pictures).
        train_rows: Rows of `m3el_hf.data.schema.ROW_FEATURES`.
        validation_rows: The same, for choosing the checkpoint; never trained on.
        arguments: The run's settings.
        progress: Show a progress bar.

    Returns:
        The model, with adapters merged if ``lora`` was asked for, and what the run did.

    Raises:
        M3ELError: If a split has no rows, or the loss is not finite.
    """
    for name, rows in (("training", train_rows), ("validation", validation_rows)):
        if not len(rows):
            raise M3ELError(f"there are no {name} rows: build the data with a {name} split")
    set_seed(arguments.seed)
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    collator = processor if isinstance(processor, LinkingCollator) else LinkingCollator(processor)
    trained: Any = add_lora(model, rank=arguments.lora_rank) if arguments.lora else model
    trained.train()  # a loaded model comes in evaluation mode, without dropout and checkpointing
    training_collator = TrainingCollator(collator, arguments)
    loader = DataLoader(
        undecoded(train_rows),
        batch_size=arguments.per_device_train_batch_size,
        shuffle=True,
        collate_fn=training_collator,
        generator=torch.Generator().manual_seed(arguments.seed),
    )
    optimizer = torch.optim.AdamW(_parameter_groups(trained, arguments.weight_decay), lr=arguments.learning_rate)
    prepared, optimizer, loader = accelerator.prepare(trained, optimizer, loader)
    clock = _Clock(arguments, len(loader))
    keeper = _BestKeeper(trained, collator, validation_rows, arguments.output_dir / "best", accelerator, clock)
    for step, inputs in _steps(loader, training_collator, arguments, clock, progress and accelerator.is_main_process):
        for group in optimizer.param_groups:
            group["lr"] = clock.learning_rate(step)
        loss = prepared(**inputs).loss
        if not torch.isfinite(loss):
            raise M3ELError(f"the loss is {loss.item()} at step {step}: lower --learning-rate; {keeper.whereabouts}")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        keeper.count(loss.item())
        if clock.evaluation_is_due(step):
            keeper.validate()
    result = keeper.finish()
    return (trained.merge_and_unload() if arguments.lora else model), result


class _BestKeeper:
    """Validates now and then, and keeps the weights that did best, in memory and on disk."""

    def __init__(
        self,
        model: Any,
        collator: LinkingCollator,
        rows: Dataset,
        folder: Path,
        accelerator: Accelerator,
        clock: _Clock,
    ) -> None:
        self._model, self._collator, self._rows, self._folder = model, collator, rows, folder
        self._accelerator, self._clock = accelerator, clock
        self._result = TrainingResult()
        self._losses: list[float] = []
        self._best: dict[str, Tensor] = {}

    @property
    def whereabouts(self) -> str:
        """Where the best checkpoint lies, in words."""
        return f"the best checkpoint so far is in {self._folder}" if self._best else "no checkpoint was written yet"

    def count(self, loss: float) -> None:
        """Notes one optimiser step."""
        self._result.steps += 1
        self._losses.append(loss)

    def validate(self) -> None:
        """Measures the model as it is, and keeps its weights if it is the best so far."""
        mrr = evaluate([ModelSystem("model", self._model, self._collator)], self._rows).mean("model", "mrr")
        if mrr is None:
            raise M3ELError("no validation row fits any task: its mentions and candidates need names or pictures")
        result, step = self._result, self._result.steps
        loss = sum(self._losses) / len(self._losses)
        seconds = round(self._clock.seconds, 1)
        result.history.append({"step": step, "seconds": seconds, "loss": loss, "validation_mrr": mrr})
        self._losses.clear()
        if mrr > result.best_mrr:
            result.best_mrr, result.best_step = mrr, step
            trainable = ((name, one) for name, one in self._model.named_parameters() if one.requires_grad)
            self._best = {name: one.detach().clone() for name, one in trainable}
            if self._accelerator.is_main_process:
                _save(self._model, self._collator.processor, self._folder)

    def finish(self) -> TrainingResult:
        """Validates the last steps too, gives the model its best weights back, and returns what the run did."""
        if self._losses:
            self.validate()
        self._model.load_state_dict(self._best, strict=False)
        return self._result


class _Clock:
    """How far a run is, by steps or by time, whichever ends it first; and what follows from that."""

    def __init__(self, arguments: TrainingArguments, steps_per_epoch: int) -> None:
        self._arguments = arguments
        self._total_steps = steps_per_epoch * arguments.num_train_epochs
        self._limit = arguments.max_minutes * 60 if arguments.max_minutes else math.inf
        self._start = time.monotonic()
        self._evaluations = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def progress(self, step: int) -> float:
        """The share of the run that is done before ``step``."""
        return min(1.0, max(step / self._total_steps, self.seconds / self._limit))

    def learning_rate(self, step: int) -> float:
        """Linear warm-up over steps, then a cosine to zero over the run."""
        warmup = min(1.0, (step + 1) / max(1, self._arguments.warmup_steps))
        return self._arguments.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * self.progress(step)))

    def evaluation_is_due(self, step: int) -> bool:
        """True once for each of the evenly spread evaluations."""
        due = self.progress(step + 1) * self._arguments.evaluations
        if due < self._evaluations + 1:
            return False
        self._evaluations = int(due)
        return True


def _steps(
    loader: DataLoader, collator: TrainingCollator, arguments: TrainingArguments, clock: _Clock, progress: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields numbered batches until the epochs or the minutes are over, with a progress bar."""
    step = 0
    with tqdm(total=100, desc="training", unit="%", disable=not progress, bar_format=_BAR) as bar:
        for epoch in range(arguments.num_train_epochs):
            collator.epoch = epoch
            for inputs in loader:
                yield step, inputs
                step += 1
                done = clock.progress(step)
                bar.n = round(100 * done, 1)
                bar.set_postfix_str(f"epoch {epoch + 1}, step {step}, {step / clock.seconds:.1f} steps/s")
                if done >= 1:
                    return


_BAR = "{desc}: {n:.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [one for one in trainable if one.ndim >= 2], "weight_decay": weight_decay},
        {"params": [one for one in trainable if one.ndim < 2], "weight_decay": 0.0},
    ]


def _save(model: Any, processor: ClipNDProcessor, folder: Path) -> None:
    """Writes a checkpoint beside ``folder`` and swaps it in, so that a kill leaves the old or the new one whole.

    Adapters are merged into a copy: without the weights that the run started from, which it does not keep, they are of
    no use.
    """
    if isinstance(model, PeftModel):
        model = copy.deepcopy(model).merge_and_unload()
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    if folder.exists():
        os.rename(folder, old)
    os.rename(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def _seed_of(rows: Sequence[Row], seed: int, epoch: int) -> int:
    """A seed of the batch's rows, the run's seed and the epoch, the same on any machine."""
    return random.Random(f"{seed}:{epoch}:{rows[0]['id']}").getrandbits(62)
