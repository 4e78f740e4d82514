"""Tiny experiments: two steps of training, so that what is tested is what is done and not what comes out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from m3el_hf.experiments.config import Experiment, read_experiment
from m3el_hf.experiments.runner import ExperimentOptions, Runner

RECIPE = """
head: clip
template: ND
max_steps: 2
num_train_epochs: 100
per_device_train_batch_size: 8
learning_rate: 1e-3
warmup_steps: 0
eval_steps: 2
"""

ARMS = """
title: Two arms
question: Is one better than the other?
kind: arms
reference: whole
arms:
  whole: {}
  names: {template: N}
"""


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of two steps."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which experiments of several tests find one another's models."""
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="session")
def read(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Experiment]:
    """Reads an experiment from text."""

    def read_text(text: str, name: str = "mine") -> Experiment:
        path = tmp_path_factory.mktemp("config") / f"{name}.yaml"
        path.write_text(text)
        return read_experiment(str(path))

    return read_text


@pytest.fixture(scope="session")
def runner(store: Path, recipe: Path, read: Callable[[str], Experiment]) -> Callable[..., Runner]:
    """Makes a runner of an experiment's text."""

    def make(text: str, output: Path, **options: object) -> Runner:
        given = {"data": str(store), "recipe": recipe, "seeds": (0, 1), "output": output} | options
        return Runner(read(text), ExperimentOptions(**given))  # type: ignore[arg-type]

    return make
