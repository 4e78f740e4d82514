"""One run of `m3el-hf train`: load, train, measure, write the card, publish."""

from __future__ import annotations

import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from m3el_hf.data.collator import LinkingCollator
from m3el_hf.data.manifest import Manifest
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.evaluator import evaluate
from m3el_hf.evaluation.measure import CONTROL_NOTE, MODEL, measure
from m3el_hf.evaluation.report import Setting, software
from m3el_hf.evaluation.report.contents import evaluation_report
from m3el_hf.evaluation.systems import ModelSystem
from m3el_hf.hub.model_card import render_model_card
from m3el_hf.hub.push import check_repository, push_folder
from m3el_hf.modeling.modeling_clipnd import ClipNDModel
from m3el_hf.sources import default_device, fetch_built, load_built, load_model, public_name
from m3el_hf.training.arguments import RunArguments
from m3el_hf.training.checkpoints import newest_checkpoint
from m3el_hf.training.estimate import random_state_kept
from m3el_hf.training.log import LINES, PLOT
from m3el_hf.training.loop import TrainingResult, train
from m3el_hf.training.recipes import write_recipe
from m3el_hf.training.start import start_model

RECIPE = "recipe.yaml"

BASE = "before training"
"""The model that training started from, in the card."""


def run_training(arguments: RunArguments) -> TrainingResult:
    """Trains, measures the best model, writes its card and publishes it if asked to; says on the way what it does.

    Every process of a run calls it; the main one alone prints and writes. Beside what `train` leaves in ``output_dir``
    there are ``recipe.yaml``, all settings, and ``best/README.md``, the card.

    Raises:
        M3ELError: If the data, the base or a setting cannot be used, or the trained model could not be published.
    """
    if arguments.push_to_hub is not None:
        check_repository(arguments.push_to_hub)  # before hours of training
    data = load_built(arguments.data)
    for split in ("train", "validation"):
        if split not in data:
            raise M3ELError(f"{arguments.data} has no {split} split: it needs train and validation")
    model, processor = start_model(
        arguments.base,
        arguments.head,
        data["train"],
        arguments.seed,
        arguments.template,
        **arguments.model_settings,
    )
    recipe, is_main = arguments.output_dir / RECIPE, os.environ.get("RANK", "0") == "0"  # which launchers set
    if is_main and newest_checkpoint(arguments.output_dir) is None:  # else it is of the run that is continued
        write_recipe(arguments, recipe)
    collator = LinkingCollator(processor)
    model, result = train(
        model,
        collator,
        data["train"],
        data["validation"],
        arguments.training,
        on_epoch=partial(_publish_so_far, arguments, data, collator) if arguments.hub_every_epochs else None,
    )
    if is_main:
        _finish(arguments, data, collator, model, result)
    return result


def _finish(
    arguments: RunArguments, data: DatasetDict, collator: LinkingCollator, model: ClipNDModel, result: TrainingResult
) -> None:
    folder = arguments.output_dir
    if not result.is_finished:
        again = f"m3el-hf train {shlex.quote(str(folder / RECIPE))} --resume"
        print(f"m3el-hf: told to stop after step {result.steps}: go on with {again}", file=sys.stderr)
        return
    print(f"best of {result.steps} steps: {result.best_step}, validation MRR {result.best_mrr:.3f}")
    _write_card(arguments, data, collator, model, result)
    print(f"models: {folder / 'best'} (with its card), {folder / 'last'}")
    print(f"log:    {folder / LINES}, {folder / PLOT}")
    if arguments.push_to_hub is not None:
        _push(arguments)


def _publish_so_far(
    arguments: RunArguments, data: DatasetDict, collator: LinkingCollator, epoch: int, result: TrainingResult
) -> None:
    """Publishes the best model so far, if it is its turn and there is one; a failure does not end the run."""
    if epoch % (arguments.hub_every_epochs or 1) or not result.best_step:
        return
    with random_state_kept(default_device()):
        model = ClipNDModel.from_pretrained(arguments.output_dir / "best").to(default_device())
        _write_card(arguments, data, collator, model, result)
    try:
        _push(arguments)
    except M3ELError as error:
        print(f"m3el-hf: {error}; training goes on", file=sys.stderr)


def _push(arguments: RunArguments) -> None:
    best, repository = arguments.output_dir / "best", str(arguments.push_to_hub)
    try:
        print(push_folder(best, repository, private=arguments.private))
    except M3ELError as error:
        private = " --private" if arguments.private else ""
        again = f"m3el-hf push {shlex.quote(str(best))} {repository}{private}"
        raise M3ELError(f"{error}; the model is safe in {best}: publish it with {again}") from error


def _write_card(
    arguments: RunArguments, data: DatasetDict, collator: LinkingCollator, model: ClipNDModel, result: TrainingResult
) -> None:
    """Measures the model and writes the card into ``best``."""
    split = "test" if "test" in data else "validation"
    system = ModelSystem(MODEL, model, collator)
    evaluation = measure([*_base(arguments, collator), system], data[split], training=data["train"])
    protocol = Manifest.load(fetch_built(arguments.data)).protocol.replace("_", " ")
    report = evaluation_report(
        f"{arguments.output_dir.name} on {public_name(arguments.data)}, {split}",
        evaluation,
        Setting(split, f"{evaluation.protocol}, {protocol}", "expected rank", str(arguments.seed)),
        strong=MODEL,
        notes=_notes(data, split, system),
        provenance=_provenance(arguments, data, model, result),
    )
    name = (arguments.push_to_hub or arguments.output_dir.resolve().name).rpartition("/")[2]
    card = render_model_card(model, report, evaluation, name=name, system=MODEL, base=arguments.base)
    card.save(Path(arguments.output_dir, "best", "README.md"))


def _base(arguments: RunArguments, collator: LinkingCollator) -> list[ModelSystem]:
    """What training started from, where that was trained before; a CLIP links as it is (zero-shot)."""
    if arguments.base is None:
        return []
    return [ModelSystem(BASE, load_model(arguments.base)[0], collator)]


def _notes(data: DatasetDict, split: str, system: ModelSystem) -> list[str]:
    notes = [CONTROL_NOTE]
    if split == "validation":
        return [*notes, "There is no test split: validation chose these weights, and its figures flatter them."]
    mean = evaluate([system], data["validation"]).mean(MODEL)
    if mean is not None:
        rows = len(data["validation"])
        notes.append(f"On validation, which chose these weights, the mean is {100 * mean:.1f} (n = {rows}).")
    return notes


def _provenance(
    arguments: RunArguments, data: DatasetDict, model: ClipNDModel, result: TrainingResult
) -> dict[str, Any]:
    changed = {
        name: value
        for name, value in arguments.training.to_dict().items()
        if value != arguments.defaults()[name] and name not in ("output_dir", "resume", "seed")
    }
    return {
        "data": public_name(arguments.data),
        "rows": ", ".join(f"{name} {rows.num_rows}" for name, rows in data.items()),
        "base": public_name(arguments.base) if arguments.base else "random weights",
        "head": model.config.head,
        "seed": arguments.seed,
        "steps": f"{result.steps}, best at {result.best_step} (validation MRR {result.best_mrr:.3f})",
        "settings": ", ".join(f"{name} {value}" for name, value in changed.items()) or "the defaults",
        "versions": software(),
    }
