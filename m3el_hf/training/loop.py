"""The loop: batches that processes share, gradients of the whole batch, checkpoints that a killed run goes on from."""

from __future__ import annotations

import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset
from torch import Tensor
from tqdm import tqdm

from m3el_hf.data.collator import LinkingCollator
from m3el_hf.errors import M3ELError, one_line
from m3el_hf.evaluation.evaluator import ModelSystem, evaluate
from m3el_hf.modeling.modeling_clipnd import ClipNDModel
from m3el_hf.modeling.processing_clipnd import ClipNDProcessor
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.batches import Feed
from m3el_hf.training.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint, whole
from m3el_hf.training.estimate import say_plan, seconds_of_a_step
from m3el_hf.training.gathering import total
from m3el_hf.training.log import TrainingLog
from m3el_hf.training.objective import Objective, TrainingBatch, backward
from m3el_hf.training.schedule import Clock
from m3el_hf.training.start import make_optimizer, make_trainable, without_adapters


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
    on_epoch: Callable[[int, TrainingResult], None] | None = None,
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
        progress: Say what is trained and how long it may take, and show a progress bar.
        on_epoch: Called in the main process after each epoch but the last, with how many there were, and the result
            so far. It must draw no random numbers.

    Returns:
        The model, with adapters merged if ``lora`` was asked for, and what the run did.

    Raises:
        M3ELError: If a split has no rows, a checkpoint is of another run, or the loss is not finite.
    """
    return _Run(model, processor, train_rows, validation_rows, arguments, progress, on_epoch).go()


class _Run:
    def __init__(
        self,
        model: ClipNDModel,
        processor: ClipNDProcessor | LinkingCollator,
        train_rows: Dataset | IterableDataset,
        validation_rows: Dataset | None,
        arguments: TrainingArguments,
        progress: bool,
        on_epoch: Callable[[int, TrainingResult], None] | None,
    ) -> None:
        if validation_rows is not None and not len(validation_rows):
            raise M3ELError("there are no validation rows: build the data with a validation split, or pass None")
        set_seed(arguments.seed)
        self.arguments, self.validation_rows = arguments, validation_rows
        self.train_rows, self.progress, self.on_epoch = train_rows, progress, on_epoch
        self.accelerator = _make_accelerator(arguments)
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        self.collator = processor if isinstance(processor, LinkingCollator) else LinkingCollator(processor)
        self.feed = Feed(train_rows, self.collator, arguments, processes, process)
        self.clock = Clock(arguments, self.feed.steps_per_epoch)
        if math.isinf(self.clock.total_steps) and not arguments.max_minutes:
            raise M3ELError("a streamed dataset has no known length: set --max-steps or --max-minutes")
        self.model, self.trained = model, make_trainable(model, arguments)
        optimizer = make_optimizer(model, arguments)
        self.objective, self.optimizer = self.accelerator.prepare(Objective(self.model), optimizer)
        self.log = TrainingLog(arguments, self.accelerator)
        self.result = TrainingResult()
        self.loss = math.nan  # of the last step
        self.losses: list[float] = []  # since the last validation run
        self.worse = 0  # validation runs since the best
        self.is_told_to_stop = False
        is_main = self.accelerator.is_main_process
        self.bar = tqdm(total=100, desc="training", bar_format=_BAR, disable=not (progress and is_main))

    def go(self) -> tuple[ClipNDModel, TrainingResult]:
        """Takes the steps that are left."""
        self._resume()
        patience = self.arguments.early_stopping_patience or math.inf
        with self.bar, self._terminable():
            batches = self.feed.batches(self.clock, self._begin_epoch)
            if self.progress and self.clock.progress < 1:
                batches = self._announce(batches)
            asked = time.monotonic()
            while self.clock.progress < 1 and self.worse < patience:
                batch = next(batches).to(self.accelerator.device)
                self._step(batch, waited=time.monotonic() - asked)
                self._after_step()
                asked = time.monotonic()
                if self.is_told_to_stop:
                    self._save_checkpoint()
                    self.result.is_finished = False
                    return self.model, self.result
        return self._finish()

    def _begin_epoch(self, epoch: int) -> None:
        """Looks for hard negatives and calls back, where these are asked for."""
        every = self.arguments.mine_negatives
        if every and epoch % every == 0:
            count = self.arguments.negatives_per_mention
            self.feed.negatives.mine(self.model, self.collator, count, progress=not self.bar.disable)
        if epoch and self.on_epoch is not None and self.accelerator.is_main_process:
            self.on_epoch(epoch, self.result)

    def _announce(self, batches: Iterator[TrainingBatch]) -> Iterator[TrainingBatch]:
        """Says what is trained and how long it may take, by its first batch; returns all batches again."""
        began = time.monotonic()
        batch = next(batches)
        waited = 0.0 if self.arguments.dataloader_num_workers else time.monotonic() - began
        parts, device = self.arguments.gradient_accumulation_steps, self.accelerator.device
        seconds = waited + seconds_of_a_step(self.objective, batch.to(device), parts, self.accelerator)
        counts = torch.tensor([len(batch.names), len(batch.entity_ids)], device=device)
        mentions, entities = total(counts).tolist()
        weights = list(self.objective.parameters())
        trained = sum(one.numel() for one in weights if one.requires_grad)
        rows = f"{len(self.train_rows):,} rows" if isinstance(self.train_rows, Dataset) else "streamed rows"
        if self.accelerator.is_main_process:
            tqdm.write(
                f"{rows}; {trained:,} of {sum(one.numel() for one in weights):,} parameters are trained; "
                f"{mentions:,} mentions and {entities:,} entities a step"
            )
            tqdm.write(say_plan(self.clock.total_steps - self.clock.step, seconds, self.clock.seconds_allowed))
        return chain([batch], batches)

    def _step(self, batch: TrainingBatch, waited: float) -> None:
        clock, began = self.clock, time.monotonic()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * clock.rate
        terms = backward(self.objective, batch, self.arguments.gradient_accumulation_steps, self.accelerator)
        loss, seconds, stop = self._agree(terms["loss"], clock.elapsed(), self.is_told_to_stop)
        if not math.isfinite(loss):
            raise M3ELError(
                f"the loss is {loss} at step {clock.step}, with the rows {', '.join(batch.names)}: lower "
                f"--learning-rate, or look at these rows; {self._whereabouts()}"
            )
        self.accelerator.clip_grad_norm_(self.objective.parameters(), self.arguments.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.advance(seconds)
        self.is_told_to_stop = stop > 0
        self.result.steps = clock.step
        self.loss = loss
        self.losses.append(loss)
        self.log.count(batch, terms, time.monotonic() - began, waited)

    def _agree(self, loss: Tensor, *values: float) -> list[float]:
        """Returns the means over processes: else one could validate or stop while another goes on."""
        mine = torch.stack([loss.detach().float(), *(loss.new_tensor(value, dtype=torch.float32) for value in values)])
        return (total(mine) / self.accelerator.num_processes).tolist()

    def _after_step(self) -> None:
        clock = self.clock
        if clock.is_due("logging_steps"):
            self.log.write(clock.step, self.optimizer.param_groups[0]["lr"])
        if clock.is_due("eval_steps"):
            self._validate()
        if clock.is_due("save_steps"):
            self._save_checkpoint()
        self.bar.n = round(100 * clock.progress, 1)
        self.bar.set_postfix_str(
            f"step {clock.step}, loss {self.loss:.3f}, "
            f"{clock.step / clock.seconds:.2f} steps/s, {clock.seconds_left / 60:.0f} min left"
        )

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
        loss = sum(self.losses) / max(1, len(self.losses))
        entry = {"step": clock.step, "seconds": round(clock.seconds, 1), "loss": loss, "validation_mrr": mrr}
        result.history.append(entry)
        self.losses.clear()
        self.log.validation(entry)
        self.worse += 1
        if mrr > result.best_mrr:
            result.best_mrr, result.best_step, self.worse = mrr, clock.step, 0
            self._save_model("best")

    def _finish(self) -> tuple[ClipNDModel, TrainingResult]:
        """Validates the last steps too, and gives the model its best weights back."""
        if self.losses:
            self._validate()
        self._save_checkpoint()
        self._save_model("last")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()  # after which processes cannot wait for each other
        plain = without_adapters(self.trained)
        if self.result.best_step:
            best = ClipNDModel.from_pretrained(self.arguments.output_dir / "best")
            plain.load_state_dict(best.state_dict())
        return plain.eval(), self.result

    def _resume(self) -> None:
        state = None
        if self.arguments.resume:
            state = load_checkpoint(self.arguments.output_dir, self.accelerator, self._settings())
        if state is not None:
            self.clock.start(state["step"], state["seconds"])
            self.result = TrainingResult(**state["result"] | {"is_finished": True})
            self.losses, self.worse = state["losses"], state["worse"]
            self.feed.negatives.restore(state["negatives"])
        self.log.start(self.clock.step)
        self.model.train()

    def _save_checkpoint(self) -> None:
        state = {
            "step": self.clock.step,
            "seconds": self.clock.seconds,
            "result": asdict(self.result),
            "losses": self.losses,
            "worse": self.worse,
            "negatives": self.feed.negatives.state(),
            "settings": self._settings(),
        }
        save_checkpoint(self.arguments, self.accelerator, state)

    def _settings(self) -> dict[str, Any]:
        return self.arguments.to_dict() | {"processes": self.accelerator.num_processes}

    def _save_model(self, name: str) -> None:
        """Writes a model without adapters: these would be of no use without the weights that the run started from."""
        if self.accelerator.is_main_process:
            with whole(self.arguments.output_dir / name) as folder:
                without_adapters(copy.deepcopy(self.trained)).save_pretrained(folder)
                self.collator.processor.save_pretrained(folder)

    def _whereabouts(self) -> str:
        """Where the last good weights lie, in words."""
        saved = newest_checkpoint(self.arguments.output_dir)
        return f"the last checkpoint is {saved}" if saved else "no checkpoint was written yet"

    @contextmanager
    def _terminable(self) -> Iterator[None]:
        """Ends the run after the step that is under way when a cluster asks for it (SIGTERM), and can be resumed."""

        def stop(*_: Any) -> None:
            self.is_told_to_stop = True

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def _make_accelerator(arguments: TrainingArguments) -> Accelerator:
    try:
        return Accelerator(
            mixed_precision=arguments.mixed_precision,
            log_with=None if arguments.report_to == "none" else arguments.report_to,
            project_dir=str(arguments.output_dir),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except ValueError as error:  # another precision was chosen before, or the machine has not this one
        raise M3ELError(f"mixed_precision {arguments.mixed_precision} cannot be had: {one_line(error)}") from error


_BAR = "{desc}: {n:.0f}%|{bar}| {elapsed}{postfix}"
