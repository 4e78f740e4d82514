from __future__ import annotations

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from m3el_hf import M3ELError
from m3el_hf.sources import check_source, explain_hub_error, fetch_built, is_built, load_built, load_model
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
    with pytest.raises(M3ELError, match=f"^{tmp_path} is no dataset that m3el-hf data build wrote: it has no manifest"):
        load_built(tmp_path)
    with pytest.raises(M3ELError, match="^unknown config 'no-such-config': choose one of all, movies"):
        load_built(store, "no-such-config")


def test_a_built_dataset_whose_files_are_gone_is_named(store, tmp_path):
    (tmp_path / "manifest.json").write_bytes((store / "manifest.json").read_bytes())
    with pytest.raises(M3ELError, match=f"^{tmp_path} cannot be loaded: [^\n]+$"):
        load_built(tmp_path)


def test_a_folder_that_is_fetched_is_that_folder(store):
    assert fetch_built(store, "text/**") == store
    with pytest.raises(M3ELError, match="is a folder, and only a repository on the Hub has revisions"):
        fetch_built(store, revision="main")


def raised(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def refused(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    return kind("no\nway", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "offline", "says"),
    [
        (refused(RepositoryNotFoundError), False, "no such repository on the Hub, or no access to it"),
        (refused(GatedRepoError), False, "its owner grants access"),
        (raised(OSError("not a valid model"), refused(RepositoryNotFoundError)), False, "no such repository"),
        (refused(RevisionNotFoundError), False, "the repository has no such revision"),
        (
            raised(OSError("a b"), LocalEntryNotFoundError("c")),
            False,
            "the Hub cannot be reached, and not all of it is",
        ),
        (raised(OSError("a b"), LocalEntryNotFoundError("c")), True, "HF_HUB_OFFLINE is set, and not all of it is"),
        (ConnectionError("a"), True, "HF_HUB_OFFLINE is set"),
        (HTTPError("a"), False, "the Hub cannot be reached"),
        (refused(HfHubHTTPError), False, "no way"),
        (OSError("no file\n x"), True, "no file x"),
    ],
)
def test_a_failure_of_the_hub_is_explained(error, offline, says, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    assert explain_hub_error(error).startswith(says)


def test_a_saved_model_comes_with_its_processor(processor, tmp_path):
    saved = tiny_model(processor)
    saved.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, loaded = load_model(tmp_path)
    assert all(weight.equal(model.state_dict()[name].cpu()) for name, weight in saved.state_dict().items())
    assert loaded.tokenizer("a band").input_ids == processor.tokenizer("a band").input_ids


def test_what_is_no_model_is_named(store):
    with pytest.raises(M3ELError, match=f"{store} cannot be loaded as a model: [^\n]+$"):
        load_model(store)
