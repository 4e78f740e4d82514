"""What an experiment trains and measures: each model and each evaluation once, kept by all that decides it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from filelock import FileLock

from m3el_hf.data.collator import EntityRow, LinkingCollator, undecoded
from m3el_hf.data.manifest import Manifest
from m3el_hf.data.store import build
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.baselines import baselines
from m3el_hf.evaluation.control import MentionBlind, average_mention
from m3el_hf.evaluation.evaluator import evaluate
from m3el_hf.evaluation.knowledge_base import evaluate_knowledge_base
from m3el_hf.evaluation.measure import CONTROL, MODEL, described, with_near_same
from m3el_hf.evaluation.outcomes import Evaluation
from m3el_hf.evaluation.report import software
from m3el_hf.evaluation.systems import ModelSystem, System
from m3el_hf.experiments.conditions import CONDITIONS
from m3el_hf.experiments.config import RECIPE, Arm, Experiment
from m3el_hf.experiments.jobs import Job, do
from m3el_hf.sources import default_device, fetch_built, is_built, load_built, load_model, model_revision, public_name
from m3el_hf.tasks import TASKS
from m3el_hf.training.arguments import RunArguments
from m3el_hf.training.checkpoints import newest_checkpoint
from m3el_hf.training.loop import train
from m3el_hf.training.recipes import read_recipe
from m3el_hf.training.start import start_model

MINI_INSTANCES = 4000
"""Of the data that is generated where none is given: some 400 of them are test rows."""

UNWEIGHTY = (
    "output_dir", "resume", "data", "push_to_hub", "hub_every_epochs", "private", "dataloader_num_workers",
    "save_steps", "save_total_limit", "logging_steps", "report_to",
)  # fmt: skip
"""Settings that change no weight."""

BASE_TASKS = ("t2t", "i2i", "it2it")
"""The tasks that are measured in a knowledge base."""

TIMED_MENTIONS = 64

BEFORE = "before training"
"""What a recipe's base is called where it stands among the baselines; a CLIP links zero-shot."""

DRAWN_WITH = 0
"""The seed of conditions: every model is measured on the same changed rows."""


@dataclass(frozen=True)
class Look:
    """How something is measured.

    Attributes:
        condition: What is done to the rows: a name of `CONDITIONS`, or empty for nothing.
        in_base: Among all entities of the data rather than among each mention's own candidates.
        on_other: On the other data.
    """

    condition: str = ""
    in_base: bool = False
    on_other: bool = False


PLAIN = Look()


@dataclass(frozen=True)
class ExperimentOptions:
    """What `m3el-hf experiment` can be told.

    Attributes:
        data: Folder or Hub id of a built dataset; None for generated data.
        other_data: Another one, for what asks how a model does on data of another source; None for none.
        recipe: YAML file of the training settings that all arms share; None for those of a tiny model from scratch.
        seeds: Each model is trained once a seed.
        output: The folder for models, evaluations and reports, which experiments may share.
        split: The rows that are measured.
    """

    data: str | None = None
    other_data: str | None = None
    recipe: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    output: Path = Path("runs/experiments")
    split: str = "test"


class Source:
    """A built dataset as an experiment uses it.

    Args:
        path: Its folder or Hub id.
        split: The rows that are measured.
        by_row: Whether rows are split anew, at random.

    Raises:
        M3ELError: If it cannot be loaded, or lacks a split.
    """

    def __init__(self, path: str, split: str, by_row: bool) -> None:
        self.name = public_name(path)
        self._path = path
        manifest = Manifest.load(fetch_built(path))
        self.revision, self.protocol = manifest.revision, manifest.protocol.replace("_", " ")
        self.data: DatasetDict = split_by_row(load_built(path)) if by_row else load_built(path)
        for needed in ("train", "validation", split):
            if needed not in self.data:
                raise M3ELError(f"{path} has no {needed} split: it needs train, validation, and one to measure on")
        self.rows: Dataset = self.data[split]
        self.about = {"data": self.revision, "split": split, "by_row": by_row}

    @cached_property
    def entities(self) -> Dataset:
        """All entities."""
        return load_built(self._path, "entities")["train"]


class Runner:
    """The models and evaluations of one experiment.

    Args:
        experiment: The experiment.
        options: What it is run on.

    Raises:
        M3ELError: If the data, the recipe or a setting cannot be used.
    """

    def __init__(self, experiment: Experiment, options: ExperimentOptions) -> None:
        if not options.seeds or len(set(options.seeds)) < len(options.seeds):
            raise M3ELError(f"seeds are {', '.join(map(str, options.seeds))}: give at least one, and each once")
        self.experiment, self.options = experiment, options
        self.recipe = read_recipe(options.recipe or Path(str(RECIPE)))
        for arm in experiment.arms:
            self._arguments(arm, 0, Path())  # a mistake in a setting answers before anything is done
        path = options.data or str(_mini(options.output / "mini"))
        self.source = Source(path, options.split, experiment.split_by_row)
        for arm in experiment.arms:
            self._rows(arm)  # and so does a topic that the data lacks
        self.other = Source(options.other_data, options.split, False) if options.other_data else None

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the figures come from."""
        others = [f"{self.other.name}, revision {self.other.revision}"] if self.other is not None else []
        return {
            "experiment": self.experiment.name,
            "data": "; ".join([f"{self.source.name}, revision {self.source.revision}", *others]),
            "rows": ", ".join(f"{split} {len(rows):,}" for split, rows in self.source.data.items()),
            "splits": "by row, at random" if self.experiment.split_by_row else "as built",
            "recipe": self.options.recipe.name if self.options.recipe else "a tiny model from scratch",
            "settings of all": ", ".join(f"{name} {value}" for name, value in self.recipe.items()),
            **{f"settings of {arm.name}": arm.said for arm in self.experiment.arms if arm.said},
            "seeds": ", ".join(map(str, self.options.seeds)),
            "versions": software(),
        }

    def do(self, looks: Sequence[tuple[Arm, Look]]) -> None:
        """Trains all arms, and measures them and the baselines; what was done before is not done again.

        Args:
            looks: What is measured, and how.
        """
        seeds = self.options.seeds
        jobs = [self._training(arm, seed) for arm in self.experiment.arms for seed in seeds]
        jobs += [self._of_baselines(look) for look in dict.fromkeys(look for _, look in looks)]
        jobs += [self._of_model(arm, seed, look) for arm, look in looks for seed in seeds]
        do(jobs, self.experiment.name)

    def evaluations(self, arm: Arm, look: Look = PLAIN) -> list[Evaluation]:
        """Of an arm's model and its control, once a seed."""
        return [Evaluation.load(self._of_model(arm, seed, look).folder) for seed in self.options.seeds]

    def baselines(self, look: Look = PLAIN) -> Evaluation:
        """Of the baselines."""
        return Evaluation.load(self._of_baselines(look).folder)

    def model(self, arm: Arm, seed: int) -> ModelSystem:
        """A trained model."""
        model, processor = load_model(self._training(arm, seed).folder / "best")
        return ModelSystem(MODEL, model, processor)

    def timings(self, arm: Arm) -> list[dict[str, float]]:
        """Of each seed, the milliseconds that a mention takes to be scored against so many entities."""
        look = Look(in_base=True)
        return [self._of_model(arm, seed, look).result()["milliseconds"] for seed in self.options.seeds]

    # Jobs.

    def _training(self, arm: Arm, seed: int) -> Job:
        settings = self._arguments(arm, seed, Path()).to_dict()
        for name in UNWEIGHTY:
            del settings[name]
        about = {**self.source.about, "topics": arm.topics, "fraction": arm.fraction, "settings": settings, **_code()}
        del about["split"]
        if settings["base"] is not None:
            about["base"] = model_revision(settings["base"])
        folder = self._folder("models", f"seed {seed}", about)  # arms of several experiments may be the same model
        return Job(f"training {arm.name}, seed {seed}", folder, lambda: self._train(arm, seed, folder), about)

    def _of_model(self, arm: Arm, seed: int, look: Look) -> Job:
        training = self._training(arm, seed)
        about = {
            **self._on(look).about,
            **vars(look),
            "model": training.folder.name,
            "base_tasks": BASE_TASKS,
            **_code(),
        }
        folder = self._folder("evaluations", f"seed {seed} {look.condition}", about)

        def make() -> dict[str, Any]:
            system = self.model(arm, seed)
            control = MentionBlind(CONTROL, system, average_mention(system, self._on(look).rows))
            rows = self._training_rows(arm, seed)["train"]
            self._measure([system, control], look, rows).save(folder)
            return {"milliseconds": self._timed(system, look)} if look.in_base else {}

        return Job(f"measuring {arm.name}, seed {seed} {look.condition}".rstrip(), folder, make, about, training)

    def _of_baselines(self, look: Look) -> Job:
        base = self.recipe.get("base")
        about = {**self._on(look).about, **vars(look), "model": "baselines", "base_tasks": BASE_TASKS, **_code()}
        if base is not None:
            about["base"] = model_revision(base)
        folder = self._folder("evaluations", f"baselines {look.condition}", about)

        def make() -> dict[str, Any]:
            source = self._on(look)
            texts = _texts(source.entities) if look.in_base else described(source.rows)
            systems: list[System] = [*baselines(texts)]
            if base is not None:
                systems.append(ModelSystem(BEFORE, *load_model(base)))
            self._measure(systems, look, self.source.data["train"]).save(folder)
            return {}

        return Job(f"measuring baselines {look.condition}".rstrip(), folder, make, about)

    def _folder(self, kind: str, name: str, about: dict[str, Any]) -> Path:
        digest = hashlib.blake2b(json.dumps(about, sort_keys=True, default=str).encode(), digest_size=6).hexdigest()
        return self.options.output / kind / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}-{digest}"

    # What they do.

    def _arguments(self, arm: Arm, seed: int, folder: Path) -> RunArguments:
        given = self.recipe | dict(arm.settings)
        return RunArguments(**given | {"data": "unused", "seed": seed, "output_dir": folder})

    def _train(self, arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
        arguments = self._arguments(arm, seed, folder)
        rows = self._training_rows(arm, seed)
        settings = arguments.model_settings
        model, processor = start_model(
            arguments.base, arguments.head, rows["train"], seed, arguments.template, **settings
        )
        training = replace(arguments.training, resume=newest_checkpoint(folder) is not None)
        _, result = train(
            model.to(default_device()),
            LinkingCollator(processor),
            rows["train"],
            rows["validation"],
            training,
            progress=False,
        )
        if not result.is_finished:
            raise M3ELError(f"told to stop after step {result.steps} of {folder.name}: run the same command to go on")
        for spare in (*folder.glob("checkpoint-*"), folder / "last"):  # which nobody will go on from
            shutil.rmtree(spare, ignore_errors=True)
        return {
            "rows": len(rows["train"]),
            "steps": result.steps,
            "best_step": result.best_step,
            "mrr": result.best_mrr,
        }

    def _rows(self, arm: Arm) -> dict[str, Dataset]:
        """The rows of an arm's topics that it may train on and is chosen by."""
        return {split: _of_topics(self.source.data[split], arm.topics) for split in ("train", "validation")}

    def _training_rows(self, arm: Arm, seed: int) -> dict[str, Dataset]:
        """The rows that an arm is trained on and chosen by; a part of the former is another one with each seed."""
        rows = self._rows(arm)
        return rows | {"train": _some(rows["train"], arm.fraction, seed)}

    def _measure(self, systems: Sequence[System], look: Look, training: Dataset) -> Evaluation:
        source, cache = self._on(look), self.options.output / "encoded"
        if look.in_base:
            tasks = [TASKS[name] for name in BASE_TASKS]
            return evaluate_knowledge_base(
                systems, source.rows, source.entities, tasks, training=training, cache_dir=cache
            )
        change = None
        if look.condition:
            change = CONDITIONS[look.condition].prepare(undecoded(source.rows), DRAWN_WITH)
        found = evaluate(systems, source.rows, change=change, training=training, cache_dir=cache)
        return with_near_same(found, source.rows)

    def _timed(self, system: ModelSystem, look: Look) -> dict[str, float]:
        """Milliseconds a mention, for as many entities as a power of ten or three times that, encoding left out."""
        rows = undecoded(self._on(look).rows)
        mentions = system.encode_mentions([rows[number] for number in range(min(TIMED_MENTIONS, len(rows)))])
        columns = self._on(look).entities.cast_column("image", rows.features["mention_image"])
        known = [EntityRow(**row) for row in columns.select(range(min(256, len(columns))))]
        encoded = system.encode_entities(known)
        times = {}
        for count in sizes(len(self._on(look).entities)):
            entities = encoded[torch.arange(count) % len(known)]
            times[str(count)] = 1000 * _fastest(
                lambda entities=entities: system.score(mentions, entities, [TASKS["it2it"]])
            )
        return {count: one / len(mentions) for count, one in times.items()}

    def _on(self, look: Look) -> Source:
        if look.on_other:
            assert self.other is not None, "looks on other data are asked for where there are some"
            return self.other
        return self.source


def sizes(most: int) -> list[int]:
    """Numbers of candidates from 3 up to ``most``, that included: 3, 10, 30, 100, ..."""
    steps = [factor * 10**power for power in range(9) for factor in (1, 3)]
    return [*(count for count in steps if 3 <= count < most), most]


def split_by_row(data: DatasetDict) -> DatasetDict:
    """Splits all rows anew, 80/10/10 by a hash of their ids, whatever entities they share."""
    rows = concatenate_datasets(list(data.values()))
    draws = np.array(
        [int.from_bytes(hashlib.blake2b(one.encode(), digest_size=4).digest()) / 2**32 for one in rows["id"]]
    )
    bounds = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
    return DatasetDict(
        {split: rows.select(np.flatnonzero((low <= draws) & (draws < high))) for split, (low, high) in bounds.items()}
    )


def _mini(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not is_built(folder):
            build("mini", None, folder, instances=MINI_INSTANCES, overwrite=True)
    return folder


def _of_topics(rows: Dataset, topics: tuple[str, ...] | None) -> Dataset:
    if topics is None:
        return rows
    chosen = np.flatnonzero(np.isin(rows["topic"], topics))
    if not len(chosen):
        known = sorted({topic for topic in rows["topic"] if topic is not None})
        raise M3ELError(f"no rows of the topics {', '.join(topics)}: the data has {', '.join(known) or 'none'}")
    return rows.select(chosen)


def _some(rows: Dataset, fraction: float, seed: int) -> Dataset:
    if fraction == 1:
        return rows
    return rows.shuffle(seed=seed).select(range(max(1, round(fraction * len(rows)))))


def _texts(entities: Dataset) -> Iterable[EntityRow]:
    return (EntityRow(**row, image=None) for row in entities.select_columns(["qid", "name", "description"]))


def _fastest(run: Any, times: int = 3) -> float:
    """Seconds of the fastest of some runs."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _code() -> dict[str, str]:
    """The versions that weights and scores depend on."""
    return {name: one for name, one in software().items() if name in ("m3el-hf", "torch", "transformers")}
