"""The loop: batches that processes share, gradients of the whole batch, checkpoints that a killed run goes on from."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset
from torch import nn
from tqdm import tqdm

from m3el_hf.data.collator import LinkingCollator
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.evaluator import ModelSystem, evaluate
from m3el_hf.modeling.modeling_clipnd import ClipNDModel
from m3el_hf.modeling.processing_clipnd import ClipNDProcessor
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.batches import Feed
from m3el_hf.training.checkpoints import load_checkpoint, save_checkpoint, whole
from m3el_hf.training.gathering import total
from m3el_hf.training.log import TrainingLog
from m3el_hf.training.lora import add_lora
from m3el_hf.training.objective import Objective, TrainingBatch, backward
from m3el_hf.training.schedule import Clock


@dataclass
class TrainingResult:
    """What a run did.

    Attributes:
        history: One entry a validation run: step, seconds, mean training loss since the one before, validation MRR.
        steps: Optimiser steps taken.
        best_step: The step whose weights the model has now.
        best_mrr: Their validation MRR, the mean over the tasks that some row fits.
        is_finished: False for a run that was told to stop, and can be resumed.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    best_step: int = 0
    best_mrr: float = -1.0
    is_finished: bool = True


def train(
    model: ClipNDModel,
    processor: ClipNDProcessor | LinkingCollator,
    train_rows: Dataset | IterableDataset,
    validation_rows: Dataset | None,
    arguments: TrainingArguments,
    *,
    progress: bool = True,
) -> tuple[ClipNDModel, TrainingResult]:
    """Trains the model and leaves it with the weights of the best validation MRR.

    ``output_dir`` holds ``best`` and ``last``, models with adapters merged, ``checkpoint-STEP`` to resume from, and
    ``log.jsonl`` with its plot. Each folder is written whole before the one before is replaced.

    Args:
        model: The model; changed in place.
        processor: Its processor, or a collator that holds it (and has cached the pictures).
        train_rows: Rows of `m3el_hf.data.schema.ROW_FEATURES`.
        validation_rows: The same, for choosing the weights; never trained on. None to keep the last.
        arguments: The run's settings.
        progress: Show a progress bar.

    Returns:
        The model, with adapters merged if ``lora`` was asked for, and what the run did.

    Raises:
        M3ELError: If a split has no rows, a checkpoint is of another run, or the loss is not finite.
    """
    return _Run(model, processor, train_rows, validation_rows, arguments, progress).go()


class _Run:
    def __init__(
        self,
        model: ClipNDModel,
        processor: ClipNDProcessor | LinkingCollator,
        train_rows: Dataset | IterableDataset,
        validation_rows: Dataset | None,
        arguments: TrainingArguments,
        progress: bool,
    ) -> None:
        if validation_rows is not None and not len(validation_rows):
            raise M3ELError("there are no validation rows: build the data with a validation split, or pass None")
        set_seed(arguments.seed)
        self.arguments, self.validation_rows = arguments, validation_rows
        self.accelerator = Accelerator(
            mixed_precision=arguments.mixed_precision,
            log_with=None if arguments.report_to == "none" else arguments.report_to,
            project_dir=str(arguments.output_dir),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self.collator = processor if isinstance(processor, LinkingCollator) else LinkingCollator(processor)
        self.model = _trainable(model, arguments)
        optimizer = torch.optim.AdamW(
            _parameter_groups(self.model, arguments), lr=arguments.learning_rate, eps=arguments.adam_epsilon
        )
        self.objective, self.optimizer = self.accelerator.prepare(Objective(self.model), optimizer)
        self.feed = Feed(train_rows, self.collator, arguments, self.accelerator)
        self.clock = Clock(arguments, self.feed.steps_per_epoch)
        if math.isinf(self.clock.total_steps) and not arguments.max_minutes:
            raise M3ELError("a streamed dataset has no known length: set --max-steps or --max-minutes")
        self.log = TrainingLog(arguments, self.accelerator)
        self.result = TrainingResult()
        self.losses: list[float] = []
        self.stopping = threading.Event()
        self.bar = tqdm(total=100, desc="training", bar_format=_BAR, disable=not (progress and self._is_main))

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process

    def go(self) -> tuple[ClipNDModel, TrainingResult]:
        """Takes the steps that are left."""
        self._resume()
        with self.bar, self._terminable():
            for batch in self.feed.batches(self.clock, self.model):
                if self.clock.progress >= 1 or self._is_patience_over():
                    break
                self._step(batch)
                self._after_step()
                if self.stopping.is_set():
                    self._save_checkpoint()
                    self.result.is_finished = False
                    return self.model, self.result
        return self._finish()

    def _step(self, batch: TrainingBatch) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.clock.rate
        began = time.monotonic()
        terms = backward(
            self.objective, batch.to(self.accelerator.device), self.arguments.gradient_accumulation_steps, self.accelerator
        )
        loss = self._agree(terms["loss"])
        if not math.isfinite(loss):
            raise M3ELError(
                f"the loss is {loss} at step {self.clock.step}, with the rows {', '.join(batch.names)}: lower "
                f"--learning-rate, or look at these rows; {self._whereabouts}"
            )
        self.accelerator.clip_grad_norm_(self.objective.parameters(), self.arguments.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss)
        self.log.count(batch, terms, time.monotonic() - began)

    def _agree(self, loss: torch.Tensor) -> float:
        """Counts the step, and sees to it that all processes know the same: loss, time, and whether to stop."""
        mine = torch.stack([loss.detach().float(), loss.new_tensor(self.clock.elapsed()), loss.new_tensor(self.stopping.is_set())])
        mean, seconds, stop = (total(mine) / self.accelerator.num_processes).tolist()
        self.clock.advance(seconds)
        if stop:
            self.stopping.set()
        return mean

    def _after_step(self) -> None:
        clock = self.clock
        if clock.is_due("logging_steps"):
            self.log.write(clock, self.optimizer.param_groups[0]["lr"])
        if clock.is_due("eval_steps"):
            self._validate()
        if clock.is_due("save_steps"):
            self._save_checkpoint()
        self.bar.n = round(100 * clock.progress, 1)
        left = f"{clock.seconds_left / 60:.0f} min left" if clock.seconds_left < math.inf else ""
        self.bar.set_postfix_str(f"step {clock.step}, loss {self.losses[-1]:.3f}, {clock.step / clock.seconds:.2f} steps/s, {left}")

    def _validate(self) -> None:
        """Measures the model as it is, and keeps its weights if it is the best so far."""
        if self.validation_rows is None:
            return
        self.model.eval()
        mrr = evaluate([ModelSystem("model", self.model, self.collator)], self.validation_rows).mean("model", "mrr")
        self.model.train()
        if mrr is None:
            raise M3ELError("no validation row fits any task: its mentions and candidates need names or pictures")
        result, clock = self.result, self.clock
        loss = sum(self.losses) / len(self.losses)
        entry = {"step": clock.step, "seconds": round(clock.seconds, 1), "loss": loss, "validation_mrr": mrr}
        result.history.append(entry)
        self.losses.clear()
        self.log.validation(entry)
        if mrr > result.best_mrr:
            result.best_mrr, result.best_step = mrr, clock.step
            self._save_model("best")
