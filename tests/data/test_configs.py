from __future__ import annotations

import pytest

from m3el_hf.data.configs import CONFIGS, get_config
from m3el_hf.data.schema import ENTITY_FEATURES, ROW_FEATURES
from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TASKS, TOPICS


def test_there_is_a_config_for_all_each_topic_each_task_and_the_entities():
    assert list(CONFIGS) == ["all", *TOPICS, *TASKS, "entities"]
    assert all(get_config(name).name == name for name in CONFIGS)


def test_a_topic_shows_every_column_of_its_rows():
    for name in ("all", *TOPICS):
        config = get_config(name)
        assert config.topic == (None if name == "all" else name)
        assert config.features == ROW_FEATURES
        assert config.folder == "data"


@pytest.mark.parametrize("name", TASKS)
def test_a_task_shows_its_columns_of_all_topics(name):
    config = get_config(name)
    assert config.topic is None
    assert config.columns == TASKS[name].columns
    assert dict(config.features) == {column: ROW_FEATURES[column] for column in TASKS[name].columns}


def test_only_the_task_without_pictures_reads_the_files_without_pictures():
    assert [config.name for config in CONFIGS.values() if config.folder == "text"] == ["t2t"]


def test_entities_have_their_own_columns():
    assert get_config("entities").features == ENTITY_FEATURES
    assert get_config("entities").folder == "entities"


@pytest.mark.parametrize("name", ["music", "", "ALL", "t2"])
def test_an_unknown_config_is_named_beside_the_known(name):
    with pytest.raises(M3ELError) as caught:
        get_config(name)
    assert str(caught.value) == f"unknown config {name!r}: choose one of {', '.join(CONFIGS)}"
