from __future__ import annotations

import pytest

from m3el_hf import M3ELError
from m3el_hf.sources import check_source, is_built, load_built, load_model
from tests.conftest import tiny_model


def test_a_folder_and_a_hub_id_are_sources(tmp_path):
    assert check_source(tmp_path) == str(tmp_path)
    assert check_source("user/m3el") == "user/m3el"


@pytest.mark.parametrize("name", ["m3el", "runs/mine/model", "./user/m3el", "/nowhere", "user/", "", "user/m3el@main"])
def test_what_is_neither_is_never_looked_up(name):
    with pytest.raises(M3ELError, match="pass a folder, or a Hub id"):
        check_source(name)


def test_a_release_with_a_readme_is_not_built(store, tmp_path):
    (tmp_path / "README.md").write_text("# M3EL, as released")
    assert is_built(store)
    assert not is_built(tmp_path)
    assert not is_built(tmp_path / "nowhere")


def test_a_built_dataset_has_its_splits_and_configs(store):
    assert set(load_built(store)) == {"train", "validation", "test"}
    assert set(load_built(store, "entities")) == {"train"}


def test_what_was_not_built_is_named(store, tmp_path):
    with pytest.raises(M3ELError, match=f"{tmp_path} is no dataset that m3el-hf data build wrote"):
        load_built(tmp_path)
    with pytest.raises(M3ELError, match="no-such-config"):
        load_built(store, "no-such-config")


def test_a_saved_model_comes_with_its_processor(processor, tmp_path):
    saved = tiny_model(processor)
    saved.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, loaded = load_model(tmp_path)
    assert all(weight.equal(model.state_dict()[name].cpu()) for name, weight in saved.state_dict().items())
    assert loaded.tokenizer("a band").input_ids == processor.tokenizer("a band").input_ids


def test_what_is_no_model_is_named(store):
    with pytest.raises(M3ELError, match=f"{store} is no saved model: [^\n]+$"):
        load_model(store)
