from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from m3el_hf.training.arguments import RunArguments
from m3el_hf.training.recipes import read_recipe
from tests.conftest import instance, tiny_model, write_release

EXAMPLES = Path(__file__).parents[1] / "examples"


def main_of(name: str):
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_train_and_evaluate(capsys):
    main_of("train_and_evaluate.py")(minutes=0.02)
    assert "it2it" in capsys.readouterr().out


def test_link_a_mention(store, processor, tmp_path, capsys):
    tiny_model(processor).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    main_of("link_a_mention.py")(str(tmp_path), str(store), "a crimson star on stripes")
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_audit_a_dataset(tmp_path, capsys):
    main_of("audit_a_dataset.py")()
    *_, shape, row = capsys.readouterr().out.splitlines()
    assert shape.startswith("movies, t2t: ")
    assert " -> " in row
    main_of("audit_a_dataset.py")(str(write_release(tmp_path, [instance(number) for number in range(12)])))
    assert "person, t2t: " in capsys.readouterr().out


def test_examples_stay_short():
    assert all(len(path.read_text().splitlines()) <= 80 for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("recipe", sorted((EXAMPLES / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_whole(recipe):
    arguments = RunArguments(**read_recipe(recipe))
    assert arguments.output_dir != RunArguments.defaults()["output_dir"]


def test_evaluate_your_own_system(store, capsys):
    main_of("evaluate_your_own_system.py")(str(store))
    *systems, difference = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in systems] == ["chance", "string match", "BM25", "rare words"]
    assert difference.startswith("rare words against BM25: ")
