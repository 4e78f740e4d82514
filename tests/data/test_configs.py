from __future__ import annotations

import pytest
from datasets import load_dataset

from m3el_hf.data.configs import configs, select
from m3el_hf.data.schema import ENTITY_FEATURES, MENTION_FEATURES, ROW_FEATURES
from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TASKS, TOPICS

CONFIGS = configs(TOPICS, knowledge_base=False)


def test_there_is_a_config_for_all_each_topic_each_task_and_the_entities():
    assert list(CONFIGS) == ["all", *TOPICS, *TASKS, "entities"]
    assert all(select(name) == config for name, config in CONFIGS.items())


def test_a_topic_shows_every_column_of_its_rows():
    for name in ("all", *TOPICS):
        config = select(name)
        assert config.topic == (None if name == "all" else name)
        assert config.features == ROW_FEATURES
        assert config.folder == "data"


@pytest.mark.parametrize("name", TASKS)
def test_a_task_shows_its_columns_of_all_topics(name):
    config = select(name)
    assert config.topic is None
    assert config.columns == TASKS[name].columns
    assert dict(config.features) == {column: ROW_FEATURES[column] for column in TASKS[name].columns}
    assert list(config.features) == [column for column in ROW_FEATURES if column in TASKS[name].columns]


def test_only_the_task_without_pictures_reads_the_files_without_pictures():
    assert [config.name for config in CONFIGS.values() if config.folder == "text"] == ["t2t"]


def test_entities_have_their_own_columns():
    assert select("entities").features == ENTITY_FEATURES
    assert select("entities").folder == "entities"


def test_a_source_with_a_knowledge_base_has_mentions_and_entities():
    found = configs(["mentions"], knowledge_base=True)
    assert list(found) == ["mentions", "entities"]
    assert [config.default for config in found.values()] == [True, False]
    assert found["mentions"].features == MENTION_FEATURES
    assert not any(name.startswith("candidate") or name == "answer" for name in MENTION_FEATURES)


@pytest.mark.parametrize("name", TASKS)
def test_no_value_that_a_task_shows_names_the_gold(name, store):
    """Not even the id, which every task shows."""
    golds = {row["id"]: row["answer_qid"] for row in load_dataset(str(store), split="train")}
    for row in load_dataset(str(store), name, split="train").with_format("arrow")[:].to_pylist():
        assert golds[row["id"]] not in str(row)


def test_a_topic_and_a_task_are_both_kept():
    view = select("books", "t2t")
    assert (view.folder, view.topic, view.columns) == ("text", "books", TASKS["t2t"].columns)
    assert view.data_files({"books": {"train": 3, "test": 0}}) == {"train": "text/books/train-*.parquet"}
    assert select("all", "i2i").data_files({"books": {"train": 3}, "movies": {"test": 1}}) == {
        "train": "data/*/train-*.parquet",
        "test": "data/*/test-*.parquet",
    }


@pytest.mark.parametrize(("name", "knowledge_base"), [("t2t", False), ("entities", False), ("mentions", True)])
def test_a_task_goes_with_a_topic_only(name, knowledge_base):
    with pytest.raises(M3ELError, match=f"^a task goes with 'all' or a topic, not with '{name}'$"):
        select(name, "i2i", knowledge_base=knowledge_base)


@pytest.mark.parametrize("name", ["music", "", "ALL", "t2", "mentions"])
def test_an_unknown_config_is_named_beside_the_known(name):
    with pytest.raises(M3ELError) as caught:
        select(name)
    assert str(caught.value) == f"unknown config {name!r}: choose one of {', '.join(CONFIGS)}"


def test_any_word_may_be_a_topic_while_the_topics_are_unknown():
    view = select("politics", "i2i", topics=None)
    assert (view.topic, view.columns) == ("politics", TASKS["i2i"].columns)
    assert select("t2t", topics=None) == CONFIGS["t2t"]
    assert select("all", topics=None) == CONFIGS["all"]


@pytest.mark.parametrize("name", ["", "default", "mentions", "a/b"])
def test_no_topic_has_a_reserved_name_or_none(name):
    with pytest.raises(M3ELError, match=f"^unknown config '{name}': choose one of all, t2t, .*, entities$"):
        select(name, topics=None)


@pytest.mark.parametrize("topics", [None, TOPICS, ["mentions"]])
def test_a_knowledge_base_has_no_topics(topics):
    for name in ("all", "person", "politics", "t2t"):
        with pytest.raises(M3ELError, match=f"^unknown config '{name}': choose one of mentions, entities$"):
            select(name, topics=topics, knowledge_base=True)
