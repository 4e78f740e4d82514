from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import pytest

from m3el_hf import M3ELError
from m3el_hf.modeling.configuration_clipnd import BRANCHES, DIRECTIONS, HEADS
from m3el_hf.modeling.processing_clipnd import TEMPLATES
from m3el_hf.training.arguments import MODEL_BRANCHES, MODEL_CHOICES, RunArguments
from m3el_hf.training.recipes import add_flags, read_recipe, run_arguments, write_recipe


def parsed(*words: object) -> RunArguments:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return run_arguments(parser.parse_args([str(word) for word in words]))


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_go_before_the_file_and_the_file_before_the_defaults(tmp_path):
    recipe = written(tmp_path, "data: m3el\nlearning_rate: 1e-5\nlora: yes\nmax_steps: 7\ntoken_dropout: 0\n")
    arguments = parsed(recipe, "--learning-rate", "2e-5", "--no-lora", "--max-steps", "none", "--head", "matching")
    assert arguments.data == "m3el"
    assert (arguments.learning_rate, arguments.lora, arguments.max_steps, arguments.head) == (
        2e-5,
        False,
        None,
        "matching",
    )
    assert parsed(recipe).lora is True
    assert parsed(recipe).max_steps == 7 and isinstance(parsed(recipe).max_steps, int)
    assert isinstance(parsed(recipe).token_dropout, float)
    assert parsed(recipe).warmup_steps == RunArguments(data="x").warmup_steps


def test_what_yaml_would_make_of_a_word_does_not_matter(tmp_path):
    recipe = written(tmp_path, "data: m3el\nmixed_precision: no\ntemplate: N\nfreeze: none\nmax_minutes:\n# end")
    arguments = parsed(recipe)
    assert (arguments.mixed_precision, arguments.template, arguments.freeze) == ("no", "N", "none")
    assert arguments.max_minutes is None


def test_every_field_has_a_flag_and_a_key(tmp_path):
    arguments = RunArguments(data="m3el", push_to_hub="user/x", private=True, max_steps=3, mixed_precision="no")
    write_recipe(arguments, tmp_path / "new" / "recipe.yaml")
    assert set(read_recipe(tmp_path / "new" / "recipe.yaml")) == {field.name for field in fields(RunArguments)}
    assert parsed(tmp_path / "new" / "recipe.yaml") == arguments


def test_help_says_what_the_defaults_are():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    said = " ".join(parser.format_help().split())
    for text in ("peak of the learning rate (default: 1e-05)", "new weights (default: 0)", "--no-lora", "runs/train)"):
        assert text in said
    assert "(default: None)" not in said and "(default: False)" not in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rat: 1e-5", "line 1: there is no setting 'learning_rat': did you mean learning_rate?"),
        ("data: x\nlearning-rate: 1", "line 2: there is no setting 'learning-rate': did you mean learning_rate?"),
        ("qqqqqq: 1", "there is no setting 'qqqqqq'; m3el-hf train --help lists all"),
        ("max_steps: 1.5", "max_steps is '1.5': give a whole number"),
        ("learning_rate: fast", "learning_rate is 'fast': give a number"),
        ("learning_rate: none", "learning_rate is 'none': give a number"),
        ("lora: 3", "lora is '3': give true or false"),
        ("max_steps: [1, 2]", "max_steps is a whole number, not a list or a mapping"),
        ("seed: 1\nseed: 2", "line 2: seed is set twice"),
        ("data: [", "is no YAML"),
        ("just words", "holds no settings"),
        ("- data", "holds no settings"),
        ("? [a]\n: 1", "there is no setting ''"),
        ("data: x\nhead: clop", "head is 'clop': choose one of clip, matching, pooled"),
        (
            "data: x\nmatching_branches: text,crosss",
            "matching_branches is 'text,crosss': give some of text, image, cross",
        ),
        ("data: x\nmatching_branches: text,", "matching_branches is 'text,': give some of"),
        ("data: x\nmatching_branches: [text]", "matching_branches is text, not a list or a mapping"),
        ("data: x\nbranch_weight: -1", "branch_weight is -1.0: it must not be negative"),
        ("data: x\nhub_every_epochs: 2", "hub_every_epochs is for a run that is published: set push_to_hub"),
        ("data: x\npush_to_hub: u/x\nhub_every_epochs: 0", "hub_every_epochs is 0"),
        ("", "there is no data"),
    ],
)
def test_a_mistake_is_one_line(text, says, tmp_path):
    with pytest.raises(M3ELError) as error:
        parsed(written(tmp_path, text))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_no_text_is_one_line(tmp_path):
    with pytest.raises(M3ELError, match="no such file: nowhere.yaml"):
        parsed("nowhere.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(M3ELError, match=r"x.yaml cannot be read"):
        parsed(tmp_path / "x.yaml")
    with pytest.raises(M3ELError, match="cannot be read"):
        parsed(tmp_path)


@pytest.mark.parametrize("words", [["--max-steps", "many"], ["--learning-rate", "fast"]])
def test_a_flag_of_another_type_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        parsed("--data", "x", *words)
    assert f"argument {words[0]}: {words[1]!r}: give a" in capsys.readouterr().err


def test_choices_are_those_of_the_model():
    assert set(MODEL_CHOICES["head"]) == set(HEADS)
    assert set(MODEL_CHOICES["matching_direction"]) == set(DIRECTIONS)
    assert set(MODEL_CHOICES["template"]) == set(TEMPLATES)
    assert set(MODEL_BRANCHES) == {name for branches in BRANCHES.values() for name in branches}


def test_branches_are_named_with_commas(tmp_path):
    arguments = parsed(written(tmp_path, "data: m3el\nmatching_branches: text, cross\n"))
    assert arguments.model_settings == {"matching_branches": ["text", "cross"]}
    assert parsed("--data", "m3el", "--matching-branches", "none").model_settings == {}


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_says_what_to_install(package, monkeypatch):
    monkeypatch.setattr("m3el_hf.training.arguments.find_spec", lambda name: None)
    with pytest.raises(M3ELError, match=f"{package}, which is not installed: pip install {package}$"):
        parsed("--data", "x", "--report-to", package)
