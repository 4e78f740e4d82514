"""What an experiment is: a question, the models to train for it, and what is done to the rows they are measured on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from m3el_hf.errors import M3ELError, one_line
from m3el_hf.training.recipes import read_setting

Kind = Literal["arms", "topics", "transfer", "familiarity", "conditions", "scale"]
"""How the figures are compared: see `m3el_hf.experiments.findings`."""

RECIPE = files("m3el_hf.experiments") / "configs" / "recipe.yaml"
"""The training settings that all arms share where nobody says otherwise."""


NOT_ITS_OWN = ("data", "seed", "output_dir", "resume", "push_to_hub", "hub_every_epochs", "private")
"""Settings that no arm has: they would be of no effect."""


@dataclass(frozen=True)
class Arm:
    """One model to train.

    Attributes:
        name: Its name in every table.
        settings: What of the recipe it changes: fields of `m3el_hf.training.arguments.RunArguments`.
        topics: The topics of its training and validation rows; None for all.
        fraction: The share of the training rows that it sees.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    topics: tuple[str, ...] | None = None
    fraction: float = 1.0

    @property
    def said(self) -> str:
        """All that it changes, in one line."""
        parts = [f"{name} {value}" for name, value in self.settings.items()]
        parts += [f"topics {' '.join(self.topics)}"] if self.topics is not None else []
        return ", ".join([*parts, *([f"{self.fraction:.0%} of the training rows"] if self.fraction < 1 else [])])


@dataclass(frozen=True)
class Experiment:
    """An experiment.

    Attributes:
        name: Of the file it was read from.
        title: The heading of its report.
        question: What it asks.
        kind: How its figures are compared.
        arms: The models.
        reference: The arm that the others are compared with, and that is looked at more closely.
        conditions: Names of `m3el_hf.experiments.conditions.CONDITIONS` that the reference is measured under.
        note: What must be read with its figures; may be empty.
        split_by_row: Whether rows are split anew at random, so that training has met golds of test rows. This measures
            memory of entities; all else keeps the splits of the data.
    """

    name: str
    title: str
    question: str
    kind: Kind
    arms: tuple[Arm, ...]
    reference: str
    conditions: tuple[str, ...] = ()
    split_by_row: bool = False
    note: str = ""

    def arm(self, name: str) -> Arm:
        """The arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)


def experiment_names() -> list[str]:
    """The experiments that come with the package."""
    names = (Path(one.name) for one in (files("m3el_hf.experiments") / "configs").iterdir())
    return sorted(name.stem for name in names if name.suffix == ".yaml" and name.stem != "recipe")


def read_experiment(name: str) -> Experiment:
    """Reads an experiment by its name, or a file of your own by its path.

    Raises:
        M3ELError: If there is none, or the file says something that is not known.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else files("m3el_hf.experiments") / "configs" / f"{name}.yaml"
    if not path.is_file() or name == "recipe":
        raise M3ELError(f"no experiment {name!r}: choose one of {', '.join(experiment_names())}, or pass a YAML file")
    try:
        read: Any = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise M3ELError(f"{path} is no YAML: {one_line(error)}") from error
    if not isinstance(read, dict):
        raise M3ELError(f"{path} holds no experiment: write title, question, kind and arms")
    return _experiment(Path(path.name).stem, read)


_KEYS = {"title", "question", "kind", "arms", "reference", "conditions", "split_by_row", "note"}


def _experiment(name: str, read: dict[str, Any]) -> Experiment:
    from m3el_hf.experiments.conditions import CONDITIONS  # which imports much

    for key in read:
        if key not in _KEYS:
            raise M3ELError(f"experiment {name}: there is nothing called {key!r}; use {', '.join(sorted(_KEYS))}")
    for key in ("title", "question", "kind", "arms"):
        if not read.get(key):
            raise M3ELError(f"experiment {name} has no {key}")
    if read["kind"] not in get_args(Kind):
        raise M3ELError(f"experiment {name} is of kind {read['kind']!r}: choose one of {', '.join(get_args(Kind))}")
    if not isinstance(read["arms"], dict):
        raise M3ELError(f"experiment {name}: arms are a mapping from names to settings")
    arms = tuple(_arm(name, arm, settings or {}) for arm, settings in read["arms"].items())
    reference = read.get("reference", arms[0].name)
    if reference not in [arm.name for arm in arms]:
        raise M3ELError(f"experiment {name}: the reference {reference!r} is none of its arms")
    for condition in (conditions := tuple(read.get("conditions", ()))):
        if condition not in CONDITIONS:
            raise M3ELError(f"experiment {name}: no condition {condition!r}: choose of {', '.join(CONDITIONS)}")
    if bool(conditions) != (read["kind"] == "conditions"):
        raise M3ELError(f"experiment {name}: kind conditions has some conditions, and no other kind has any")
    by_row = read.get("split_by_row", "false")
    if by_row not in ("true", "false"):
        raise M3ELError(f"experiment {name}: split_by_row is {by_row!r}: write true or false")
    return Experiment(
        name=name,
        title=read["title"],
        question=" ".join(read["question"].split()),
        kind=read["kind"],
        arms=arms,
        reference=reference,
        conditions=conditions,
        split_by_row=by_row == "true",
        note=" ".join(str(read.get("note", "")).split()),
    )


def _arm(experiment: str, name: str, read: Any) -> Arm:
    if not isinstance(read, dict):
        raise M3ELError(f"experiment {experiment}: the arm {name!r} holds no settings: write lines such as head: clip")
    settings = dict(read)
    topics = settings.pop("topics", None)
    fraction = settings.pop("fraction", "1")
    if not isinstance(fraction, str) or not re.fullmatch(r"1(\.0*)?|0?\.\d*[1-9]\d*", fraction):
        raise M3ELError(f"experiment {experiment}: the arm {name!r} sees {fraction!r} of the rows: above 0, at most 1")
    if topics is not None and not (isinstance(topics, list) and topics and all(isinstance(one, str) for one in topics)):
        raise M3ELError(f"experiment {experiment}: the arm {name!r} has topics {topics!r}: give a list, as in [books]")
    for key in NOT_ITS_OWN:
        if key in settings:
            raise M3ELError(f"experiment {experiment}: the arm {name!r} sets {key}, which the experiment decides")
    place = f"experiment {experiment}, arm {name!r}"
    values = {key: read_setting(key, value, place) for key, value in settings.items()}
    return Arm(name, values, None if topics is None else tuple(topics), float(fraction))
