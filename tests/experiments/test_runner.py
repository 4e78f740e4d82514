from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from m3el_hf import M3ELError
from m3el_hf.experiments import runner as runner_module
from m3el_hf.experiments.findings.common import topics_of
from m3el_hf.experiments.runner import PLAIN, ExperimentOptions, Look, Runner, sizes, split_by_row
from m3el_hf.sources import load_built
from tests.experiments.conftest import ARMS


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of the models that are trained while a test runs."""
    folders: list[Path] = []
    train = runner_module.train

    def counted(model, collator, rows, validation, arguments, **more):
        folders.append(arguments.output_dir)
        return train(model, collator, rows, validation, arguments, **more)

    monkeypatch.setattr(runner_module, "train", counted)
    return folders


def looks(one: Runner) -> list:
    return [(arm, PLAIN) for arm in one.experiment.arms]


def test_models_are_trained_once_and_shared_by_experiments(runner, trained, tmp_path):
    first = runner(ARMS, tmp_path)
    first.do(looks(first))
    assert len(trained) == len(set(trained)) == 4
    first.do(looks(first))
    again = runner(ARMS, tmp_path)
    again.do(looks(again))
    other = runner(ARMS.replace("whole", "all of it").replace("names: {template: N}", "D: {template: D}"), tmp_path)
    other.do(looks(other))  # the first arm has another name, and is the same model
    assert len(trained) == len(set(trained)) == 6
    for arm in first.experiment.arms:
        evaluations = first.evaluations(arm)
        assert [len(one) for one in evaluations] == [len(first.source.rows)] * 2
        assert evaluations[0].systems == ["model", "mention-blind control"]
    assert first.baselines().systems == ["chance", "string match", "character match", "BM25", "image hash"]


def test_a_run_that_broke_off_goes_on(runner, trained, monkeypatch, tmp_path):
    one = runner(ARMS, tmp_path, seeds=(0,))
    evaluate = runner_module.evaluate
    monkeypatch.setattr(runner_module, "evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        one.do(looks(one))
    assert len(trained) == 2
    monkeypatch.setattr(runner_module, "evaluate", evaluate)
    one.do(looks(one))
    assert len(trained) == 2
    assert len(one.evaluations(one.experiment.arm("names"))) == 1


def test_what_decides_a_model_decides_its_folder(runner, recipe, tmp_path):
    one = runner(ARMS, tmp_path)
    whole, names = one.experiment.arms
    folders = {one._training(arm, seed).folder for arm in (whole, names) for seed in (0, 1)}
    faster = tmp_path / "faster.yaml"
    faster.write_text(recipe.read_text().replace("1e-3", "1e-2"))
    folders.add(runner(ARMS, tmp_path, recipe=faster)._training(whole, 0).folder)
    folders.add(runner(f"{ARMS}split_by_row: true\n", tmp_path)._training(whole, 0).folder)
    assert len(folders) == 6
    saving = tmp_path / "saving.yaml"
    saving.write_text(recipe.read_text() + "save_steps: 1\nlogging_steps: 1\n")  # which change no weight
    assert runner(ARMS, tmp_path, recipe=saving)._training(whole, 0).folder in folders
    looked = {
        one._of_model(whole, 0, look).folder for look in (PLAIN, Look("mention-without-name"), Look(in_base=True))
    }
    assert len(looked) == 3


def test_an_arm_may_see_a_part_of_the_rows(runner, tmp_path):
    text = ARMS.replace("names: {template: N}", "few: {fraction: 0.1}\n  person: {topics: [person]}")
    one = runner(text, tmp_path, seeds=(0,))
    one.do([])
    rows = {arm.name: one._training(arm, 0).result()["rows"] for arm in one.experiment.arms}
    every = one.source.data["train"]
    assert rows == {"whole": len(every), "few": round(0.1 * len(every)), "person": every["topic"].count("person")}
    about = json.loads((one._training(one.experiment.arm("person"), 0).folder / "done.json").read_text())["about"]
    assert (about["topics"], about["settings"]["max_steps"]) == (["person"], 2)


def test_rows_split_anew_are_all_there_once_and_stay_where_they_are(store):
    data = load_built(store)
    first, again = split_by_row(data), split_by_row(data)
    ids = [one for split in first.values() for one in split["id"]]
    assert sorted(ids) == sorted(one for split in data.values() for one in split["id"])
    assert {name: rows["id"] for name, rows in first.items()} == {name: rows["id"] for name, rows in again.items()}
    fewer = split_by_row(load_built(store).filter(lambda number: number % 2 == 0, input_columns="answer"))
    assert set(fewer["train"]["id"]) <= set(first["train"]["id"])
    assert 0.7 < len(first["train"]) / len(ids) < 0.9


def test_mistakes_answer_before_anything_is_trained(runner, store, recipe, tmp_path):
    with pytest.raises(M3ELError, match="seeds are 1, 1: give at least one, and each once"):
        runner(ARMS, tmp_path, seeds=(1, 1))
    with pytest.raises(M3ELError, match="has no dev split"):
        runner(ARMS, tmp_path, split="dev")
    with pytest.raises(M3ELError, match="no such folder"):
        runner(ARMS, tmp_path, data=f"{tmp_path}/nothing")
    with pytest.raises(M3ELError, match="tasks_per_mention is 12"):
        runner(ARMS.replace("template: N", "tasks_per_mention: 12"), tmp_path)
    with pytest.raises(M3ELError, match="no rows of the topics cooking: the data has books, common"):
        runner(ARMS.replace("template: N", "topics: [cooking]"), tmp_path)


def test_data_without_topics_has_none_to_train_on(runner, monkeypatch, tmp_path):
    def without_topics(source):
        data = load_built(source)
        return data.map(lambda row: {"topic": None}, features=data["train"].features)

    monkeypatch.setattr(runner_module, "load_built", without_topics)
    with pytest.raises(M3ELError, match="no rows of the topics books: the data has none"):
        runner(ARMS.replace("template: N", "topics: [books]"), tmp_path)
    assert topics_of(runner(ARMS, tmp_path)) == []


def test_sizes_grow_by_about_three():
    assert sizes(10_000) == [3, 10, 30, 100, 300, 1000, 3000, 10_000]
    assert sizes(68) == [3, 10, 30, 68]
    assert sizes(3) == [3]
    assert np.all(np.diff(sizes(123_456)) > 0)


def test_without_data_some_are_generated(recipe, read, monkeypatch, tmp_path):
    monkeypatch.setattr(runner_module, "MINI_INSTANCES", 60)
    one = Runner(read(ARMS), ExperimentOptions(recipe=recipe, output=tmp_path))
    assert one.source.name == "mini" and sum(map(len, one.source.data.values())) == 60
    assert one.provenance["data"].startswith("mini, revision ")
