"""The whole line in one call: data, baselines, training, figures, a saved model with its card, one linked mention."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets
from rich.console import Console

from m3el_hf.data.collator import LinkingCollator, candidates_of, undecoded
from m3el_hf.data.manifest import read_unusable_images
from m3el_hf.data.store import build
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.baselines import baselines
from m3el_hf.evaluation.control import MentionBlind, average_mention
from m3el_hf.evaluation.evaluator import evaluate
from m3el_hf.evaluation.examples import errors
from m3el_hf.evaluation.measure import CONTROL, CONTROL_NOTE, described, with_near_same
from m3el_hf.evaluation.outcomes import Evaluation
from m3el_hf.evaluation.report import Report, Setting, software
from m3el_hf.evaluation.report.contents import evaluation_report
from m3el_hf.evaluation.systems import ModelSystem
from m3el_hf.hub.model_card import render_model_card
from m3el_hf.linking.linker import EntityLinker
from m3el_hf.modeling.modeling_clipnd import ClipNDModel
from m3el_hf.modeling.processing_clipnd import ClipNDProcessor
from m3el_hf.sources import check_source, default_device, is_built, load_built
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.loop import TrainingResult, train
from m3el_hf.training.start import start_model

SMALL = 100
"""Below this many rows a 95 % interval spans some 20 points."""

BEFORE, AFTER = "before training", "after training"


@dataclass(frozen=True)
class QuickstartOptions:
    """What a quickstart can be told.

    Attributes:
        data_dir: A release in the M3EL format or a folder that `m3el-hf data build` wrote; None for generated data.
        output: The folder for everything that is written.
        minutes: About how long it may take in all.
        base: A CLIP checkpoint to start from, a folder or a Hub id; None for a tiny model from scratch.
        head: The head of `ClipNDConfig`.
        lora: Train adapters instead of all weights.
        seed: Seeds splits, order, draws and weights.
    """

    data_dir: Path | None = None
    output: Path = Path("runs/quickstart")
    minutes: float = 4.0
    base: str | None = None
    head: str = "clip"
    lora: bool = False
    seed: int = 0


def quickstart(options: QuickstartOptions, console: Console) -> Report:
    """Runs the whole line and returns what it measured; the same lies in ``options.output``.

    Raises:
        M3ELError: If the data or the base cannot be used.
    """
    if options.minutes <= 0:
        raise M3ELError(f"{options.minutes} minutes leave no time to train: allow at least 1")
    if options.base is not None:
        check_source(options.base)
    start = time.monotonic()
    data = _load_data(options, console)
    held_out = concatenate_datasets([data[split] for split in ("validation", "test") if split in data])
    model, processor = start_model(options.base, options.head, data["train"], options.seed)
    model.to(default_device())
    collator = LinkingCollator(processor)
    console.print(
        f"model: {model.num_parameters():,} parameters, head {options.head}, on {len(held_out)} held-out rows"
    )

    began = time.monotonic()
    first = [*baselines(described(held_out)), ModelSystem(BEFORE, model, collator)]
    before = evaluate(first, held_out, training=data["train"], progress=True)
    reserve = 2 * (time.monotonic() - began) + 5  # the model, its control and the test rows are measured once more
    minutes = options.minutes - (time.monotonic() - start + reserve) / 60
    if minutes < 0.05:
        raise M3ELError(f"{options.minutes} minutes leave no time to train: allow at least {options.minutes + 1:.0f}")
    arguments = _training_arguments(options, minutes)
    shutil.rmtree(arguments.output_dir, ignore_errors=True)  # of an earlier quickstart, which is done anew
    model, result = train(model, collator, data["train"], data["validation"], arguments)
    if not result.is_finished:
        raise M3ELError(f"told to stop after {result.steps} steps of training: nothing was measured; start it again")
    trained = ModelSystem(AFTER, model, collator)
    control = MentionBlind(CONTROL, trained, average_mention(trained, held_out))
    after = evaluate([trained, control], held_out, progress=True)
    evaluation = with_near_same(replace(before, outcomes=before.outcomes | after.outcomes), held_out)
    report = evaluation_report(
        f"M3EL quickstart on {_data_name(options)}",
        evaluation,
        Setting(_split(data), f"{evaluation.protocol}, as released", "expected rank", str(options.seed)),
        strong=AFTER,
        examples=errors(evaluation, trained, held_out),
        notes=_notes(evaluation, data),
        provenance=_provenance(options, data, result, time.monotonic() - start),
    )
    _save(options, model, processor, report, evaluation)
    linked = _link_one(model, processor, data["test" if "test" in data else "validation"])
    _show(console, report, options.output, linked)
    return report


def _split(data: DatasetDict) -> str:
    return "validation + test" if "test" in data else "validation"


def _data_name(options: QuickstartOptions) -> str:
    return "mini (generated)" if options.data_dir is None else options.data_dir.resolve().name


def _load_data(options: QuickstartOptions, console: Console) -> DatasetDict:
    store = options.data_dir
    if store is None or not is_built(store):
        store = options.output / "data"
        reader = "mini" if options.data_dir is None else "m3el"
        manifest = build(reader, options.data_dir, store, seed=options.seed, overwrite=True)
        console.print(f"data: {manifest.read} instances read, {len(manifest.skipped)} skipped, written to {store}")
        for reason in manifest.skipped[:3]:
            console.print(f"  skipped: {reason}", style="yellow", markup=False)
        if manifest.unusable_image_count:
            file, reason = next(iter(read_unusable_images(store).items()))
            line = f"  {manifest.unusable_image_count} pictures missing or broken, such as: {file} {reason}"
            console.print(line, style="yellow", markup=False)
    data = load_built(store)
    for split in ("train", "validation"):
        if split not in data:
            raise M3ELError(f"{store} has no {split} split: it needs train and validation to train and choose a model")
    return data


def _training_arguments(options: QuickstartOptions, minutes: float) -> TrainingArguments:
    """A tiny model learns all it knows in minutes; a pretrained one is only fine-tuned."""
    common: dict[str, Any] = {
        "output_dir": options.output / "checkpoints",
        "num_train_epochs": 100_000,  # time ends the run
        "max_minutes": minutes,
        "tasks_per_mention": 9,
        "lora": options.lora,
        "seed": options.seed,
    }
    if options.base is None:
        return TrainingArguments(**common, learning_rate=1e-3, augment_pictures=True, token_dropout=0.1)
    return TrainingArguments(**common, learning_rate=1e-4 if options.lora else 1e-5, per_device_train_batch_size=16)


def _link_one(model: ClipNDModel, processor: ClipNDProcessor, rows: Dataset) -> list[str]:
    """Links the first row that has most to show, by the linker, and says what came out, line by line."""
    rows = undecoded(rows)
    row = next((row for row in rows if row["mention_image"] and all(row["candidate_images"])), rows[0])
    entities = [entity._asdict() for entity in candidates_of(row)]
    linker = EntityLinker(model, processor, entities)
    links = linker(name=row["mention"], context=row["context"], image=row["mention_image"], top_k=len(entities))
    lines = [f"\nlinked: {row['mention']}  {row['context'] or ''}"]
    for link in links:
        gold = "gold" if link.qid == row["answer_qid"] else "    "
        lines.append(f"  {link.score:8.2f}  {gold}  {link.name}: {link.description or ''}")
    return lines


def _notes(evaluation: Evaluation, data: DatasetDict) -> list[str]:
    notes = [CONTROL_NOTE]
    if len(evaluation) < SMALL:
        notes.append(f"{len(evaluation)} rows are too few for any figure here, the control's included, to mean much.")
    if "test" in data:
        is_test = np.isin(evaluation.facts["id"], data["test"]["id"])
        mean = evaluation.mean(AFTER, where=is_test)
        if mean is not None:
            notes.append(
                "The figures are on validation + test, and validation chose the checkpoint; on test alone the trained "
                f"model's mean is {100 * mean:.1f} (n = {is_test.sum()})."
            )
    return notes


def _provenance(
    options: QuickstartOptions, data: DatasetDict, result: TrainingResult, seconds: float
) -> dict[str, Any]:
    return {
        "data": _data_name(options),
        "rows": ", ".join(f"{split} {rows.num_rows}" for split, rows in data.items()),
        "base": options.base or "random weights",
        "head": options.head,
        "seed": options.seed,
        "steps": f"{result.steps}, best at {result.best_step} (validation MRR {result.best_mrr:.3f})",
        "time": f"{seconds / 60:.1f} minutes on {os.cpu_count()} CPU cores",
        "versions": software(),
    }


def _save(
    options: QuickstartOptions, model: ClipNDModel, processor: ClipNDProcessor, report: Report, evaluation: Evaluation
) -> None:
    report.save(options.output)
    folder = options.output / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    name = f"clipnd-{_data_name(options).split()[0]}"
    card = render_model_card(model, report, evaluation, name=name, system=AFTER, base=options.base)
    card.save(folder / "README.md")


def _show(console: Console, report: Report, output: Path, linked: list[str]) -> None:
    console.print(report.to_rich())
    for note in report.notes:
        console.print(note, style="dim")
    console.print("\n".join(linked), markup=False, highlight=False)  # a name may look like markup
    console.print(f"\nreport:  {output / 'report.html'}\nmodel:   {output / 'model'}")
