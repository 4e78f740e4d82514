"""Evaluations that tests run in this process, in several that torchrun starts, or in one that they kill."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset, disable_progress_bars

from m3el_hf import TASKS, ClipNDProcessor
from m3el_hf.data.collator import EntityRow
from m3el_hf.evaluation import chunks, control, evaluator, knowledge_base
from m3el_hf.evaluation.control import MentionBlind, average_mention
from m3el_hf.evaluation.evaluator import evaluate
from m3el_hf.evaluation.knowledge_base import evaluate_knowledge_base
from m3el_hf.evaluation.outcomes import Evaluation
from m3el_hf.evaluation.systems import ModelSystem
from m3el_hf.modeling.encoded_clipnd import Encoded
from m3el_hf.tasks import Task
from tests.conftest import tiny_model
from tests.evaluation.test_evaluator import Judge, dataset, make_row
from tests.evaluation.test_knowledge_base import base
from tests.training.killed import kill_at

FEW: tuple[Task, ...] = (TASKS["t2t"], TASKS["i2i"], TASKS["it2it"])


class CountingSystem(ModelSystem):
    """A model that remembers how many entities it has encoded."""

    encoded = 0

    def encode_entities(self, entities: Sequence[EntityRow]) -> Encoded:
        self.encoded += len(entities)
        return super().encode_entities(entities)


def counting_system(head: str = "clip", seed: int = 0) -> CountingSystem:
    """A tiny model, the same in every process."""
    processor = ClipNDProcessor.tiny(
        ["a band from Kansas known for a red star", "a state of the plains"], vocab_size=600
    )
    return CountingSystem("model", tiny_model(processor, head, seed), processor)


def make_small(change: Callable[[object, str, int], None]) -> None:
    """Several chunks, batches, blocks and rounds, though there are few of all; ``change`` is as `setattr`."""
    for module in (chunks, evaluator, knowledge_base):
        change(module, "CHUNK", 5)
    for module, name, size in (
        (evaluator, "BATCH_SIZE", 4),
        (evaluator, "GROUP_SIZE", 2),
        (control, "BATCH_SIZE", 3),
        (knowledge_base, "BLOCK", 3),
        (knowledge_base, "MENTIONS", 6),
    ):
        change(module, name, size)


def eleven_rows() -> Dataset:
    """Three batches; two rows lack pictures."""
    return dataset(make_row(number, **({"mention_image": None} if number in (2, 7) else {})) for number in range(11))


CASES = {
    "clip fresh": ("clip", 11, False),
    "clip one row": ("clip", 1, False),
    "matching kept": ("matching", 11, True),
    "matching again": ("matching", 11, True),
    "matching one row": ("matching", 1, True),
}
"""By name a head, how many rows there are, and whether there is a cache."""


def measure(accelerator: Accelerator | None, folder: Path) -> tuple[dict[str, Evaluation], dict[str, int]]:
    """What each case of both protocols finds, the cache being ``folder``, and how many entities it encodes."""
    found: dict[str, Evaluation] = {}
    encoded: dict[str, int] = {}
    many, entities = eleven_rows(), base(33)
    for case, (head, count, is_kept) in CASES.items():
        rows, system = many.select(range(count)), counting_system(head)
        blind = MentionBlind("control", system, average_mention(system, many, accelerator))
        systems = [system, blind, Judge("judge", 1.0, 0.0)]
        cache = folder if is_kept else None
        found[case] = evaluate(systems, rows, FEW, cache_dir=cache, accelerator=accelerator)
        encoded[case] = system.encoded
        found[f"{case}, base"] = evaluate_knowledge_base(
            systems, rows, entities, FEW, cache_dir=cache, accelerator=accelerator
        )
        encoded[f"{case}, base"] = system.encoded - encoded[case]
    return found, encoded


def shared(folder: Path) -> None:
    """Measures with all processes together, and then each process by itself in the same folder at the same time."""
    make_small(setattr)
    accelerator = Accelerator()
    rank = accelerator.process_index
    found, encoded = measure(accelerator, folder / "cache")
    for name, evaluation in found.items():
        evaluation.save(folder / str(rank) / name)
    accelerator.wait_for_everyone()
    alone = evaluate([counting_system()], eleven_rows(), FEW, cache_dir=folder / "contested")
    alone.save(folder / str(rank) / "alone")
    (folder / str(rank) / "encoded.json").write_text(json.dumps(encoded))


def killed(folder: Path) -> None:
    """Is killed when the fourth chunk is written, but not yet under its name."""
    make_small(setattr)
    kill_at("pathlib.Path.replace", 4)
    evaluate([counting_system()], eleven_rows(), cache_dir=folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    disable_progress_bars()
    {"shared": shared, "killed": killed}[sys.argv[1]](Path(sys.argv[2]))
