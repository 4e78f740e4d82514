"""Publishes a folder as a Hub repository.

A push is one commit made with the client's `create_commit`. Its `upload_folder` would, where the Xet transfer is
installed, cut a large folder into several commits: until the last one, whoever loads the dataset reads new shards among
old ones, and a version tag could name a mixture. Nothing is lost by the one commit, for resuming does not rest on
commits: contents are kept by their hash once they have arrived, so that the next run sends only what is missing.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from m3el_hf import __version__
from m3el_hf.data.manifest import FILE_NAME, UNUSABLE_IMAGES
from m3el_hf.errors import M3ELError, one_line
from m3el_hf.sources import NAME_BASE, adapter_base, is_built, is_hub_id

Result = TypeVar("Result")
RepoType = Literal["model", "dataset", "space"]

logger = logging.getLogger(__name__)

WAITS = (1.0, 2.0, 4.0)
"""Seconds before each new attempt at a request that the client itself makes only once."""

DATASET_FOLDERS = ("data", "text", "mentions", "entities", "audit")
DATASET_FILES = ("README.md", FILE_NAME, UNUSABLE_IMAGES)
"""What a built dataset consists of: what of it stands on the Hub and no longer here is deleted there."""


@dataclass(frozen=True)
class Pushed:
    """What a push did; as text, a line to print.

    Attributes:
        url: The address of the commit that holds the folder.
        revision: The id of that commit.
        changed: Whether the commit is new; False if the repository held just this already.
        pull_request: The address of the pull request that was opened, or None.
        tag: The version that names the commit now, or None.
    """

    url: str
    revision: str
    changed: bool
    pull_request: str | None = None
    tag: str | None = None

    def __str__(self) -> str:
        if self.pull_request:
            return f"pull request: {self.pull_request}"
        done = f"{'pushed' if self.changed else 'nothing has changed'}: {self.url}"
        return f"{done}, tagged {self.tag}" if self.tag else done


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    repo_type: RepoType = "model",
    private: bool = False,
    create_pr: bool = False,
    tag: str | None = None,
) -> Pushed:
    """Makes a repository hold what a saved model, a built dataset or a metric consists of, card included.

    A folder that has not changed makes no commit. Shards that the repository has and the folder no longer has are
    deleted in the same commit, since they would be read too; other files that only the repository has stay. Hidden and
    unfinished files are never uploaded, and of a dataset only what a build or an audit wrote.

    The client tries a file's upload again by itself, with growing waits. This tries again what the client does not:
    creating the repository, the commit, the tag.

    Args:
        folder: What `save_pretrained` or `m3el-hf data build` wrote, or the folder of an `evaluate` module.
        repo_id: ``user/name``; created if it does not exist.
        repo_type: ``"model"``, ``"dataset"``, or ``"space"`` for an `evaluate` module.
        private: Whether a repository that is created is private. One that exists must be private already.
        create_pr: Whether to leave the main branch alone and open a pull request.
        tag: The version to name the commit, such as ``"v1.0"``; None names none.

    Raises:
        M3ELError: If the folder is not such a folder, the version exists, or the Hub cannot be reached or refuses.
    """
    check_push(folder, repo_id, repo_type, create_pr, tag)
    repository = _Repository(HfApi(library_name="m3el-hf", library_version=__version__), repo_id, repo_type)
    look = ""
    try:
        before = _persist(lambda: repository.open(private))
        if tag:
            _persist(lambda: repository.refuse_taken(tag))
        title = f"Upload {tag or f'the {repo_type}'} with m3el-hf {__version__}"
        waits: tuple[float, ...] = WAITS
        if create_pr:  # it is asked for once: had it been opened and the answer been lost, a second one would be opened
            waits, look = (), f"look whether {repository.page}/discussions has the pull request; if not, "
        commit = _persist(lambda: repository.commit(folder, title, create_pr), waits)
        if tag:
            _persist(lambda: repository.tag(tag, commit.oid))
    except M3ELError:
        raise
    except Exception as error:  # the client lets its HTTP library's own errors through
        raise M3ELError(f"{folder} could not be pushed to {repo_id}: {_explain(error, look)}") from error
    return Pushed(commit.commit_url, commit.oid, commit.oid != before, commit.pr_url, tag)


def check_push(
    folder: Path, repo_id: str, repo_type: RepoType, create_pr: bool = False, tag: str | None = None
) -> None:
    """Refuses what no request is needed to refuse; arguments as in `push_folder`.

    Raises:
        M3ELError: If the folder, the name or the tag cannot be pushed, or there is no token.
    """
    if not folder.is_dir():
        raise M3ELError(f"no such folder: {folder}")
    if repo_type == "dataset" and not is_built(folder):
        raise M3ELError(f"{folder} is no built dataset: build it first with m3el-hf data build")
    if repo_type == "model":
        _check_model(folder)
    if repo_type == "space":
        _check_module(folder, repo_id)
    if tag is not None and create_pr:
        raise M3ELError("a pull request cannot be a version: tag it once it is merged, or push without a pull request")
    if tag is not None and not re.fullmatch(r"\w+([.+-]\w+)*", tag, re.ASCII):
        raise M3ELError(f"{tag!r} cannot name a version: use letters, digits and points, such as v1.0")
    check_repository(repo_id)


def check_repository(repo_id: str) -> None:
    """Refuses a name that no repository can have, and a push that the client cannot make.

    Raises:
        M3ELError: If it is no such name, there is no token, or the Hub is not to be asked.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise M3ELError(f"{repo_id} is no name of a repository: {one_line(error)}") from error
    if "/" not in repo_id:
        raise M3ELError(f"{repo_id} does not say whose it is: pass user/{repo_id}")
    if get_token() is None:
        raise M3ELError("no token for the Hub: run `hf auth login`")
    if is_offline_mode():
        raise M3ELError(f"nothing can be pushed to {repo_id} while HF_HUB_OFFLINE is set: unset it")


def _check_model(folder: Path) -> None:
    base = adapter_base(str(folder))
    if base is None and not (folder / "config.json").is_file():
        raise M3ELError(f"{folder} has no config.json: pass the folder of a saved model")
    if base == "":
        raise M3ELError(f"{folder} holds adapters that name no base: {NAME_BASE}")
    if base is not None and (Path(base).is_dir() or not is_hub_id(base)):
        raise M3ELError(
            f"{folder} holds adapters of {base}, which nobody else has: push that too, and put its name on the Hub "
            "into adapter_config.json and README.md"
        )


def _check_module(folder: Path, repo_id: str) -> None:
    """Refuses a name under which `evaluate.load` would not find the module: its script is named as the repository."""
    name = repo_id.rpartition("/")[2]
    if not (folder / f"{name}.py").is_file():
        raise M3ELError(
            f"evaluate.load({repo_id!r}) would look for {name}.py, and {folder} has none: name the repository "
            f"user/{folder.name}"
        )


@dataclass(frozen=True)
class _Repository:
    """A repository on the Hub. Each method may be called again if it failed."""

    api: HfApi
    id: str
    type: RepoType

    @property
    def page(self) -> str:
        return f"{self.api.endpoint}/{'' if self.type == 'model' else f'{self.type}s/'}{self.id}"

    def open(self, private: bool) -> str:
        """Creates the repository if it does not exist, and returns the id of the main branch's commit."""
        sdk = "gradio" if self.type == "space" else None  # the card says so too, but a Space is created without it
        self.api.create_repo(self.id, repo_type=self.type, private=private, exist_ok=True, space_sdk=sdk)
        info = self.api.repo_info(self.id, repo_type=self.type)
        if private and not info.private:
            raise M3ELError(
                f"{self.id} exists and is public, and --private is for a repository that is created: make it private "
                f"at {self.page}/settings first, or push without --private"
            )
        return str(info.sha)

    def refuse_taken(self, tag: str) -> None:
        refs = self.api.list_repo_refs(self.id, repo_type=self.type)
        for ref in (*refs.tags, *refs.branches):
            if ref.name == tag:
                raise M3ELError(
                    f"{self.id} has {tag} already (commit {ref.target_commit[:8]}), and versions are not moved: "
                    "choose another tag"
                )

    def commit(self, folder: Path, title: str, create_pr: bool) -> CommitInfo:
        """Compares, uploads what is missing, and commits onto just what was compared with."""
        head = self.api.repo_info(self.id, repo_type=self.type).sha
        files = dict(_files(folder, self.type))
        remote = self.api.list_repo_files(self.id, repo_type=self.type, revision=head)
        gone = sorted(path for path in remote if path not in files and _is_replaced(path, self.type))
        if gone and self.type == "dataset" and FILE_NAME not in remote:
            raise M3ELError(
                f"{self.id} holds {gone[0]} and no {FILE_NAME}, so it was not built by m3el-hf and nothing of it is "
                f"deleted: push to another repository, or empty this one at {self.page}/tree/main first"
            )
        return self.api.create_commit(
            self.id,
            [*map(CommitOperationDelete, gone), *(CommitOperationAdd(path, file) for path, file in files.items())],
            commit_message=title,
            repo_type=self.type,
            parent_commit=head,
            create_pr=create_pr,
        )

    def tag(self, tag: str, revision: str) -> None:
        # A moment ago there was no such tag, so one that exists was made by a request whose answer got lost.
        self.api.create_tag(self.id, tag=tag, revision=revision, repo_type=self.type, exist_ok=True)


def _files(folder: Path, repo_type: RepoType) -> Iterator[tuple[str, Path]]:
    """Yields the files to upload, each with its path in the repository."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not _is_unfinished(name) and name != "__pycache__")
        if repo_type == "dataset" and Path(parent) == folder:
            folders[:] = [name for name in folders if name in DATASET_FOLDERS]
            names = [name for name in names if name in DATASET_FILES]
        for name in sorted(names):
            if not _is_unfinished(name):
                file = Path(parent, name)
                yield file.relative_to(folder).as_posix(), file


def _is_unfinished(name: str) -> bool:
    """Whether a name is that of something hidden, or still being written."""
    return name.startswith(".") or name.endswith((".partial", ".tmp"))


def _is_replaced(path: str, repo_type: RepoType) -> bool:
    """Whether a push decides if the repository has such a file: a dataset's parts, a model's weights and adapters.

    A Space keeps what it has, such as the template's files.
    """
    if repo_type == "space":
        return False
    if repo_type == "dataset":
        return path in DATASET_FILES or path.startswith(tuple(f"{name}/" for name in DATASET_FOLDERS))
    kinds = (".safetensors", ".safetensors.index.json")
    return path in ("config.json", "adapter_config.json") or ("/" not in path and path.endswith(kinds))


def _persist(attempt: Callable[[], Result], waits: tuple[float, ...] = WAITS) -> Result:
    """Calls ``attempt``, and again after each wait as long as a failure may pass."""
    for wait in waits:
        try:
            return attempt()
        except HTTPError as error:
            if not _may_pass(error):
                raise
            logger.warning("%s; trying again in %g s", one_line(error), wait)
            time.sleep(wait)
    return attempt()


def _may_pass(error: BaseException) -> bool:
    """Whether a request may succeed if it is made again: the connection failed, or the Hub is busy or has moved on."""
    if not isinstance(error, HfHubHTTPError):
        return isinstance(error, HTTPError)
    status: int = error.response.status_code
    return status in (408, 412, 429) or status >= 500


def _explain(error: Exception, look: str) -> str:
    """Says in one line why a push failed and what to do.

    Args:
        error: The client's error.
        look: What to look at before the push is tried again; may be empty.
    """
    # The client hides why a file could not be uploaded in the cause of a RuntimeError.
    failure = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    said = one_line(failure)
    again = f"{look}run the same command again: what has arrived is kept"
    if isinstance(failure, HfHubHTTPError):
        if failure.response.status_code == 401:
            return "the Hub does not know the token: run `hf auth login`"
        if failure.response.status_code == 403:
            reason = one_line(failure.server_message or said)
            return f"the token does not allow it ({reason}): use one that may write there"
        return f"{said}; {again}" if _may_pass(failure) else said
    # Xet, being no HTTP library, raises Python's own errors.
    if isinstance(failure, (HTTPError, RuntimeError, ConnectionError, TimeoutError)):
        return f"the connection to the Hub failed ({said}); {again}"
    return said
