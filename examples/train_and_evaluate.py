"""Trains a tiny linker on generated data for a minute and prints its accuracy on the nine tasks.

python examples/train_and_evaluate.py [MINUTES]
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import load_dataset
from rich.console import Console

from m3el_hf.data.collator import LinkingCollator
from m3el_hf.data.store import build
from m3el_hf.evaluation.measure import measure
from m3el_hf.evaluation.report import Setting
from m3el_hf.evaluation.report.contents import evaluation_report
from m3el_hf.evaluation.systems import ModelSystem
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.loop import train
from m3el_hf.training.start import start_model


def main(minutes: float = 1.0) -> None:
    with TemporaryDirectory() as folder:
        build("mini", None, Path(folder) / "m3el", instances=500)
        data = load_dataset(f"{folder}/m3el")
        model, processor = start_model(base=None, head="clip", rows=data["train"])
        collator = LinkingCollator(processor)  # one for both, so that each picture is decoded once
        arguments = TrainingArguments(
            output_dir=Path(folder) / "run",
            num_train_epochs=1000,
            max_minutes=minutes,
            learning_rate=1e-3,
            tasks_per_mention=9,
            eval_steps=0.333,
        )
        model, _ = train(model, collator, data["train"], data["validation"], arguments)
        evaluation = measure([ModelSystem("trained", model, collator)], data["test"], training=data["train"])
        setting = Setting("test", "candidate set, as released", "expected rank", "0")
        Console().print(evaluation_report("mini, test", evaluation, setting, strong="trained").to_rich())


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]))
