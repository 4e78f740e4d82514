"""The whole line in one call: data, baselines, training, figures, a saved model with its card, one linked mention."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets
from rich.console import Console

from m3el_hf.data.collator import LinkingCollator, undecoded
from m3el_hf.data.manifest import read_unusable_images
from m3el_hf.data.store import build
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.baselines import BASELINES
from m3el_hf.evaluation.evaluator import ModelSystem, System, Table, average_mention, evaluate
from m3el_hf.evaluation.run_report import Example, RunReport, software
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

BEFORE, AFTER, CONTROL = "before training", "after training", "mention-blind control"


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


def quickstart(options: QuickstartOptions, console: Console) -> RunReport:
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
    before = evaluate([*BASELINES, ModelSystem(BEFORE, model, collator)], held_out, progress=True)
    reserve = 2 * (time.monotonic() - began) + 5  # the model, its control and the test rows are measured once more
    minutes = options.minutes - (time.monotonic() - start + reserve) / 60
    if minutes < 0.05:
        raise M3ELError(f"{options.minutes} minutes leave no time to train: allow at least {options.minutes + 1:.0f}")
    arguments = _training_arguments(options, minutes)
    shutil.rmtree(arguments.output_dir, ignore_errors=True)  # of an earlier quickstart, which is done anew
    model, result = train(model, collator, data["train"], data["validation"], arguments)
    if not result.is_finished:
        raise M3ELError(f"told to stop after {result.steps} steps of training: nothing was measured; start it again")
    systems: list[System] = [ModelSystem(AFTER, model, collator)]
    systems.append(ModelSystem(CONTROL, model, collator, average_mention(model, collator, held_out)))
    after = evaluate(systems, held_out, progress=True)

    table = Table(before.cells | after.cells, before.evaluable, before.rows)
    test = evaluate(systems[:1], data["test"]) if "test" in data else None
    example = _link_one(model, processor, data["test" if "test" in data else "validation"])
    report = RunReport(
        title=f"M3EL quickstart on {_data_name(options)}",
        table=table,
        provenance=_provenance(options, data, result, time.monotonic() - start),
        notes=_notes(table, test),
        example=example,
    )
    _save(options, model, processor, report)
    _show(console, report, options.output)
    return report


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


def _link_one(model: ClipNDModel, processor: ClipNDProcessor, rows: Dataset) -> Example:
    """Links the first row that has most to show: text, a picture, and pictures of its candidates."""
    rows = undecoded(rows)
    row = next((row for row in rows if row["mention_image"] and all(row["candidate_images"])), rows[0])
    keys = ("candidate_qids", "candidate_names", "candidate_descriptions", "candidate_images")
    columns = zip(*(row[key] for key in keys), strict=True)
    entities = [dict(zip(("qid", "name", "description", "image"), values, strict=True)) for values in columns]
    linker = EntityLinker(model, processor, entities)
    links = linker(name=row["mention"], context=row["context"], image=row["mention_image"], top_k=len(entities))
    pictures = {entity["qid"]: entity["image"] and entity["image"]["bytes"] for entity in entities}
    return Example(
        mention=row["mention"],
        context=row["context"],
        picture=row["mention_image"] and row["mention_image"]["bytes"],
        candidates=[
            (link.name, link.description, link.score, link.qid == row["answer_qid"], pictures[link.qid])
            for link in links
        ],
    )


def _notes(table: Table, test: Table | None) -> list[str]:
    notes = [
        "The mention-blind control replaces every mention by the average mention: it must sit at chance, and how far "
        "it does not is the size of a shortcut.",
        f"A row counts for a task if it has all that the task shows; there are {table.rows} rows.",
    ]
    if table.rows < SMALL:
        notes.append(f"{table.rows} rows are too few for any figure here, the control's included, to mean much.")
    mean = None if test is None else test.mean(AFTER)
    if mean is not None and test is not None:
        notes.append(
            "The figures are on validation + test, and validation chose the checkpoint; on test alone the trained "
            f"model's mean is {100 * mean:.1f} (n = {test.rows})."
        )
    return notes


def _provenance(
    options: QuickstartOptions, data: DatasetDict, result: TrainingResult, seconds: float
) -> dict[str, Any]:
    return {
        "data": _data_name(options),
        "split": "validation + test" if "test" in data else "validation",
        "rows": ", ".join(f"{split} {rows.num_rows}" for split, rows in data.items()),
        "protocol": "as released, candidate set, ties count as chance",
        "base": options.base or "random weights",
        "head": options.head,
        "seed": options.seed,
        "steps": f"{result.steps}, best at {result.best_step} (validation MRR {result.best_mrr:.3f})",
        "time": f"{seconds / 60:.1f} minutes on {os.cpu_count()} CPU cores",
        **software(),
    }


def _save(options: QuickstartOptions, model: ClipNDModel, processor: ClipNDProcessor, report: RunReport) -> None:
    report.save(options.output)
    folder = options.output / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    name = f"clipnd-{_data_name(options).split()[0]}"
    render_model_card(model, report, name=name, system=AFTER, base=options.base).save(folder / "README.md")


def _show(console: Console, report: RunReport, output: Path) -> None:
    console.print(report.to_rich())
    for note in report.notes:
        console.print(note, style="dim")
    if report.example is not None:
        lines = [f"\nlinked: {report.example.mention}  {report.example.context or ''}"]
        for name, description, score, gold, _ in report.example.candidates:
            lines.append(f"  {score:8.2f}  {'gold' if gold else '    '}  {name}: {description or ''}")
        console.print("\n".join(lines), markup=False, highlight=False)  # a name may look like markup
    console.print(f"\nreport:  {output / 'report.html'}\nmodel:   {output / 'model'}")
