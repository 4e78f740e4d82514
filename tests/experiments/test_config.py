from __future__ import annotations

import pytest

from m3el_hf import M3ELError
from m3el_hf.experiments.conditions import CONDITIONS
from m3el_hf.experiments.config import RECIPE, experiment_names, read_experiment
from m3el_hf.training.arguments import RunArguments
from m3el_hf.training.recipes import read_recipe
from tests.experiments.conftest import ARMS

ALL = [
    "ablation-heads", "ablation-text", "generalisation", "image-augmentation", "low-resource", "rare-entities",
    "robustness", "scale", "topics",
]  # fmt: skip


def test_the_papers_open_questions_are_all_there():
    assert experiment_names() == ALL


@pytest.mark.parametrize("name", ALL)
def test_every_arm_is_a_run_that_can_be_trained(name):
    experiment = read_experiment(name)
    assert experiment.question.endswith("?")
    for arm in experiment.arms:
        arguments = RunArguments(**read_recipe(RECIPE) | dict(arm.settings) | {"data": "x"})
        assert arguments.max_steps == 200
    assert len({repr((arm.settings, arm.topics, arm.fraction)) for arm in experiment.arms}) == len(experiment.arms)


def test_robustness_looks_at_every_condition():
    assert read_experiment("robustness").conditions == tuple(CONDITIONS)


def test_settings_are_read_as_a_recipe_reads_them(read):
    experiment = read(ARMS.replace("{template: N}", "{template: N, learning_rate: 1e-4, lora: no, fraction: 0.5}"))
    arm = experiment.arm("names")
    assert arm.settings == {"template": "N", "learning_rate": 1e-4, "lora": False}
    assert (arm.fraction, arm.topics, experiment.reference) == (0.5, None, "whole")
    assert arm.said == "template N, learning_rate 0.0001, lora False, 50% of the training rows"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("kind: arms", "kind: legs"), "kind 'legs': choose one of arms, topics"),
        (("question: Is one better than the other?", ""), "has no question"),
        (("reference: whole", "reference: hole"), "the reference 'hole' is none of its arms"),
        (("reference: whole", "colour: red"), "nothing called 'colour'"),
        (("template: N", "templat: N"), "arm 'names': there is no setting 'templat': did you mean template?"),
        (("template: N", "fraction: 0"), "sees '0' of the rows: above 0, at most 1"),
        (("template: N", "fraction: many"), "sees 'many' of the rows"),
        (("{template: N}", "[1, 2]"), "the arm 'names' holds no settings"),
        (("  names: {template: N}", "  names: {template: [N]}"), "template is text, not a list"),
        (("arms:\n  whole: {}\n  names: {template: N}", "arms: [whole]"), "arms are a mapping"),
        (("reference: whole", "conditions: [rain]"), "no condition 'rain': choose of mention-without-picture"),
        (("title: Two arms", "title: {"), "is no YAML"),
        (("reference: whole", "conditions: [mention-without-name]"), "no other kind has any"),
        (("kind: arms", "kind: conditions"), "kind conditions has some conditions"),
        (("reference: whole", "split_by_row: True"), "split_by_row is 'True': write true or false"),
        (("template: N", "topics: movies"), "has topics 'movies': give a list, as in [books]"),
        (("template: N", "topics: []"), "has topics []: give a list"),
        (("template: N", "seed: 7"), "the arm 'names' sets seed, which the experiment decides"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(read, change, says):
    assert change[0] in ARMS
    with pytest.raises(M3ELError, match="mine") as raised:
        read(ARMS.replace(*change))
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_an_unknown_name_lists_all():
    for name in ("ablation", "recipe", "nowhere/x.yaml"):
        with pytest.raises(M3ELError, match="choose one of ablation-heads, ablation-text"):
            read_experiment(name)
