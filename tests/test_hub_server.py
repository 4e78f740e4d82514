"""The Hub of the tests, asked directly and by the real client libraries, each in one process of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from http.client import HTTPConnection, HTTPResponse, RemoteDisconnected
from pathlib import Path

import pytest

from tests.hub_server import HANG_UP, LOSE_ANSWER, TOKEN, HubError, HubServer, hub_environment, run_python


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.create("user/x").commit({"a.txt": b"0123456789", "sub/b.bin": b"weights"})
        yield server


def ask(
    hub: HubServer, request: str, body: str | bytes = b"", token: str | None = TOKEN, wanted: str | None = None
) -> tuple[HTTPResponse, bytes]:
    """Send "METHOD /path" and return the response with its body."""
    headers = {"Authorization": f"Bearer {token}" if token else None, "Range": wanted}
    connection = HTTPConnection(hub.url.removeprefix("http://"), timeout=10)
    method, path = request.split()
    connection.request(method, path, body, {name: value for name, value in headers.items() if value})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def ndjson(*items: tuple[str, dict[str, str]]) -> str:
    return "\n".join(json.dumps({"key": key, "value": value}) for key, value in items)


@pytest.mark.parametrize(
    ("wanted", "status", "content"),
    [(None, 200, b"0123456789"), ("bytes=2-4", 206, b"234"), ("bytes=7-", 206, b"789"), ("bytes=8-99", 206, b"89")],
)
def test_a_part_of_a_file(hub: HubServer, wanted: str | None, status: int, content: bytes) -> None:
    response, body = ask(hub, "GET /user/x/resolve/main/a.txt", wanted=wanted)
    assert (response.status, body) == (status, content)


def test_a_part_beyond_the_end(hub: HubServer) -> None:
    response, _ = ask(hub, "GET /user/x/resolve/main/a.txt", wanted="bytes=10-")
    assert response.status == 416


def test_a_space_needs_an_sdk(hub: HubServer) -> None:
    space = {"name": "page", "type": "space"}
    response, _ = ask(hub, "POST /api/repos/create", json.dumps(space))
    assert response.status == 400
    response, body = ask(hub, "POST /api/repos/create", json.dumps({**space, "sdk": "gradio"}))
    assert json.loads(body)["url"] == f"{hub.url}/spaces/user/page"


def test_head_describes_a_large_file(hub: HubServer) -> None:
    response, body = ask(hub, "HEAD /user/x/resolve/main/sub/b.bin")
    assert body == b""
    assert response.headers["Content-Length"] == response.headers["X-Linked-Size"] == "7"
    assert response.headers["X-Linked-Etag"] == f'"{sha256(b"weights").hexdigest()}"'
    assert response.headers["X-Repo-Commit"] == hub.repository("user/x").resolve("main").oid


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/api/models/user/none", "RepoNotFound"),
        ("/api/datasets/user/x", "RepoNotFound"),
        ("/user/x/resolve/none/a.txt", "RevisionNotFound"),
        ("/user/x/resolve/main/none", "EntryNotFound"),
        ("/api/models/user/x/tree/main/none", "EntryNotFound"),
        ("/api/nothing", None),
    ],
)
def test_what_is_missing(hub: HubServer, path: str, code: str | None) -> None:
    response, _ = ask(hub, f"GET {path}")
    assert (response.status, response.headers["X-Error-Code"]) == (404, code)


@pytest.mark.parametrize(
    ("request_line", "token", "status"),
    [
        ("GET /api/models/user/x", None, 200),
        ("GET /api/models/user/x", "wrong", 401),
        ("GET /api/whoami-v2", None, 401),
        ("POST /api/models/user/x/branch/dev", None, 401),
        ("POST /api/models/user/x/branch/dev", "wrong", 401),
        ("DELETE /api/repos/delete", None, 401),
    ],
)
def test_the_token(hub: HubServer, request_line: str, token: str | None, status: int) -> None:
    response, _ = ask(hub, request_line, b"{}", token)
    assert response.status == status


def test_who_does_not_own_a_repository_may_only_propose(hub: HubServer) -> None:
    theirs = hub.create("other/y", "dataset")
    body = ndjson(("header", {"summary": "change"}), ("file", {"path": "a.txt", "content": ""}))
    commit = "POST /api/datasets/other/y/commit/main"
    for request in (commit, "POST /api/datasets/other/y/tag/main", "POST /api/datasets/other/y/preupload/main"):
        assert ask(hub, request, body)[0].status == 403
    assert ask(hub, "POST /api/repos/create", json.dumps({"organization": "other", "name": "z"}))[0].status == 403
    assert ask(hub, f"{commit}?create_pr=1", body)[0].status == 200
    assert theirs.refs.keys() == {"refs/heads/main", "refs/pr/1"}


def test_a_commit_on_a_stale_parent_is_refused(hub: HubServer) -> None:
    before = hub.repository("user/x").resolve("main")
    body = ndjson(("header", {"summary": "late", "parentCommit": before.oid}), ("deletedFile", {"path": "a.txt"}))
    hub.repository("user/x").commit({"c.txt": b"c"})
    response, _ = ask(hub, "POST /api/models/user/x/commit/main", body)
    assert response.status == 412
    assert "a.txt" in hub.files("user/x")


def test_a_large_file_must_be_uploaded_before_its_commit(hub: HubServer) -> None:
    oid = sha256(b"large").hexdigest()
    body = ndjson(("header", {"summary": "large"}), ("lfsFile", {"path": "c.bin", "oid": oid}))
    assert ask(hub, "POST /api/models/user/x/commit/main", body)[0].status == 400
    assert ask(hub, f"PUT /lfs/{oid}", b"something else")[0].status == 400
    assert ask(hub, f"PUT /lfs/{oid}", b"large")[0].status == 200
    assert ask(hub, "POST /api/models/user/x/commit/main", body)[0].status == 200
    assert hub.files("user/x")["c.bin"] == b"large"


def test_failures_asked_for(hub: HubServer) -> None:
    hub.fail_next(2, "/resolve/", 500)
    hub.fail_next(1, "HEAD /", HANG_UP)
    statuses = [ask(hub, f"GET {path}")[0].status for path in ["/user/x/resolve/main/a.txt", "/api/models/user/x"] * 3]
    assert statuses == [500, 200, 500, 200, 200, 200]
    with pytest.raises(RemoteDisconnected):
        ask(hub, "HEAD /user/x/resolve/main/a.txt")
    assert ask(hub, "HEAD /user/x/resolve/main/a.txt")[0].status == 200


def test_an_answer_that_is_lost_is_no_request_that_failed(hub: HubServer) -> None:
    for status, made in ((HANG_UP, False), (LOSE_ANSWER, True)):
        hub.fail_next(1, "/branch/", status)
        with pytest.raises(RemoteDisconnected):
            ask(hub, "POST /api/models/user/x/branch/dev", b"{}")
        assert ("refs/heads/dev" in hub.repository("user/x").refs) == made


def test_a_script_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ValueError: because"):
        run_python("raise ValueError('because')", hub_environment("http://127.0.0.1:1", tmp_path))


def test_huggingface_hub(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # a caller's own setting, which must not reach the script
    hub.fail_next(1, "PUT /lfs/", HANG_UP)
    run_python(
        """
        from pathlib import Path

        import pytest
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, HfFileSystem, snapshot_download
        from huggingface_hub.errors import (
            EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError,
        )

        api = HfApi()
        data = dict(repo_id="user/data", repo_type="dataset")
        assert api.whoami()["name"] == "user"
        assert api.create_repo(**data).repo_id == api.create_repo(**data, exist_ok=True).repo_id == "user/data"
        with pytest.raises(HfHubHTTPError, match="409"):
            api.create_repo(**data)

        folder = Path("{folder}")
        (folder / "sub").mkdir(parents=True)
        (folder / "README.md").write_text("# Data")
        (folder / "empty.bin").write_bytes(b"")
        (folder / "sub/large.bin").write_bytes(bytes(range(256)) * 40_000)
        first = api.upload_folder(folder_path=folder, **data).oid
        assert api.upload_folder(folder_path=folder, **data).oid == first, "nothing has changed"
        snapshot = Path(snapshot_download(**data))
        for path in ("README.md", "empty.bin", "sub/large.bin"):
            assert (snapshot / path).read_bytes() == (folder / path).read_bytes()

        (folder / "README.md").write_text("# More data")
        (folder / "empty.bin").unlink()
        second = api.upload_folder(folder_path=folder, delete_patterns="empty.bin", **data).oid
        assert [commit.commit_id for commit in api.list_repo_commits(**data)][:2] == [second, first]
        assert api.dataset_info("user/data").sha == second != api.dataset_info("user/data", revision=first).sha
        assert (Path(snapshot_download(**data)) / "README.md").read_text() == "# More data"
        assert (Path(snapshot_download(revision=first, **data)) / "README.md").read_text() == "# Data"
        assert (folder / "sub/large.bin").read_bytes() == HfFileSystem().read_bytes("datasets/user/data/sub/large.bin")

        adds = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("sub/")]
        request = api.create_commit(operations=adds, commit_message="Propose", create_pr=True, **data)
        assert request.pr_revision == "refs/pr/1"
        api.upload_file(path_or_fileobj=b"newer", path_in_repo="new.txt", revision="refs/pr/1", **data)
        assert sorted(api.list_repo_files(revision="refs/pr/1", **data)) == [".gitattributes", "README.md", "new.txt"]

        api.create_tag(tag="v1", revision=first, **data)
        api.create_branch(branch="a/b", **data)
        with pytest.raises(HfHubHTTPError, match="409"):
            api.create_tag(tag="v1", **data)
        refs = api.list_repo_refs(include_pull_requests=True, **data)
        assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", first)]
        assert [ref.name for ref in refs.branches] == ["main", "a/b"]
        assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1"]
        assert api.dataset_info("user/data", revision="v1").sha == first
        assert {entry.path for entry in api.list_repo_tree(**data)} == {".gitattributes", "README.md", "sub"}
        assert [entry.path for entry in api.get_paths_info(paths=["sub", "none"], **data)] == ["sub"]
        api.delete_tag(tag="v1", **data)
        api.delete_branch(branch="a/b", **data)

        with pytest.raises(EntryNotFoundError):
            api.hf_hub_download(filename="none", **data)
        with pytest.raises(RevisionNotFoundError):
            api.hf_hub_download(filename="README.md", revision="v1", **data)
        with pytest.raises(RepositoryNotFoundError):
            snapshot_download("user/none")
        with pytest.raises(HfHubHTTPError, match="401"):
            api.create_repo("user/other", token=False)

        api.create_repo("user/space", repo_type="space", space_sdk="gradio", private=True)
        api.upload_file(path_or_fileobj=b"app", path_in_repo="app.py", repo_id="user/space", repo_type="space")
        api.delete_repo("user/x")
        """.replace("{folder}", str(tmp_path / "folder")),
        hub_environment(hub.url, tmp_path / "home"),
    )
    assert set(hub.files("user/data", "dataset")) == {".gitattributes", "README.md", "sub/large.bin"}
    assert hub.files("user/data", "dataset", "refs/pr/1")["new.txt"] == b"newer"
    assert hub.files("user/space", "space")["app.py"] == b"app"
    assert hub.repository("user/space", "space").private
    with pytest.raises(HubError):
        hub.repository("user/x")
    uploads = [request for request in hub.requests if request.startswith("PUT /lfs/")]
    assert len(uploads) == 2, "the upload that was cut short is repeated, and the content is never sent again"
    assert not any("xet" in request for request in hub.requests)


def test_datasets(hub: HubServer, tmp_path: Path) -> None:
    run_python(
        """
        from datasets import Dataset, load_dataset
        from PIL import Image

        images = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in range(5)]
        rows = Dataset.from_dict({"name": list("abcde"), "image": images})
        rows.push_to_hub("user/rows", "person", split="train")
        rows.select([0]).push_to_hub("user/rows", "person", split="test")
        loaded = load_dataset("user/rows", "person")
        assert {split: len(part) for split, part in loaded.items()} == {"train": 5, "test": 1}
        streamed = list(load_dataset("user/rows", "person", split="train", streaming=True))
        for part in (list(loaded["train"]), streamed):
            assert [row["name"] for row in part] == list("abcde")
            assert [row["image"].getpixel((0, 0))[0] for row in part] == list(range(5))
        """,
        hub_environment(hub.url, tmp_path),
    )
    shards = {path for path in hub.files("user/rows", "dataset") if path.endswith(".parquet")}
    assert shards == {"person/train-00000-of-00001.parquet", "person/test-00000-of-00001.parquet"}


def test_transformers(hub: HubServer, tmp_path: Path) -> None:
    run_python(
        """
        import torch
        from transformers import CLIPConfig, CLIPModel

        tower = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        text = dict(tower, vocab_size=16, max_position_embeddings=8, bos_token_id=1, eos_token_id=2)
        vision = dict(tower, image_size=8, patch_size=4)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4))
        model.push_to_hub("user/clip")
        loaded = CLIPModel.from_pretrained("user/clip").state_dict()
        assert loaded.keys() == model.state_dict().keys()
        assert all(torch.equal(weight, loaded[name]) for name, weight in model.state_dict().items())
        """,
        hub_environment(hub.url, tmp_path),
    )
    assert {"config.json", "model.safetensors"} <= set(hub.files("user/clip"))
