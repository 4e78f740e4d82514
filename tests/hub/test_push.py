"""Pushes by the real client, in a process of its own, to a Hub in this one."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, Image, Value, load_dataset
from PIL import Image as Pictures

from m3el_hf import M3ELError
from m3el_hf.hub.push import Pushed, push_folder
from m3el_hf.metrics import LINKING_ACCURACY
from tests.conftest import tiny_model
from tests.hub_server import HANG_UP, LOSE_ANSWER, HubServer, hub_environment, run_python

FEATURES = Features({"id": Value("string"), "image": Image()})
CARD = """---
configs:
- config_name: all
  default: true
  data_files:
  - split: train
    path: data/*/train-*.parquet
- config_name: entities
  data_files:
  - split: train
    path: entities/train-*.parquet
---
# A set
"""
SET = "user/set"


class Client:
    """A process in which the client libraries know the Hub by `hub_environment`, and never wait."""

    def __init__(self, hub: HubServer, home: Path):
        self.hub = hub
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _never_wait)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        with patch.dict(os.environ, {**inherited, **hub_environment(hub.url, home)}, clear=True):
            self._pool.submit(os.getpid).result()  # starts the process

    def push(self, folder: Path, repo_id: str = SET, token: str = "hf_test", **options: Any) -> Pushed:
        options = {"repo_type": "dataset", **options}
        return self._pool.submit(_push, folder, repo_id, token, options).result()

    def load(self, *arguments: str, **options: Any) -> list[tuple[str, bytes]]:
        return self._pool.submit(_load, arguments, options).result()

    def close(self) -> None:
        self._pool.shutdown()


def _never_wait() -> None:
    time.sleep = lambda seconds: None


def _push(folder: Path, repo_id: str, token: str, options: dict[str, Any]) -> Pushed:
    with patch.dict(os.environ, {"HF_TOKEN": token}):
        return push_folder(folder, repo_id, **options)


def _load(arguments: tuple[str, ...], options: dict[str, Any]) -> list[tuple[str, bytes]]:
    return [(row["id"], row["image"].tobytes()) for row in load_dataset(*arguments, split="train", **options)]


@pytest.fixture(scope="module")
def real_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with HubServer() as hub:
        client = Client(hub, tmp_path_factory.mktemp("home"))
        yield client
        client.close()


@pytest.fixture
def client(real_client: Client) -> Client:
    real_client.hub.clear()
    return real_client


@pytest.fixture
def hub(client: Client) -> HubServer:
    return client.hub


def write_shards(folder: Path, *shards: str) -> None:
    """Replaces a folder's files: each shard is a string whose letters are its rows' ids."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    for number, ids in enumerate(shards):
        rows = []
        for one in ids:
            picture = io.BytesIO()
            Pictures.new("RGB", (5, 4), (ord(one), 7, 9)).save(picture, "PNG")
            rows.append({"id": one, "image": {"bytes": picture.getvalue(), "path": None}})
        table = pa.Table.from_pylist(rows, FEATURES.arrow_schema)
        pq.write_table(table, folder / f"train-{number:05}-of-{len(shards):05}.parquet")


def local_files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def requests(hub: HubServer, matching: str) -> list[str]:
    return [request for request in hub.requests if matching in request]


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A built dataset in two shards."""
    folder = tmp_path / "built"
    write_shards(folder / "data" / "person", "abc", "de")
    write_shards(folder / "entities", "xyz")
    (folder / "README.md").write_text(CARD)
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved model in two shards."""
    folder = tmp_path / "saved"
    folder.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (folder / name).write_text(f'{{"name": "{name}"}}')
    (folder / "model.safetensors.index.json").write_text("{}")
    return folder


def test_a_dataset_comes_back_equal(client, hub, built):
    pushed = client.push(built)
    head = hub.repository(SET, "dataset").resolve("main")
    assert pushed == Pushed(f"{hub.url}/datasets/{SET}/commit/{head.oid}", head.oid, changed=True)
    assert str(pushed) == f"pushed: {pushed.url}"
    assert {**local_files(built), ".gitattributes": head.files[".gitattributes"]} == head.files
    assert not hub.repository(SET, "dataset").private
    local = client.load(str(built))
    assert [one for one, _ in local] == list("abcde")
    assert client.load(SET) == client.load(SET, streaming=True) == local
    assert client.load(SET, "entities", streaming=True) == client.load(str(built), "entities")


def test_a_repository_that_was_not_built_here_loses_nothing(client, hub, built):
    hub.create(SET, "dataset").commit({"data/theirs.csv": b"a,b", "README.md": b"# Theirs"})
    with pytest.raises(M3ELError, match=r"holds data/theirs.csv and no manifest.json, .* nothing of it is deleted"):
        client.push(built)
    assert hub.files(SET, "dataset")["data/theirs.csv"] == b"a,b"


def test_only_what_belongs_to_a_dataset_is_uploaded(client, hub, built, tmp_path):
    belongs = local_files(built)
    (tmp_path / "elsewhere").mkdir()
    for name in (
        ".env",
        ".cache/huggingface/x",
        "runs/model.safetensors",
        "train.parquet.partial",
        "data/person/.train.parquet",
        "data/train.parquet.tmp",
        "data.partial/train.parquet",
        "notes.txt",
        "train.parquet",
    ):
        (built / name).parent.mkdir(parents=True, exist_ok=True)
        (built / name).write_bytes(b"secret")
    (built / "audit").mkdir()
    (built / "audit" / "audit.json").write_text("[]")
    (tmp_path / "elsewhere" / "train.parquet").write_bytes(b"text")
    (built / "text").symlink_to(tmp_path / "elsewhere")
    (built / "unusable_images.csv").write_text("file,reason\n")
    client.push(built)
    files = hub.files(SET, "dataset").keys() - {".gitattributes"}
    assert files == {*belongs, "audit/audit.json", "text/train.parquet", "unusable_images.csv"}
    (built / "unusable_images.csv").unlink()  # of the next build, nothing is unusable
    client.push(built)
    assert hub.files(SET, "dataset").keys() - {".gitattributes"} == files - {"unusable_images.csv"}


def test_a_folder_that_has_not_changed_makes_no_commit(client, hub, built):
    first = client.push(built)
    again = client.push(built)
    assert again == Pushed(first.url, first.revision, changed=False)
    assert str(again) == f"nothing has changed: {first.url}"
    assert len(requests(hub, "/commit/")) == 1
    assert client.push(built, tag="v1.0") == Pushed(first.url, first.revision, changed=False, tag="v1.0")
    assert client.push(built, create_pr=True).pull_request is None


def test_a_folder_that_has_changed_leaves_no_old_rows(client, hub, built):
    client.push(built, tag="v1.0")
    added = {"images/plot.png": b"by hand", "NOTES.md": b"by hand"}
    hub.repository(SET, "dataset").commit({**added, "audit/old.json": b"{}"})
    write_shards(built / "data" / "person", "fg")
    head = hub.repository(SET, "dataset").resolve("main")
    pushed = client.push(built, tag="v1.1")
    assert hub.repository(SET, "dataset").resolve("main").parent is head, "new shards come and old ones go at once"
    assert str(pushed) == f"pushed: {pushed.url}, tagged v1.1"
    assert hub.files(SET, "dataset") == {**local_files(built), **added, ".gitattributes": head.files[".gitattributes"]}
    for options in ({}, {"streaming": True}, {"revision": "v1.1"}):
        assert [one for one, _ in client.load(SET, **options)] == ["f", "g"]
    assert [one for one, _ in client.load(SET, revision="v1.0")] == list("abcde")


def test_a_model_leaves_no_old_weights(client, hub, saved):
    client.push(saved, "user/clipnd", repo_type="model")
    assert local_files(saved).items() <= hub.files("user/clipnd").items()
    added = {"onnx/model.safetensors": b"by hand", "tokenizer.json": b"{}"}
    hub.repository("user/clipnd").commit({**added, "adapter_config.json": b"{}"})
    for file in saved.glob("model*"):
        file.unlink()
    (saved / "model.safetensors").write_text("whole")
    client.push(saved, "user/clipnd", repo_type="model")
    files = hub.files("user/clipnd").keys() - {".gitattributes"}
    assert files == {"config.json", "model.safetensors", *added}


def test_adapters_leave_no_whole_model(client, hub, saved):
    client.push(saved, "user/clipnd", repo_type="model")
    for file in saved.iterdir():
        file.unlink()
    (saved / "adapter_config.json").write_text('{"base_model_name_or_path": "user/base"}')
    (saved / "adapter_model.safetensors").write_text("adapters")
    client.push(saved, "user/clipnd", repo_type="model")
    assert local_files(saved).keys() == hub.files("user/clipnd").keys() - {".gitattributes"}


@pytest.mark.parametrize(
    ("base", "says"),
    [
        (None, "holds adapters that name no base: save the model that they were added to"),
        ("{folder}", "holds adapters of {folder}, which nobody else has: push that too"),
        ("/gone/base", "holds adapters of /gone/base, which nobody else has"),
    ],
)
def test_adapters_whose_base_nobody_has_are_not_pushed(base, says, tmp_path):
    base = base and base.format(folder=tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(M3ELError, match=says.format(folder=tmp_path)):
        push_folder(tmp_path, "user/adapters")


def test_adapters_come_back_from_the_hub_with_their_base(client, hub, processor, tmp_path):
    tiny_model(processor, "matching").save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    client.push(tmp_path / "base", "user/base", repo_type="model")
    run_python(
        f"""
        import torch
        from transformers import AutoModel, AutoProcessor
        from m3el_hf import ClipNDModel, add_lora
        from m3el_hf.cli import main
        from m3el_hf.sources import load_model

        def scores(model, processor):
            side = processor.mentions(["Kansas", "Kansas"], ["a band", "a state"])
            with torch.no_grad():
                return model.score(model.encode_mentions(**side), model.encode_entities(**side)).total

        processor = AutoProcessor.from_pretrained("user/base")
        trained = add_lora(ClipNDModel.from_pretrained("user/base"))
        with torch.no_grad():
            for weight in trained.parameters():
                weight += weight.requires_grad * 0.1 * torch.randn_like(weight)
        trained.save_pretrained({str(tmp_path / "adapter")!r})
        processor.save_pretrained({str(tmp_path / "adapter")!r})
        torch.save(scores(trained, processor), {str(tmp_path / "scores.pt")!r})
        assert main(["push", {str(tmp_path / "adapter")!r}, "user/adapters"]) == 0
        model, processor = load_model("user/adapters")
        torch.testing.assert_close(scores(model.cpu(), processor), scores(trained, processor), rtol=1e-5, atol=1e-5)
        """,
        hub_environment(hub.url, tmp_path / "push"),
    )
    assert "model.safetensors" not in hub.files("user/adapters")
    run_python(
        f"""
        import sys
        sys.modules["m3el_hf"] = None  # whoever downloads needs no package
        import torch
        from transformers import AutoModel, AutoProcessor

        model = AutoModel.from_pretrained("user/adapters", trust_remote_code=True)
        processor = AutoProcessor.from_pretrained("user/adapters", trust_remote_code=True)
        side = processor.mentions(["Kansas", "Kansas"], ["a band", "a state"])
        with torch.no_grad():
            total = model.score(model.encode_mentions(**side), model.encode_entities(**side)).total
        torch.testing.assert_close(total, torch.load({str(tmp_path / "scores.pt")!r}), rtol=1e-5, atol=1e-5)
        """,
        hub_environment(hub.url, tmp_path / "load"),
    )


def test_the_metric_comes_back_from_the_hub(client, hub, tmp_path):
    run_python(
        """
        from m3el_hf.cli import main
        assert main(["push", "--metric", "user/linking_accuracy"]) == 0
        assert main(["push", "--metric", "user/linking_accuracy", "--private"]) == 2
        """,
        hub_environment(hub.url, tmp_path / "push"),
    )
    files = hub.files("user/linking_accuracy", "space")
    assert {"README.md", "app.py", "linking_accuracy.py", "requirements.txt"} <= files.keys()
    assert all(files[name] == (LINKING_ACCURACY / name).read_bytes() for name in files.keys() - {".gitattributes"})
    run_python(
        """
        import evaluate

        metric = evaluate.load("user/linking_accuracy")
        assert metric.compute(scores=[[0.9, 0.1], [0.5, 0.5]], references=[0, 1])["accuracy"] == 0.75
        ranked = evaluate.load("user/linking_accuracy", "ranked")
        assert ranked.compute(predictions=[["Q1", "Q2"]], references=["Q2"])["mrr"] == 0.5
        """,
        hub_environment(hub.url, tmp_path / "load") | {"HF_UPDATE_DOWNLOAD_COUNTS": "0"},
    )
    assert any("/spaces/user/linking_accuracy/resolve/main/linking_accuracy.py" in one for one in hub.requests)


def test_a_metric_keeps_what_its_space_has(client, hub):
    url = client.push(LINKING_ACCURACY, "user/linking_accuracy", repo_type="space").url
    assert url.startswith(f"{hub.url}/spaces/user/linking_accuracy/commit/")
    hub.repository("user/linking_accuracy", "space").commit({"config.json": b"{}", "app.py": b"by hand"})
    assert client.push(LINKING_ACCURACY, "user/linking_accuracy", repo_type="space").changed
    files = hub.files("user/linking_accuracy", "space")
    assert files["config.json"] == b"{}"
    assert files["app.py"] == (LINKING_ACCURACY / "app.py").read_bytes()


def test_a_metric_has_the_name_under_which_it_is_loaded():
    with pytest.raises(M3ELError, match="would look for other.py, .* name the repository user/linking_accuracy"):
        push_folder(LINKING_ACCURACY, "user/other", repo_type="space")


def test_what_has_arrived_is_not_sent_again(client, hub, built):
    client.push(built)
    (one,) = requests(hub, "PUT")[:1]
    hub.clear()
    hub.fail_next(6, one, HANG_UP)  # as often as the client tries
    with pytest.raises(
        M3ELError, match="not be pushed to user/set.*run the same command again: what has arrived is kept"
    ):
        client.push(built)
    assert hub.repository(SET, "dataset").resolve("main").parent is None, "there is no half of a dataset"
    assert len(set(requests(hub, "PUT"))) == 3
    hub.requests.clear()
    assert client.push(built).changed
    assert requests(hub, "PUT") == [one]
    assert local_files(built).items() <= hub.files(SET, "dataset").items()


@pytest.mark.parametrize("status", [HANG_UP, 500, 429])
def test_failures_that_pass_are_outlasted(client, hub, built, status):
    steps = ("/repos/create", "/refs", "/tree/", "/validate-yaml", "/preupload/", "/batch", "PUT", "/commit/", "/tag/")
    for step in steps:
        hub.fail_next(1, step, status)
    pushed = client.push(built, tag="v1.0")
    assert all(len(requests(hub, step)) > 1 for step in steps)
    assert pushed.changed
    assert hub.repository(SET, "dataset").refs["refs/tags/v1.0"].oid == pushed.revision
    assert local_files(built).items() <= hub.files(SET, "dataset").items()


@pytest.mark.parametrize("step", ["/repos/create", "/commit/", "/tag/"])
def test_an_answer_that_is_lost_does_nothing_twice(client, hub, built, step):
    client.push(built, tag="v1.0")
    write_shards(built / "data" / "person", "fg")
    hub.fail_next(1, step, LOSE_ANSWER)
    pushed = client.push(built, tag="v1.1")
    assert pushed.changed
    head = hub.repository(SET, "dataset").resolve("v1.1")
    assert (head.oid, head.parent) == (pushed.revision, hub.repository(SET, "dataset").resolve("v1.0"))


def test_a_commit_that_comes_between_is_counted_in(client, hub, built, monkeypatch):
    client.push(built)
    write_shards(built / "data" / "person", "fg")
    late = {"NOTES.md": b"by hand", "data/person/train-late.parquet": b"rows that the card's pattern would read"}
    take_failure = hub.take_failure

    def commit_in_between(request: str) -> int | None:
        if "/preupload/" in request and "NOTES.md" not in hub.files(SET, "dataset"):
            hub.repository(SET, "dataset").commit(late)
        return take_failure(request)

    monkeypatch.setattr(hub, "take_failure", commit_in_between)
    assert client.push(built).changed
    assert hub.files(SET, "dataset").keys() - {".gitattributes"} == local_files(built).keys() | {"NOTES.md"}


def test_a_pull_request_leaves_main_alone(client, hub, built):
    client.push(built)
    head = hub.repository(SET, "dataset").resolve("main")
    write_shards(built / "data" / "person", "fg")
    pushed = client.push(built, create_pr=True)
    assert pushed.pull_request == f"{hub.url}/datasets/{SET}/discussions/1"
    assert str(pushed) == f"pull request: {pushed.pull_request}"
    assert hub.repository(SET, "dataset").resolve("main") is head
    assert local_files(built).items() <= hub.files(SET, "dataset", "refs/pr/1").items()
    assert "data/person/train-00001-of-00002.parquet" not in hub.files(SET, "dataset", "refs/pr/1")


def test_a_pull_request_is_opened_once(client, hub, built):
    hub.fail_next(1, "/commit/", LOSE_ANSWER)
    with pytest.raises(M3ELError, match="look whether .*/datasets/user/set/discussions has the pull request; if not"):
        client.push(built, create_pr=True)
    assert hub.repository(SET, "dataset").refs.keys() == {"refs/heads/main", "refs/pr/1"}


def test_a_pull_request_to_a_repository_of_somebody_else(client, hub, built):
    hub.create("other/set", "dataset")
    with pytest.raises(M3ELError, match="the token does not allow it .*rights to write to other/set"):
        client.push(built, "other/set")
    assert client.push(built, "other/set", create_pr=True).pull_request


@pytest.mark.parametrize("tag", ["v1.0", "main"])
def test_a_version_is_not_moved(client, hub, built, tag):
    first = client.push(built, tag="v1.0")
    write_shards(built / "data" / "person", "fg")
    hub.requests.clear()
    with pytest.raises(M3ELError, match=f"has {tag} already .*{first.revision[:8]}.* choose another tag"):
        client.push(built, tag=tag)
    assert not requests(hub, "PUT") + requests(hub, "/commit/")


def test_private(client, hub, built):
    client.push(built, private=True)
    assert hub.repository(SET, "dataset").private
    client.push(built, private=True)
    hub.create("user/open", "dataset")
    hub.requests.clear()
    with pytest.raises(M3ELError, match=f"user/open exists and is public.*{hub.url}/datasets/user/open/settings"):
        client.push(built, "user/open", private=True)
    assert not requests(hub, "PUT") + requests(hub, "/commit/")


@pytest.mark.parametrize(
    ("token", "repo_id", "says"),
    [
        ("", SET, "no token for the Hub: run `hf auth login`"),
        ("hf_wrong", SET, "does not know the token: run `hf auth login`"),
        ("hf_test", "other/set", "the token does not allow it .*rights to write to other/set"),
    ],
)
def test_a_token_that_will_not_do(client, hub, built, token, repo_id, says):
    with pytest.raises(M3ELError, match=says) as caught:
        client.push(built, repo_id, token)
    assert "\n" not in str(caught.value)
    assert not hub.repositories


@pytest.mark.parametrize(
    ("folder", "repo_id", "options", "says"),
    [
        ("nothing", SET, {}, "no such folder"),
        ("raw", SET, {"repo_type": "dataset"}, "is no built dataset: build it first with m3el-hf data build"),
        ("saved", SET, {"repo_type": "dataset"}, "is no built dataset"),
        ("built", SET, {}, "has no config.json: pass the folder of a saved model"),
        ("saved", "set", {}, "pass user/set"),
        ("saved", "https://huggingface.co/user/set", {}, "is no name of a repository"),
        ("saved", "user/a--b", {}, "is no name of a repository"),
        ("saved", SET, {"tag": "version 1"}, "cannot name a version"),
        ("saved", SET, {"tag": "../main"}, "cannot name a version"),
        ("saved", SET, {"tag": ""}, "cannot name a version"),
        ("saved", SET, {"tag": "v1.0", "create_pr": True}, "tag it once it is merged"),
    ],
)
def test_a_mistake_is_told_without_the_hub(folder, repo_id, options, says, built, saved, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "README.md").write_text("# A release")
    with pytest.raises(M3ELError, match=says):
        push_folder(tmp_path / folder, repo_id, **options)


@pytest.mark.parametrize(
    ("offline", "waits", "says"),
    [
        ("0", [1, 2, 4], "{saved} could not be pushed to user/x: the connection to the Hub failed"),
        ("1", [], "nothing can be pushed to user/x while HF_HUB_OFFLINE is set: unset it"),
    ],
)
def test_a_hub_that_is_not_there_gets_one_line(offline, waits, says, saved, tmp_path):
    run_python(
        f"""
        import contextlib, io, time
        from m3el_hf.cli import main

        waits = []
        time.sleep = waits.append
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert main(["push", {str(saved)!r}, "user/x"]) == 2
        *retries, line = said.getvalue().strip().splitlines()
        assert {says.format(saved=saved)!r} in line, line
        assert waits == {waits}, waits
        assert len([one for one in retries if "trying again" in one]) == len(retries) == {len(waits)}, retries
        """,
        # Nothing listens at the discard port.
        hub_environment("http://127.0.0.1:9", tmp_path / "home") | {"HF_HUB_OFFLINE": offline},
    )


def test_a_real_model_and_a_real_dataset(client, hub, processor, store, tmp_path):
    model = tiny_model(processor, "matching")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    client.push(tmp_path / "model", "user/clipnd", repo_type="model")
    client.push(store, "user/m3el", private=True)
    assert {"model.safetensors", "tokenizer.json", "modeling_clipnd.py"} <= set(hub.files("user/clipnd"))
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
