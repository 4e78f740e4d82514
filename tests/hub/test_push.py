from __future__ import annotations

import pytest

from m3el_hf import M3ELError
from m3el_hf.hub.push import push_folder
from tests.conftest import tiny_model
from tests.hub_server import HubServer, hub_environment, run_python


def test_a_model_and_a_dataset_are_pushed_and_loaded_back(hub: HubServer, processor, store, tmp_path):
    model = tiny_model(processor, "matching")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlibrary_name: transformers\n---\n# a card\n")
    run_python(
        f"""
        from pathlib import Path
        from m3el_hf import ClipNDModel
        from m3el_hf.hub.push import push_folder

        push_folder(Path({str(tmp_path / "model")!r}), "user/clipnd")
        push_folder(Path({str(store)!r}), "user/m3el", repo_type="dataset", private=True)
        ClipNDModel.from_pretrained({str(tmp_path / "model")!r}).push_to_hub("user/by-method")
        """,
        hub_environment(hub.url, tmp_path / "push"),
    )
    assert {"README.md", "model.safetensors", "tokenizer.json", "modeling_clipnd.py"} <= set(hub.files("user/clipnd"))
    assert {"model.safetensors", "modeling_clipnd.py"} <= set(hub.files("user/by-method"))
    run_python(
        f"""
        import sys
        sys.modules["m3el_hf"] = None  # whoever downloads needs no package
        import torch
        from datasets import load_dataset
        from transformers import AutoModel, AutoProcessor

        def scores(source):
            model = AutoModel.from_pretrained(source, trust_remote_code=True)
            processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
            side = processor.mentions(["Kansas", "Kansas"], ["a band", "a state"])
            with torch.no_grad():
                return model.score(model.encode_mentions(**side), model.encode_entities(**side)).total

        torch.testing.assert_close(scores("user/clipnd"), scores({str(tmp_path / "model")!r}))
        local = load_dataset({str(store)!r}, "person", split="train")
        remote = load_dataset("user/m3el", "person", split="train")
        assert remote.num_rows and remote["id"] == local["id"]
        assert remote[0]["mention_image"].tobytes() == local[0]["mention_image"].tobytes()
        streamed = next(iter(load_dataset("user/m3el", "t2i", split="train", streaming=True)))
        assert set(streamed) == {{"id", "topic", "mention", "context", "candidate_images", "answer"}}
        """,
        hub_environment(hub.url, tmp_path / "load"),
    )


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_folder_of_something_else_is_refused(kind, tmp_path):
    with pytest.raises(M3ELError, match=f"saved {kind}"):
        push_folder(tmp_path, "user/x", repo_type=kind)


def test_a_hub_that_is_not_there_gets_one_line(processor, tmp_path):
    tiny_model(processor).save_pretrained(tmp_path / "model")
    run_python(
        f"""
        import contextlib, io
        from m3el_hf.cli import main

        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert main(["push", {str(tmp_path / "model")!r}, "user/x"]) == 2
        (line,) = said.getvalue().strip().splitlines()
        assert "could not be pushed to user/x" in line, line
        """,
        hub_environment("http://127.0.0.1:9", tmp_path / "home"),  # nothing listens at the discard port
    )
