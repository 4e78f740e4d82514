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
from accelerate.utils import broadcast_object_list, set_seed
from datasets import Dataset, IterableDataset
from torch import Tensor
from tqdm import tqdm

from m3el_hf.data.collator import LinkingCollator
from m3el_hf.errors import M3ELError, one_line
from m3el_hf.evaluation.evaluator import evaluate
from m3el_hf.evaluation.systems import ModelSystem
from m3el_hf.modeling.modeling_clipnd import ClipNDModel
from m3el_hf.modeling.processing_clipnd import ClipNDProcessor
from m3el_hf.training.arguments import MODEL_SETTINGS, TrainingArguments
from m3el_hf.training.batches import Feed
from m3el_hf.training.checkpoints import check_unused, clean, load_checkpoint, save_checkpoint, whereabouts, whole
from m3el_hf.training.estimate import say_plan, say_size, seconds_of_a_step
from m3el_hf.training.gathering import total
from m3el_hf.training.log import TrainingLog
from m3el_hf.training.objective import Objective, TrainingBatch, backward
from m3el_hf.training.schedule import Clock
from m3el_hf.training.sharding import as_number, collect_weights, fix_scale, is_sharded
from m3el_hf.training.start import base_of, make_optimizer, make_trainable, without_adapters


@dataclass
class TrainingResult:
    """What a run did.

    Attributes:
        history: One entry a validation run: step, seconds, mean training loss since the one before, validation MRR.
        steps: Optimiser steps taken.
        best_step: The step whose weights the model has now.
        best_mrr: Their validation MRR, the mean over the tasks that some row fits; -1 without validation rows.
        is_finished: False for a run that was told to stop, and can be resumed.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    best_step: int = 0
    best_mrr: float = -1.0
    is_finished: bool = False


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
    ``log.jsonl`` with its plot. Each folder is written whole before the one before is replaced, so a run that was
    killed goes on from its last checkpoint with ``resume``, to the same weights. SIGTERM makes it write a checkpoint
    after the step that is under way, and end.

    Under FSDP, CLIP's scale is not trained, and the main process validates a copy of the model on its own device.

    Args:
        model: The model; changed in place, but for FSDP, which leaves it in parts.
        processor: Its processor, or a collator that holds it (and has cached the pictures).
        train_rows: Rows of `m3el_hf.data.schema.ROW_FEATURES`.
        validation_rows: The same, for choosing the weights; never trained on. None to keep the last, and ``best`` is
            these.
        arguments: The run's settings.
        progress: Say what is trained and how long it may take, and show a progress bar.
        on_epoch: Called in the main process after each epoch but the last, with how many there were, and the result
            so far. It must draw no random numbers.

    Returns:
        The model, with adapters merged if ``lora`` was asked for, and what the run did.

    Raises:
        M3ELError: If a split has no rows, ``output_dir`` holds a run and ``resume`` is not set, its checkpoint is of
            other settings or another model, the loss or the gradient is not finite, or the disk is full.
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
        self.arguments, self.validation_rows, self.on_epoch = arguments, validation_rows, on_epoch
        self.accelerator = _make_accelerator(arguments)
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        self.collator = processor if isinstance(processor, LinkingCollator) else LinkingCollator(processor)
        self.feed = Feed(train_rows, self.collator, arguments, processes, process)
        self.clock = Clock(arguments, self.feed.steps_per_epoch)
        if math.isinf(self.clock.total_steps) and not arguments.max_minutes:
            raise M3ELError("a streamed dataset has no known length: set --max-steps or --max-minutes")
        self.model, self.trained = model, make_trainable(model, arguments)
        self.is_sharded = is_sharded(self.accelerator)
        if self.is_sharded and arguments.mine_negatives:
            raise M3ELError("hard negatives cannot be looked for with divided weights (FSDP): leave mine_negatives out")
        if self.is_sharded:
            fix_scale(model)
        self.plain = copy.deepcopy(self.trained) if self.is_sharded else self.trained  # with whole weights
        objective = Objective(model, every_tower=self.is_sharded)
        self.objective, self.optimizer = self.accelerator.prepare(objective, make_optimizer(model, arguments))
        self.log = TrainingLog(arguments, self.accelerator)
        self.result = TrainingResult()
        self.loss = math.nan  # of the last step
        self.losses: list[float] = []  # since the last validation run
        self.worse = 0  # validation runs since the best
        self.begun_in = 0.0  # seconds that the last `_begin_epoch` took
        self.is_signalled = False  # this process
        self.is_told_to_stop = False  # some process, as all know
        self.is_announced = progress

    def go(self) -> tuple[ClipNDModel, TrainingResult]:
        """Takes the steps that are left."""
        self._resume()
        if self._is_over and self.result.is_finished:
            return self._best()
        self.result.is_finished = False
        is_quiet = not (self.is_announced and self.accelerator.is_main_process)
        self.bar = tqdm(total=100, desc="training", bar_format=_BAR, disable=is_quiet)
        with self.bar, self._terminable(), self._dead_workers_told():
            batches = self.feed.batches(self.clock, self._begin_epoch)
            if self.is_announced and not self._is_over:
                batches = self._announce(batches)
            while not self._is_over and not self.is_told_to_stop:
                self._step(*self._next(batches))
                self._after_step()
        if self._is_over:
            self._finish()
            return self._best()
        self._end_trackers()
        return self.model, self.result

    @property
    def _is_over(self) -> bool:
        return self.clock.progress >= 1 or self.worse >= (self.arguments.early_stopping_patience or math.inf)

    def _next(self, batches: Iterator[TrainingBatch]) -> tuple[TrainingBatch, float]:
        """The next batch, and how many seconds it let wait, besides those of what an epoch begins with."""
        asked, self.begun_in = time.monotonic(), 0.0
        try:
            batch = next(batches).to(self.accelerator.device)
            return batch, time.monotonic() - asked - self.begun_in
        except M3ELError as error:  # a worker's has its traceback in the message
            raise M3ELError(str(error).strip().rpartition("M3ELError: ")[2]) from error

    @contextmanager
    def _dead_workers_told(self) -> Iterator[None]:
        """Says what to do when a worker was killed, of which torch tells whatever is being done just then."""
        try:
            yield
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise M3ELError(
                f"{one_line(error)}: it may have run out of memory, so lower --dataloader-num-workers or the batch "
                f"size, and resume; {whereabouts(self.arguments.output_dir)}"
            ) from error

    def _begin_epoch(self, epoch: int) -> None:
        """Looks for hard negatives and calls back, where these are asked for."""
        began, every = time.monotonic(), self.arguments.mine_negatives
        if every and epoch % every == 0:
            count = self.arguments.negatives_per_mention
            self.feed.negatives.mine(self.model, self.collator, count, progress=not self.bar.disable)
        if epoch and self.on_epoch is not None and self.accelerator.is_main_process:
            self.on_epoch(epoch, self.result)
        self.begun_in = time.monotonic() - began

    def _announce(self, batches: Iterator[TrainingBatch]) -> Iterator[TrainingBatch]:
        """Says what is trained and how long it may take, by the first batch; returns all batches again."""
        batch, waited = self._next(batches)
        parts = self.arguments.gradient_accumulation_steps
        seconds = seconds_of_a_step(self.objective, batch, parts, self.accelerator)
        seconds += 0.0 if self.arguments.dataloader_num_workers else waited
        sizes = [len(batch.names), len(batch.entity_ids), batch.candidates]
        counts = total(torch.tensor(sizes, device=self.accelerator.device)).tolist()
        if not self.bar.disable:
            tqdm.write(say_size(self.objective, self.feed.row_count, *counts))
            tqdm.write(say_plan(self.clock.total_steps - self.clock.step, seconds, self.clock.seconds_allowed))
        return chain([batch], batches)

    def _step(self, batch: TrainingBatch, waited: float) -> None:
        clock, began = self.clock, time.monotonic()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * clock.rate
        terms = backward(self.objective, batch, self.arguments.gradient_accumulation_steps, self.accelerator)
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.arguments.max_grad_norm)
        loss, seconds, stop = self._agree(terms["loss"], clock.elapsed(), self.is_signalled)
        self._check_finite(batch, loss, as_number(norm).item())
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.advance(seconds / self.accelerator.num_processes)
        self.is_told_to_stop = stop > 0
        self.result.steps = clock.step
        self.loss = loss
        self.losses.append(loss)
        self.log.count(batch, terms, time.monotonic() - began, waited)

    def _check_finite(self, batch: TrainingBatch, loss: float, norm: float) -> None:
        """Stops before a step that would spoil the weights; fp16's own scaling skips a step and goes on by itself."""
        wrong = {"loss": loss} | ({} if self.accelerator.scaler else {"gradient": norm})
        for name, value in wrong.items():
            if not math.isfinite(value):
                rows = ", ".join(batch.names[:ROWS_NAMED]) + (", ..." if len(batch.names) > ROWS_NAMED else "")
                raise M3ELError(
                    f"the {name} is {value} at step {self.clock.step}, with the rows {rows}: lower --learning-rate, or "
                    f"look at these rows; {whereabouts(self.arguments.output_dir)}"
                )

    def _agree(self, loss: Tensor, *values: float) -> list[float]:
        """Returns the sums over processes: else one could validate or stop while another goes on."""
        return total(
            torch.stack([loss.float(), *(loss.new_tensor(one, dtype=torch.float32) for one in values)])
        ).tolist()

    def _after_step(self) -> None:
        clock = self.clock
        if clock.is_due("logging_steps"):
            self._write_log()
        if clock.is_due("eval_steps"):
            self._validate()
        if (clock.is_due("save_steps") or self.is_told_to_stop) and not self._is_over:
            self._save_checkpoint()
        self.bar.n = round(100 * clock.progress, 1)
        self.bar.set_postfix_str(
            f"step {clock.step}, loss {self.loss:.3f}, "
            f"{clock.step / clock.seconds:.2f} steps/s, {clock.seconds_left / 60:.0f} min left"
        )

    def _write_log(self) -> None:
        self.log.write(self.clock.step, self.optimizer.param_groups[0]["lr"])

    def _validate(self) -> None:
        """Measures the model as it is, and keeps its weights if it is the best so far."""
        if self.validation_rows is None:
            self.losses.clear()
            return
        self._collect()
        mrr = self._measure() if self.accelerator.is_main_process else None
        [mrr] = broadcast_object_list([mrr])  # so that all decide alike
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

    def _collect(self) -> None:
        """Brings `plain` up to date, where the weights that are trained are divided among processes."""
        if self.is_sharded:
            collect_weights(self.objective, self.plain)

    def _measure(self) -> float | None:
        model = base_of(self.plain).to(self.accelerator.device).eval()
        mrr = evaluate([ModelSystem("model", model, self.collator)], self.validation_rows).mean("model", "mrr")
        model.train()
        return mrr

    def _finish(self) -> None:
        """Writes down the last steps too."""
        if not self.log.is_empty:
            self._write_log()
        if self.losses:
            self._validate()
        self.log.plot()
        self._collect()
        if self.validation_rows is None:
            self.result.best_step = self.clock.step
            self._save_model("best")
        self._save_model("last")
        self.result.is_finished = True
        self._save_checkpoint()
        self._end_trackers()

    def _best(self) -> tuple[ClipNDModel, TrainingResult]:
        """The model with its best weights."""
        plain = without_adapters(self.plain).to(self.accelerator.device)
        best = ClipNDModel.from_pretrained(self.arguments.output_dir / "best")
        plain.load_state_dict(best.state_dict())
        return plain.eval(), self.result

    def _end_trackers(self) -> None:
        for tracker in self.accelerator.trackers:  # Accelerator.end_training would end the processes' group as well
            tracker.finish()

    def _resume(self) -> None:
        state, folder = None, self.arguments.output_dir
        if self.accelerator.is_main_process:
            clean(folder)
        self.accelerator.wait_for_everyone()
        if self.arguments.resume:
            state = load_checkpoint(folder, self.accelerator, self._settings())
        else:
            check_unused(folder)
        if state is not None:
            self.clock.start(state["step"], state["seconds"])
            self.result = TrainingResult(**state["result"])
            self.losses, self.worse = state["losses"], state["worse"]
            self.feed.negatives.restore(state["negatives"])
        self.log.start(state and state["log"])
        self.model.train()

    def _save_checkpoint(self) -> None:
        state = {
            "step": self.clock.step,
            "seconds": self.clock.seconds,
            "result": asdict(self.result),
            "losses": self.losses,
            "worse": self.worse,
            "negatives": self.feed.negatives.state(),
            "log": self.log.state(),
            "settings": self._settings(),
        }
        save_checkpoint(self.arguments, self.accelerator, state)

    def _settings(self) -> dict[str, Any]:
        """All that a checkpoint must have been made with."""
        known = {"processes": self.accelerator.num_processes, "steps of an epoch": self.feed.steps_per_epoch}
        known |= {name: getattr(self.model.config, name) for name in ("head", *MODEL_SETTINGS)}
        return self.arguments.to_dict() | known | {"template": self.collator.processor.template}

    def _save_model(self, name: str) -> None:
        """Writes a model without adapters: these would be of no use without the weights that the run started from."""
        if self.accelerator.is_main_process:
            with whole(self.arguments.output_dir / name) as folder:
                without_adapters(copy.deepcopy(self.plain)).save_pretrained(folder)
                self.collator.processor.save_pretrained(folder)

    @contextmanager
    def _terminable(self) -> Iterator[None]:
        """Ends the run after the step that is under way when a cluster asks for it (SIGTERM), and can be resumed."""

        def stop(*_: Any) -> None:
            self.is_signalled = True

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
        accelerator = Accelerator(
            mixed_precision=arguments.mixed_precision,
            log_with=None if arguments.report_to == "none" else arguments.report_to,
            project_dir=str(arguments.output_dir),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except ValueError as error:  # another precision was chosen before, or the machine has not this one
        raise M3ELError(f"mixed_precision {arguments.mixed_precision} cannot be had: {one_line(error)}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # which would train in fp32
        raise M3ELError("mixed_precision fp16 cannot be had on a CPU: choose bf16 or no")
    return accelerator


ROWS_NAMED = 16
"""How many rows of a batch an error names."""

_BAR = "{desc}: {n:.0f}%|{bar}| {elapsed}{postfix}"
