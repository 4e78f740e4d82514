"""A Hugging Face Hub in this process: the part of its HTTP protocol that the client libraries use.

Repositories live in memory, anybody may read them, and one user's token may write to that user's own and open pull
requests on all. Not modelled: Xet storage, pagination, discussions (a pull request is its branch), search, and what the
Hub derives from a README.

    with HubServer() as hub:
        run_python("import huggingface_hub; huggingface_hub.create_repo('user/x')", hub_environment(hub.url, tmp_path))
        assert ".gitattributes" in hub.files("user/x")
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER = "user"
TOKEN = "hf_test"
HANG_UP = 0  # the "status" of a request that is cut short and gets no answer
LOSE_ANSWER = -1  # the "status" of a request that is carried out and gets no answer all the same
LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".bin")
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
LFS_SIZE = 1 << 20  # far below the real Hub's limit, so that a test can cross it


def hub_environment(url: str, home: Path | str) -> dict[str, str]:
    """The variables that point the client libraries at `url`, which they read when they are imported."""
    return {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "no_proxy": "127.0.0.1",
    }


def run_python(code: str, environment: Mapping[str, str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter, without the caller's own Hub settings; raise with its stderr if it fails."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise AssertionError(f"the script exited with {done.returncode}:\n{done.stderr}")
    return done


class HubError(Exception):
    """An unsuccessful answer; the client turns `code` into the class of its exception."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.body = {"error": message, **body}


@dataclass(frozen=True)
class Commit:
    """A snapshot of a repository's files, and where it came from."""

    files: Mapping[str, bytes]
    title: str
    message: str = ""
    parent: Commit | None = None
    # Random, since clients cache by it: a repository deleted and made again must not repeat an id.
    oid: str = field(default_factory=lambda: secrets.token_hex(20))
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))

    def history(self) -> Iterator[Commit]:
        commit: Commit | None = self
        while commit:
            yield commit
            commit = commit.parent


@dataclass
class Repository:
    """A model, dataset or space; `refs` has its branches, tags and pull requests by their full names."""

    id: str
    type: str
    private: bool
    refs: dict[str, Commit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.refs["refs/heads/main"] = Commit({".gitattributes": GIT_ATTRIBUTES}, "initial commit")

    def resolve(self, revision: str) -> Commit:
        """The commit named by a branch, a tag, a full reference name or its own id."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.refs[ref]
        for commit in (commit for head in self.refs.values() for commit in head.history()):
            if commit.oid == revision:
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add_ref(self, ref: str, target: Commit) -> None:
        if ref in self.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        self.refs[ref] = target

    def commit(self, files: Mapping[str, bytes], title: str = "commit") -> Commit:
        """Add files to the main branch without a client, for a test that only reads."""
        parent = self.refs["refs/heads/main"]
        self.refs["refs/heads/main"] = commit = Commit({**parent.files, **files}, title, parent=parent)
        return commit


class HubServer:
    """The server: a context manager that listens on a free port, in a thread.

    Attributes:
        repositories: by (id, type), where the type is "model", "dataset" or "space".
        lfs: the contents of large files by their SHA-256.
        requests: "METHOD /path" of everything asked so far.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self._failures: list[tuple[str, int]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def clear(self) -> None:
        """Forget all that happened, for the next test."""
        for kept in (self.repositories, self.lfs, self.requests, self._failures):
            kept.clear()

    def create(self, repo_id: str, repo_type: str = "model", private: bool = False) -> Repository:
        self.repositories[repo_id, repo_type] = repository = Repository(repo_id, repo_type, private)
        return repository

    def repository(self, repo_id: str, repo_type: str = "model") -> Repository:
        if (repo_id, repo_type) not in self.repositories:
            raise HubError(404, f"Repository not found: {repo_id}", "RepoNotFound")
        return self.repositories[repo_id, repo_type]

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> Mapping[str, bytes]:
        return self.repository(repo_id, repo_type).resolve(revision).files

    def page(self, repository: Repository) -> str:
        """The address of a repository, from which the client reads its type and id."""
        prefix = "" if repository.type == "model" else f"{repository.type}s/"
        return f"{self.url}/{prefix}{repository.id}"

    def fail_next(self, times: int = 1, matching: str = "", status: int = 503) -> None:
        """Answer the next requests whose "METHOD /path" contains `matching` with an error.

        With the status `HANG_UP` the connection is closed instead, after half of the request's body, and with
        `LOSE_ANSWER` when all has been done that was asked for.
        """
        self._failures += [(matching, status)] * times

    def take_failure(self, request: str) -> int | None:
        """Note a request, and tell how it shall fail if it shall."""
        with self.lock:
            self.requests.append(request)
            for failure in self._failures:
                matching, status = failure
                if matching in request:
                    self._failures.remove(failure)
                    return status
        return None


def is_lfs(path: str, size: int) -> bool:
    """Whether a file goes to large file storage; an empty one does not, for the client would not upload it."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE)


def blob_id(content: bytes) -> str:
    """Git's name for a content."""
    return sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


def content_id(path: str, content: bytes) -> str:
    """What the client knows a file by, to cache it or to see that it has not changed."""
    return sha256(content).hexdigest() if is_lfs(path, len(content)) else blob_id(content)


def tree_entries(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Every folder and file, as the Hub lists them."""
    folders = {str(folder) for path in files for folder in PurePosixPath(path).parents} - {"."}
    entries: list[dict[str, Any]] = [
        {"type": "directory", "path": folder, "oid": blob_id(folder.encode()), "size": 0} for folder in sorted(folders)
    ]
    for path, content in sorted(files.items()):
        entry = {"type": "file", "path": path, "oid": blob_id(content), "size": len(content)}
        if is_lfs(path, len(content)):
            entry["lfs"] = {"oid": content_id(path, content), "size": len(content), "pointerSize": 134}
        entries.append(entry)
    return entries


def apply_operations(
    files: Mapping[str, bytes], operations: Iterable[dict[str, Any]], lfs: Mapping[str, bytes]
) -> dict[str, bytes]:
    """The files after a commit's operations."""
    result = dict(files)
    for operation in operations:
        value = operation["value"]
        path = value["path"].rstrip("/")
        match operation["key"]:
            case "file":
                result[path] = base64.b64decode(value["content"])
            case "lfsFile":
                if value["oid"] not in lfs:
                    raise HubError(400, f"Large file was never uploaded: {path}")
                result[path] = lfs[value["oid"]]
            case "deletedFile" | "deletedFolder":
                gone = [name for name in result if name == path or name.startswith(f"{path}/")]
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for name in gone:
                    del result[name]
            case key:
                raise HubError(400, f"Unknown operation: {key}")
    return result


Endpoint = Callable[["Handler"], Any]
ROUTES: list[tuple[str, re.Pattern[str], Endpoint, bool]] = []
PARTS = {"kind": "models|datasets|spaces", "repo": "[^/]+/[^/]+", "path": ".+", "ref": "branch|tag"}


def route(method: str, path: str, needs_token: bool = False) -> Callable[[Endpoint], Endpoint]:
    """Enter an endpoint in the routing table."""
    pattern = re.compile(re.sub(r"\{(\w+)\}", lambda part: f"(?P<{part[1]}>{PARTS.get(part[1], '[^/]+')})", path))

    def register(endpoint: Endpoint) -> Endpoint:
        ROUTES.append((method, pattern, endpoint, needs_token))
        return endpoint

    return register


class Handler(BaseHTTPRequestHandler):
    """Serves the requests of one connection: an endpoint returns bytes, or an object to send as JSON.

    Attributes:
        args: the parts of the path that the route names; with `query` and `body`, what an endpoint is given.
        status: with `reply_headers`, what an endpoint may change about its answer.
    """

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave in one packet, as two would wait for each other's acknowledgement

    def __init__(self, hub: HubServer, *args: Any):
        self.hub = hub
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:
        """Leave a test's output alone."""

    def serve(self) -> None:
        url = urlsplit(self.path)
        size = int(self.headers.get("Content-Length", 0))
        failure = self.hub.take_failure(f"{self.command} {url.path}")
        if failure == HANG_UP:
            self.rfile.read(size // 2)
            self.close_connection = True
            return
        self.body = self.rfile.read(size)
        self.query = parse_qs(url.query)
        self.status = 200
        self.reply_headers: dict[str, str] = {}
        try:
            if failure not in (None, LOSE_ANSWER):
                raise HubError(failure, "A failure that the test asked for")
            answer = self.dispatch(url.path)
        except HubError as error:
            answer, self.status = error.body, error.status
            self.reply_headers |= error.headers
        if failure == LOSE_ANSWER:
            self.close_connection = True
            return
        self.send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve  # noqa: N815

    def dispatch(self, path: str) -> Any:
        for method, pattern, endpoint, needs_token in ROUTES:
            match = pattern.fullmatch(path)
            if match and method == self.command.replace("HEAD", "GET"):
                self.args = {name: unquote(part) for name, part in match.groupdict().items() if part is not None}
                self.authorise(needs_token)
                with self.hub.lock:
                    return endpoint(self)
        raise HubError(404, f"No such endpoint: {self.command} {path}")

    def authorise(self, needs_token: bool) -> None:
        """Refuse a wrong token even where none is needed, as the real Hub does."""
        token = self.headers.get("Authorization")
        if token != f"Bearer {TOKEN}" and (needs_token or token is not None):
            raise HubError(401, "Invalid credentials in Authorization header")
        # Contents are taken from anybody, for a pull request may come to hold them.
        proposes = "create_pr" in self.query or self.path.endswith("/objects/batch")
        if needs_token and "repo" in self.args and not proposes:
            self.refuse_strangers(self.args["repo"])

    def refuse_strangers(self, repo_id: str) -> None:
        if not repo_id.startswith(f"{USER}/"):
            raise HubError(403, f"You don't have the rights to write to {repo_id}")

    def send(self, answer: Any) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(self.status)
        for name, value in {**self.reply_headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def repository(self) -> Repository:
        return self.hub.repository(self.args["repo"], self.args.get("kind", "models").removesuffix("s"))

    @property
    def commit(self) -> Commit:
        return self.repository.resolve(self.args.get("revision", "main"))

    @route("GET", "/api/whoami-v2", needs_token=True)
    def whoami(self) -> Any:
        token = {"displayName": "test", "role": "write"}
        return {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token", "accessToken": token}}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Any:
        return {"errors": [], "warnings": []}

    @route("POST", "/api/repos/create", needs_token=True)
    def create_repo(self) -> Any:
        key = self.named_repository()
        if key in self.hub.repositories:
            # The client's `exist_ok` reads the address out of this error.
            raise HubError(409, "You already created this repo", url=self.hub.page(self.hub.repositories[key]))
        if key[1] == "space" and not json.loads(self.body).get("sdk"):
            raise HubError(400, "A Space needs an sdk: one of gradio, docker or static")
        private = json.loads(self.body).get("visibility") == "private"
        return {"name": key[0], "url": self.hub.page(self.hub.create(*key, private))}

    @route("DELETE", "/api/repos/delete", needs_token=True)
    def delete_repo(self) -> Any:
        repository = self.hub.repository(*self.named_repository())
        del self.hub.repositories[repository.id, repository.type]
        return {}

    def named_repository(self) -> tuple[str, str]:
        body = json.loads(self.body)
        repo_id = f"{body.get('organization') or USER}/{body['name']}"
        self.refuse_strangers(repo_id)
        return repo_id, body.get("type") or "model"

    @route("GET", "/api/{kind}/{repo}(?:/revision/{revision})?")
    def repo_info(self) -> Any:
        repository, commit = self.repository, self.commit
        return {
            "id": repository.id,
            "author": repository.id.split("/")[0],
            "private": repository.private,
            "sha": commit.oid,
            "lastModified": commit.date,
            "tags": [],
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }

    @route("GET", "/api/{kind}/{repo}/tree/{revision}(?:/{path})?")
    def tree(self) -> Any:
        prefix = f"{self.args['path'].strip('/')}/" if "path" in self.args else ""
        entries = [entry for entry in tree_entries(self.commit.files) if entry["path"].startswith(prefix)]
        if prefix and not entries:
            raise HubError(404, f"No such folder: {prefix}", "EntryNotFound")
        recursive = self.query.get("recursive") == ["true"]
        return [entry for entry in entries if recursive or "/" not in entry["path"].removeprefix(prefix)]

    @route("POST", "/api/{kind}/{repo}/paths-info/{revision}")
    def paths_info(self) -> Any:
        paths = parse_qs(self.body.decode())["paths"]
        return [entry for entry in tree_entries(self.commit.files) if entry["path"] in paths]

    @route("GET", "/api/{kind}/{repo}/commits/{revision}")
    def list_commits(self) -> Any:
        shared = {"authors": [{"user": USER}]}
        return [
            {"id": commit.oid, "title": commit.title, "message": commit.message, "date": commit.date, **shared}
            for commit in self.commit.history()
        ]

    @route("GET", "/(?:{kind}/)?{repo}/resolve/{revision}/{path}")
    def resolve(self) -> bytes:
        path, commit = self.args["path"], self.commit
        # Sent with a missing file too, so that the client can remember in which commit it is missing.
        self.reply_headers["X-Repo-Commit"] = commit.oid
        if path not in commit.files:
            raise HubError(404, f"No such file: {path}", "EntryNotFound")
        content = commit.files[path]
        self.reply_headers["ETag"] = f'"{content_id(path, content)}"'
        if is_lfs(path, len(content)):
            self.reply_headers |= {"X-Linked-Etag": self.reply_headers["ETag"], "X-Linked-Size": str(len(content))}
        return self.wanted_range(content)

    def wanted_range(self, content: bytes) -> bytes:
        """The part that a Range header asks for, in the one form that the clients send."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not match:
            return content
        start, stop = int(match[1]), min(int(match[2] or len(content)) + 1, len(content))
        if start >= stop:
            raise HubError(416, "Range not satisfiable")
        self.status = 206
        self.reply_headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return content[start:stop]

    @route("POST", "/api/{kind}/{repo}/preupload/{revision}", needs_token=True)
    def preupload(self) -> Any:
        present, answers = self.commit.files, []
        for path, size in ((file["path"], file["size"]) for file in json.loads(self.body)["files"]):
            mode = "lfs" if is_lfs(path, size) else "regular"
            oid = content_id(path, present[path]) if path in present else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    @route("POST", r"/(?:{kind}/)?{repo}\.git/info/lfs/objects/batch", needs_token=True)
    def lfs_batch(self) -> Any:
        objects = [{"oid": file["oid"], "size": file["size"]} for file in json.loads(self.body)["objects"]]
        for file in objects:
            if file["oid"] not in self.hub.lfs:
                file["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{file['oid']}"}}
        return {"objects": objects}

    @route("PUT", "/lfs/{oid}")  # no token: the client takes the address for a signed one
    def lfs_upload(self) -> Any:
        if sha256(self.body).hexdigest() != self.args["oid"]:
            raise HubError(400, "Not the content that was announced")
        self.hub.lfs[self.args["oid"]] = self.body
        return {}

    @route("POST", "/api/{kind}/{repo}/commit/{revision}", needs_token=True)
    def create_commit(self) -> Any:
        repository, revision = self.repository, self.args["revision"]
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        parent = repository.resolve(ref)
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        message = header["value"]
        if message.get("parentCommit", parent.oid) != parent.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = apply_operations(parent.files, operations, self.hub.lfs)
        commit = Commit(files, message["summary"], message.get("description", ""), parent)
        page = self.hub.page(repository)
        answer = {"commitOid": commit.oid, "commitUrl": f"{page}/commit/{commit.oid}"}
        if "create_pr" in self.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
            ref = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{page}/discussions/{number}"
        repository.refs[ref] = commit
        return answer

    @route("GET", "/api/{kind}/{repo}/refs")
    def list_refs(self) -> Any:
        folders = {"branches": "heads", "tags": "tags", "pullRequests": "pr", "converts": "convert"}
        answer: dict[str, list[dict[str, str]]] = {group: [] for group in folders}
        for group, folder in folders.items():
            for ref, commit in self.repository.refs.items():
                if ref.startswith(f"refs/{folder}/"):
                    name = ref.removeprefix(f"refs/{folder}/")
                    answer[group].append({"name": name, "ref": ref, "targetCommit": commit.oid})
        return answer

    @route("POST", "/api/{kind}/{repo}/branch/{name}", needs_token=True)
    def create_branch(self) -> Any:
        start = self.repository.resolve(json.loads(self.body).get("startingPoint", "main"))
        self.repository.add_ref(f"refs/heads/{self.args['name']}", start)
        return {}

    @route("POST", "/api/{kind}/{repo}/tag/{revision}", needs_token=True)
    def create_tag(self) -> Any:
        self.repository.add_ref(f"refs/tags/{json.loads(self.body)['tag']}", self.commit)
        return {}

    @route("DELETE", "/api/{kind}/{repo}/{ref}/{name}", needs_token=True)
    def delete_ref(self) -> Any:
        folder = {"branch": "heads", "tag": "tags"}[self.args["ref"]]
        if not self.repository.refs.pop(f"refs/{folder}/{self.args['name']}", None):
            raise HubError(404, f"No such reference: {self.args['name']}", "RevisionNotFound")
        return {}
