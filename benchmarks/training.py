"""How many mentions a second training takes, beside a plain loop and beside the towers alone.

    python benchmarks/training.py [--batch 64] [--head matching] [--tasks-per-mention 1] [--steps 8] [--device cuda]

On generated data, all nine tasks, a tiny model. Baselines, in the same run on the same batches: (a) the same model in a
plain loop, which encodes every candidate of every row, however often an entity is among them, and runs both towers on
all; (b) forward and backward of the towers alone on what our step encodes, the least that a step can take. Then a short
run through the loop says which share of a step waits for its data, with one process that prepares it ahead. Repetitions
alternate and the least time of each counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from accelerate import Accelerator
from datasets import DatasetDict, disable_progress_bars, load_dataset

from m3el_hf import ClipNDModel, ClipNDProcessor
from m3el_hf.data.collator import LinkingCollator, candidates_of, undecoded
from m3el_hf.data.store import build
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.batches import TrainingCollator, epoch_order
from m3el_hf.training.loop import train
from m3el_hf.training.objective import Objective, TrainingBatch, backward, leave_out_unwanted
from m3el_hf.training.start import start_model

Step = Callable[[], Any]


def main() -> None:
    """Prints every figure with its baselines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--head", choices=("clip", "matching", "pooled"), default="clip")
    parser.add_argument("--tasks-per-mention", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8, help="batches of each repetition")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bars()
    with TemporaryDirectory() as folder:
        build("mini", None, Path(folder) / "m3el", progress=False)
        data = load_dataset(f"{folder}/m3el")
        model, processor = start_model(None, options.head, data["train"])
        show_rates(model.to(options.device).train(), processor, data, options)
        show_text_only(model, processor, data, options)
        show_caching(model, processor, data, options)
        show_waiting(model, processor, data, options, Path(folder) / "run")


def show_rates(model: ClipNDModel, processor: ClipNDProcessor, data: DatasetDict, options: argparse.Namespace) -> None:
    """Prints mentions a second of our step, of the plain one, and of the towers alone."""
    arguments = TrainingArguments(tasks_per_mention=options.tasks_per_mention)
    collator = LinkingCollator(processor)
    rows = undecoded(data["train"])
    chosen = [rows.select(order).to_list() for order in epoch_order(len(rows), options.batch, 0, 0)[: options.steps]]
    collate = TrainingCollator(collator, arguments, epoch=0)
    ours = [collate(batch).to(torch.device(options.device)) for batch in chosen]
    plain = [moved(every_candidate(collator, collate, batch), options.device) for batch in chosen]
    accelerator, objective = Accelerator(cpu=options.device == "cpu"), Objective(model)
    runs: dict[str, list[Step]] = {
        "m3el_hf": [lambda one=one: backward(objective, one, 1, accelerator) for one in ours],
        "plain loop": [lambda one=one: model(**one).loss.backward() for one in plain],
        "towers alone": [lambda one=one: towers(model, one) for one in map(leave_out_unwanted, ours)],
    }
    seconds = {name: float("inf") for name in runs}
    for _ in range(options.repeats):
        for name, steps in runs.items():
            seconds[name] = min(seconds[name], timed(steps, model, options.device))
    mentions = sum(map(len, chosen))
    unique, candidates = sum(len(one.entity_ids) for one in ours), sum(one.candidates for one in ours)
    tasks = f"{options.tasks_per_mention} task(s) a mention"
    print(f"head {options.head}, batch {options.batch}, {tasks}, {options.threads} thread(s)")
    print(f"  {candidates / unique:.2f} candidates for each entity encoded")
    for name, taken in seconds.items():
        print(
            f"  {name:14}{mentions / taken:9.1f} mentions/s  {seconds['plain loop'] / taken:5.2f} times the plain loop"
        )
    print(f"  {1 - seconds['towers alone'] / seconds['m3el_hf']:.1%} of our step is not the towers")


def show_text_only(
    model: ClipNDModel, processor: ClipNDProcessor, data: DatasetDict, options: argparse.Namespace
) -> None:
    """Prints what a step takes whose tasks show no picture, and how often the vision tower ran in it."""
    rows, calls = undecoded(data["train"]).select(range(options.batch)).to_list(), []
    hook = model.clip.vision_model.register_forward_hook(lambda *_: calls.append(1))
    accelerator, objective = Accelerator(cpu=options.device == "cpu"), Objective(model)
    seconds = {}
    for tasks in ("it2it=1", "t2t=1"):
        batch = TrainingCollator(LinkingCollator(processor), TrainingArguments(tasks=tasks), epoch=0)(rows)
        moved_batch = batch.to(torch.device(options.device))
        calls.clear()
        steps = [lambda one=moved_batch: backward(objective, one, 1, accelerator)]
        seconds[tasks] = min(timed(steps, model, options.device) for _ in range(options.repeats))
    hook.remove()
    ratio = seconds["it2it=1"] / seconds["t2t=1"]
    print(f"  a step of texts alone: {ratio:.1f} times as fast as one of all; the vision tower ran {len(calls)} times")


def show_caching(
    model: ClipNDModel, processor: ClipNDProcessor, data: DatasetDict, options: argparse.Namespace
) -> None:
    """Prints what a step keeps for its backward pass at the most: a batch, 16 of them, and these in 16 parts."""
    rows = undecoded(data["train"])
    accelerator, objective = Accelerator(cpu=options.device == "cpu"), Objective(model)
    collate = TrainingCollator(LinkingCollator(processor), TrainingArguments(), epoch=0)
    many = min(16 * options.batch, len(rows))
    for size, parts in ((options.batch, 1), (many, 1), (many, 16)):
        batch = collate(rows.select(range(size)).to_list()).to(torch.device(options.device))
        kept = most_kept(lambda batch=batch, parts=parts: backward(objective, batch, parts, accelerator))
        model.zero_grad()
        print(f"  {size:5} mentions in {parts:2} part(s): {kept / 1e6:8.1f} MB kept for the backward pass at the most")


def most_kept(step: Step) -> int:
    """Bytes of the tensors that autograd keeps at once, weights aside, at the most."""
    now = most = 0

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal now, most
            self.tensor, self.bytes = tensor, 0 if isinstance(tensor, torch.nn.Parameter) else tensor.nbytes
            now += self.bytes
            most = max(most, now)

        def __del__(self) -> None:
            nonlocal now
            now -= self.bytes

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        step()
    return most


def every_candidate(collator: LinkingCollator, collate: TrainingCollator, rows: list[Any]) -> dict[str, Any]:
    """Arguments of `ClipNDModel.forward` in which each row brings its own candidates, shown whole, and its tasks."""
    batch, drawn = collator(rows), collate(rows)
    everyone = [one for row in rows for one in candidates_of(row)]
    position = {qid: index for index, qid in enumerate(batch.qids)}
    repeated = torch.tensor([position[one.qid] for one in everyone])
    starts = torch.tensor([0, *(len(row["candidate_qids"]) for row in rows[:-1])]).cumsum(0)
    return {
        "mentions": batch.mentions,
        "entities": {name: None if value is None else value[repeated] for name, value in batch.entities.items()},
        "labels": starts + torch.tensor([row["answer"] for row in rows]),
        "rows": drawn.rows,
        "views": drawn.views,
    }


def towers(model: ClipNDModel, batch: TrainingBatch) -> None:
    """Encodes what our step encodes, and takes a gradient of ones back."""
    sides = (batch.mentions, batch.entities)
    encoded = []
    for side in sides:
        if side["has_text"].any():
            shown = side["has_text"]
            encoded.append(model.clip.get_text_features(side["input_ids"][shown], side["attention_mask"][shown]))
        if side["has_image"].any():
            encoded.append(model.clip.get_image_features(side["pixel_values"][side["has_image"]]))
    torch.stack([F.normalize(one.pooler_output, dim=-1).sum() for one in encoded]).sum().backward()


def timed(steps: list[Step], model: ClipNDModel, device: str) -> float:
    started = time.perf_counter()
    for step in steps:
        step()
        model.zero_grad()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def moved(value: Any, device: str) -> Any:
    if isinstance(value, dict):
        return {name: moved(one, device) for name, one in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value


def show_waiting(
    model: ClipNDModel, processor: ClipNDProcessor, data: DatasetDict, options: argparse.Namespace, folder: Path
) -> None:
    """Prints which share of a step waits for its data."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=40,
        per_device_train_batch_size=options.batch,
        tasks_per_mention=options.tasks_per_mention,
        dataloader_num_workers=1,
        logging_steps=10,
    )
    train(model, processor, data["train"], None, arguments, progress=False)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    waited = [line["waiting_for_data"] for line in lines if "waiting_for_data" in line]
    print(f"  waiting for data, one worker: {', '.join(f'{share:.1%}' for share in waited)} of each ten steps")


if __name__ == "__main__":
    main()
