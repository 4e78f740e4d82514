"""How fast and in how much memory systems are measured, beside nine runs of one task each.

    python benchmarks/evaluation.py [--rows 150] [--large-rows 6] [--entities 10000 100000] [--head clip]

On generated data, with random weights, each figure beside its baseline of the same run:

- all nine tasks in one call of `evaluate`, beside nine calls of one task each: (a) on the same rows, which encode all
  that a row has, as whoever calls it task by task would; (b) on rows from which all that the task hides was taken
  away, the least that nine runs can encode. A tiny model, and one of ViT-B/32's size on few rows; repetitions
  alternate and the least time of each counts;
- a second run, whose entities are on disk, beside the first;
- two processes beside one, where there are two cores; starting them is not counted;
- peak memory of `evaluate_knowledge_base`, a process each, beside what all encoded entities and all scores would take.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, disable_progress_bars, load_dataset
from PIL import Image
from scoring import extra_peak, in_process, in_turns, memory

from m3el_hf import TASKS, ClipNDConfig, ClipNDModel, ClipNDProcessor
from m3el_hf.data.collator import EntityRow
from m3el_hf.data.schema import ENTITY_FEATURES, MENTION_FEATURES
from m3el_hf.data.store import build
from m3el_hf.evaluation.evaluator import evaluate
from m3el_hf.evaluation.knowledge_base import evaluate_knowledge_base
from m3el_hf.evaluation.outcomes import Evaluation
from m3el_hf.evaluation.systems import ModelSystem, Row
from m3el_hf.modeling.encoded_clipnd import Encoded
from m3el_hf.tasks import Task

MENTIONS = 256
"""Mentions that are ranked in a knowledge base."""

PICTURED = 8
"""Every so-manieth of its entities has a picture, which take the longest to encode."""


def main() -> None:
    """Prints every figure with its baseline."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head", choices=("clip", "matching", "pooled"), default="clip")
    parser.add_argument("--rows", type=int, default=150, help="rows of the tiny model")
    parser.add_argument("--large-rows", type=int, default=6, help="rows of the model of ViT-B/32's size; 0: none")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of each, in turns, with the tiny model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--entities", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seconds-of", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    disable_progress_bars()
    if given.peak:
        print(peak_of(given.peak, given.head))
        return
    if given.seconds_of:
        show_seconds(given.seconds_of, given.head, given.rows)
        return
    print(f"head {given.head}, {given.threads} thread(s), random weights, generated data")
    with TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        build("mini", None, data, progress=False, instances=max(200, 2 * given.rows))
        rows = load_dataset(str(data), split="train").shuffle(seed=0)  # neighbours share candidates
        show_tasks("tiny", tiny_system(given.head), rows.select(range(given.rows)), given.repeats)
        show_cache(tiny_system(given.head), rows.select(range(given.rows)), given.repeats)
        show_processes(data, given)
        if given.large_rows:
            show_tasks("ViT-B/32", large_system(given.head), rows.select(range(given.large_rows)), 1)
    if given.entities:
        show_memory(given.entities, given.head)


# What is measured.


class CountingSystem(ModelSystem):
    """A model that counts what it encodes."""

    mentions = entities = 0

    def encode_mentions(self, rows: Sequence[Row]) -> Encoded:
        """As the model does."""
        self.mentions += len(rows)
        return super().encode_mentions(rows)

    def encode_entities(self, entities: Sequence[EntityRow]) -> Encoded:
        """As the model does."""
        self.entities += len(entities)
        return super().encode_entities(entities)


def system_of(image_size: int, head: str, config: Callable[[int, int], ClipNDConfig]) -> CountingSystem:
    processor = ClipNDProcessor.tiny(["a band known for a red star", "a state of the plains"], image_size=image_size)
    torch.manual_seed(0)
    model = ClipNDModel(config(len(processor.tokenizer), processor.tokenizer.eos_token_id))
    return CountingSystem("model", model.eval(), processor)


def tiny_system(head: str) -> CountingSystem:
    return system_of(64, head, lambda size, end: ClipNDConfig.tiny(size, end, head=head))


def large_system(head: str) -> CountingSystem:
    """Towers of ViT-B/32's size, with a small vocabulary."""

    def config(size: int, end: int) -> ClipNDConfig:
        text = {"vocab_size": size, "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
        return ClipNDConfig({"text_config": text}, head=head)

    return system_of(224, head, config)


def shown(rows: Dataset, task: Task) -> Dataset:
    """The rows without what the task hides."""

    def hide(row: dict[str, Any]) -> dict[str, Any]:
        count = len(row["candidate_qids"])
        hidden: dict[str, Any] = {}
        if not task.mention.has_text:
            hidden |= {"mention": "", "context": None}
        if not task.mention.has_image:
            hidden |= {"mention_image": None}
        if not task.candidate.has_text:
            hidden |= {"candidate_names": [""] * count, "candidate_descriptions": [None] * count}
        if not task.candidate.has_image:
            hidden |= {"candidate_images": [None] * count}
        return hidden

    return rows.map(hide, features=rows.features)


# Speed.


def show_tasks(name: str, system: CountingSystem, rows: Dataset, repeats: int) -> None:
    parts = {task: shown(rows, task) for task in TASKS.values()}
    runs = {
        "nine tasks in one run": lambda: evaluate([system], rows),
        "nine runs of one task": lambda: [evaluate([system], rows, [task]) for task in TASKS.values()],
        "nine runs of what is shown": lambda: [evaluate([system], part, [task]) for task, part in parts.items()],
    }
    encoded = {}

    def counted(run: str) -> Any:
        system.mentions = system.entities = 0
        found = runs[run]()
        encoded[run] = f"{system.mentions} mentions and {system.entities} entities encoded"
        return found

    evaluate([system], rows.select(range(2)))  # loads what any run needs
    seconds, found = in_turns({run: lambda run=run: counted(run) for run in runs}, repeats, "cpu")
    print(f"{name}, {len(rows)} rows")
    for run, best in seconds.items():
        ratio = best / seconds["nine tasks in one run"]
        print(f"  {run:28}{best:8.2f} s, {ratio:4.1f} times one run's, {encoded[run]}")
    whole, *separate = found.values()
    for run, alone in zip(list(runs)[1:], separate, strict=True):
        pairs = zip([accuracy(whole, task) for task in TASKS], map(accuracy, alone, TASKS), strict=True)
        print(f"  {run:28} find {sum(one == other for one, other in pairs)} of the nine accuracies of one run")


def accuracy(found: Evaluation, task: str) -> float | None:
    figures = found.figures("model", task)
    return figures["accuracy"] if figures else None


def show_cache(system: CountingSystem, rows: Dataset, repeats: int) -> None:
    with TemporaryDirectory() as folder:
        evaluate([system], rows, cache_dir=Path(folder))
        runs = {
            "fresh": lambda: evaluate([system], rows),
            "entities on disk": lambda: evaluate([system], rows, cache_dir=Path(folder)),
        }
        seconds, _ = in_turns(runs, repeats, "cpu")
    print(f"tiny, {len(rows)} rows, nine tasks")
    for run, best in seconds.items():
        print(f"  {run:28}{best:8.2f} s, {seconds['fresh'] / best:4.1f} times as fast as fresh")


def show_processes(data: Path, options: argparse.Namespace) -> None:
    if (os.cpu_count() or 1) < 2:
        print("one core: two processes were not measured")
        return
    seconds = {}
    arguments = ["--seconds-of", data, "--head", options.head, "--rows", options.rows]
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        full = list(map(str, [*command, __file__, *arguments]))
        done = subprocess.run(full, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        seconds[processes] = float(done.stdout)
    print(
        f"tiny, {options.rows} rows, nine tasks: one process {seconds[1]:.2f} s, two {seconds[2]:.2f} s, "
        f"{seconds[1] / seconds[2]:.2f} times as fast"
    )


def show_seconds(data: Path, head: str, count: int) -> None:
    """The least seconds of three evaluations by all processes that were started together; the first one prints."""
    accelerator = Accelerator()
    rows, system = load_dataset(str(data), split="train").shuffle(seed=0).select(range(count)), tiny_system(head)
    seconds = []
    for _ in range(3):
        accelerator.wait_for_everyone()
        start = time.perf_counter()
        evaluate([system], rows, accelerator=accelerator)
        seconds.append(time.perf_counter() - start)
    if accelerator.is_main_process:
        print(min(seconds))
    accelerator.end_training()


# Memory.


def show_memory(sizes: Sequence[int], head: str) -> None:
    system = tiny_system(head)
    row = system.encode_entities([EntityRow(*one.values()) for one in entities(1)]).bytes_per_row
    peaks = {}
    print(f"tiny, {MENTIONS} mentions in a knowledge base, it2it, every {PICTURED}th entity with a picture")
    for size in sizes:
        start = time.perf_counter()
        peaks[size] = in_process("evaluation.py", "--peak", size, "--head", head)
        together = size * (row + 8 * MENTIONS)
        print(
            f"  {size:7} entities: {peaks[size] / 1e6:7.1f} MB more at the peak; all encoded entities and all scores "
            f"together take {together / 1e6:.1f} MB ({time.perf_counter() - start:.0f} s)"
        )
    if len(sizes) > 1:
        few, many = min(sizes), max(sizes)
        growth = (peaks[many] - peaks[few]) / (many - few)
        print(f"  from {few} to {many} entities, {growth:.0f} bytes more an entity, of {row + 8 * MENTIONS} together")


def peak_of(size: int, head: str) -> int:
    """Extra peak memory of ranking in a knowledge base, after a small run that loads what any run needs.

    The pages of the data itself, which the system maps into memory and takes back when it needs room, are left out.
    """
    system = tiny_system(head)
    rows = Dataset.from_list(list(mentions(size)), features=MENTION_FEATURES)
    with TemporaryDirectory() as folder:
        base = Dataset.from_generator(entities, features=ENTITY_FEATURES, cache_dir=folder, gen_kwargs={"count": size})
        evaluate_knowledge_base([system], rows, base.select(range(1000)))
        mapped = memory("RssFile")
        peak = extra_peak(lambda: evaluate_knowledge_base([system], rows, base))
        return peak - (memory("RssFile") - mapped)


def picture(number: int) -> dict[str, Any]:
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def entities(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield {
            "qid": f"Q{number}",
            "name": f"name {number}",
            "description": f"the {number}th of them",
            "image": picture(number) if number % PICTURED == 0 else None,
        }


def mentions(count: int) -> Iterator[dict[str, Any]]:
    """Mentions of entities from all over the knowledge base."""
    for number in range(MENTIONS):
        place = number * count // MENTIONS
        row = dict.fromkeys(MENTION_FEATURES) | {"id": str(number), "answer_qid": f"Q{place}"}
        yield row | {"mention": f"name {place}", "context": "one of them", "mention_image": picture(place)}


if __name__ == "__main__":
    main()
