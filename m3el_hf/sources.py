"""Where a saved model or a built dataset comes from: a folder here, or a repository on the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3el_hf import __version__
from m3el_hf.data.manifest import FILE_NAME, Manifest
from m3el_hf.errors import M3ELError, one_line

if TYPE_CHECKING:
    from m3el_hf.modeling.modeling_clipnd import ClipNDModel
    from m3el_hf.modeling.processing_clipnd import ClipNDProcessor


def check_source(name: str | Path, revision: str | None = None) -> str:
    """Returns ``name`` if it is a folder or looks like a Hub id, ``user/name``.

    Without this a mistyped folder is looked up on the Hub, or, worse, found in a cache under the same name.

    Args:
        name: What is to be loaded.
        revision: A tag, branch or commit; None for whatever is there.

    Raises:
        M3ELError: If it is neither, or a revision is asked of a folder.
    """
    is_folder = name != "" and Path(name).is_dir()
    if not is_folder and not is_hub_id(str(name)):
        raise M3ELError(f"no such folder: {name}; pass a folder, or a Hub id such as user/name")
    if is_folder and revision is not None:
        raise M3ELError(f"{name} is a folder, and only a repository on the Hub has revisions: leave {revision!r} out")
    return str(name)


def is_hub_id(name: str) -> bool:
    """Whether ``name`` looks like ``user/name``."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def public_name(source: str | Path) -> str:
    """What a source is called where others read it: a Hub id, or a folder's own name without where it lies."""
    return Path(source).resolve().name if Path(source).is_dir() else str(source)


def check_split(split: str, splits: Iterable[str], source: str, streaming: bool) -> list[str]:
    """Returns the splits of a source of which ``split`` shows rows: of ``"train[:10]+test"``, train and test.

    Raises:
        M3ELError: If there is no such split, or a part of one is to be streamed.
    """
    if not isinstance(split, str):
        raise M3ELError(f"split is {split!r}: pass one, such as 'train' or 'train[:10]', or None for all")
    names = [part.partition("[")[0] for part in split.split("+")]
    for name in names:
        if name not in splits:
            raise M3ELError(f"no split {name!r} in {source}: it has {', '.join(splits)}")
    if streaming and split not in splits:
        raise M3ELError(f"{split!r} cannot be streamed: ask for one split, and take or skip rows of it")
    return names


def is_built(folder: Path) -> bool:
    """Whether ``folder`` is one that `m3el-hf data build` wrote; a raw release may have a README too."""
    return (folder / "README.md").is_file() and (folder / FILE_NAME).is_file()


def fingerprint(folder: Path | None, *settings: object) -> str:
    """Changes with the files of a raw release, with this package's version, and with any setting.

    The texts count by their bytes. Of pictures, which are many, size and time are enough.

    Args:
        folder: The release; None for generated data.
        *settings: What else decides the result.
    """
    digest = hashlib.sha256(repr((__version__, settings)).encode())
    for path, state in _files(folder) if folder is not None else ():
        digest.update(repr((os.path.relpath(path, folder), state.st_size, state.st_mtime_ns)).encode())
        if path.endswith(".json") and os.path.dirname(path) == str(folder) and os.path.isfile(path):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yields whatever stands in a folder, in a fixed order, without following links."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(parent, name)
            yield path, os.lstat(path)


def explain_hub_error(error: BaseException) -> str:
    """Says in one line why something could not be had from the Hub.

    Args:
        error: What `huggingface_hub`, `datasets` or `transformers` raised; the reason may stand in its causes.
    """
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GatedRepoError):
            return "its owner grants access: ask for it on the repository's page, and run `hf auth login`"
        if isinstance(cause, RepositoryNotFoundError):
            return "no such repository on the Hub, or no access to it: check the name, or run `hf auth login`"
        if isinstance(cause, RevisionNotFoundError):
            return "the repository has no such revision"
        unreachable = isinstance(cause, HTTPError) and not isinstance(cause, HfHubHTTPError)
        if unreachable or isinstance(cause, (ConnectionError, LocalEntryNotFoundError)):
            why = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the Hub cannot be reached"
            return f"{why}, and not all of it is in the cache"
        cause = cause.__cause__
    return one_line(error)


def fetch_built(source: str | Path, *patterns: str, revision: str | None = None) -> Path:
    """Returns the folder of a built dataset; of a Hub repository, the one that holds what was downloaded of it.

    Args:
        source: A folder that `m3el-hf data build` wrote, or a Hub id.
        *patterns: The files of a Hub repository to download beside its manifest.
        revision: A tag, branch or commit of a Hub repository; None for its main branch.

    Raises:
        M3ELError: If it cannot be had, or is no built dataset.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    folder = Path(check_source(source, revision))
    if not folder.is_dir():
        wanted = [FILE_NAME, *patterns]
        try:
            folder = Path(snapshot_download(str(source), repo_type="dataset", revision=revision, allow_patterns=wanted))
        except (OSError, ValueError, HTTPError) as error:  # the client lets its HTTP library's own errors through
            raise M3ELError(f"{source} cannot be fetched: {explain_hub_error(error)}") from error
    if not (folder / FILE_NAME).is_file():
        raise M3ELError(f"{source} is no dataset that m3el-hf data build wrote: it has no {FILE_NAME}")
    return folder


def load_built(
    source: str | Path,
    config: str = "all",
    *,
    task: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
    **settings: str | int | None,
) -> Any:
    """Loads any topic and task of a built dataset; plain `load_dataset` knows only one or the other.

    Args:
        source: A folder that `m3el-hf data build` wrote, or a Hub id.
        config: One of its configs.
        task: One of the nine tasks, to see a topic as that task does.
        split: One split, or a part of it such as ``"train[:10]"``; None for all of them. Of a Hub repository, only its
            files are downloaded.
        revision: A tag, branch or commit of a Hub repository; None for its main branch.
        streaming: Whether to read rows as they are asked for, rather than all at once.
        cache_dir: Where `datasets` keeps what it made; None for its default.
        **settings: Its ``reader``, ``seed`` or ``protocol``, where it has to be that; None for whatever it is.

    Returns:
        One `Dataset`, or a `DatasetDict` if ``split`` is None; their iterable kin if streaming.

    Raises:
        M3ELError: If it cannot be loaded, has no such config or split, or was built with other settings.
    """
    from datasets import load_dataset
    from huggingface_hub.errors import HTTPError

    from m3el_hf.data.configs import select

    folder = fetch_built(source, revision=revision)
    if not Path(source).is_dir():
        revision = folder.name  # the commit: the rows must be of the manifest's, whatever is pushed meanwhile
    manifest = Manifest.load(folder)
    for name, value in settings.items():
        built = getattr(manifest, name)
        if value not in (None, built):
            raise M3ELError(
                f"{source} was built with {name} {built}: leave {name} out, or build it again with --{name} {value}"
            )
    view = select(config, task, manifest.rows, manifest.kind == "knowledge_base")
    files = view.data_files(manifest.rows)
    if split is not None:
        files = {name: files[name] for name in check_split(split, files, str(source), streaming)}
    path = str(source) if streaming else str(fetch_built(source, *files.values(), revision=revision))
    columns = None if view.columns is None else list(view.columns)
    try:
        return load_dataset(
            path,
            data_files=files,
            columns=columns,
            split=split,
            revision=revision,
            streaming=streaming,
            cache_dir=cache_dir,
        )
    except (OSError, ValueError, HTTPError) as error:
        raise M3ELError(f"{source} cannot be loaded: {explain_hub_error(error)}") from error


NAME_BASE = (
    "save the model that they were added to, and put its folder or Hub id as base_model_name_or_path into "
    "adapter_config.json"
)
"""What to do about adapters whose base nobody finds."""


def adapter_base(source: str) -> str | None:
    """Returns the folder or Hub id of the model that saved adapters belong to, "" if they name none.

    None where ``source`` holds no adapters, or a whole model beside them.

    Args:
        source: A folder or a Hub id.
    """
    from transformers.utils import find_adapter_config_file

    file = find_adapter_config_file(source)
    if file is None or (Path(source) / "config.json").is_file():
        return None
    return json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"] or ""


def load_model(source: str | Path) -> tuple[ClipNDModel, ClipNDProcessor]:
    """Loads a saved model, onto the accelerator where there is one, and its processor.

    Args:
        source: A folder or a Hub id of a saved `ClipNDModel`, of adapters (`m3el_hf.add_lora`) with the processor
            beside them, or of a plain CLIP, which then links as it is (zero-shot) by the head ``clip``.

    Raises:
        M3ELError: If it cannot be loaded.
    """
    from transformers import PretrainedConfig

    from m3el_hf.modeling.modeling_clipnd import ClipNDModel
    from m3el_hf.modeling.processing_clipnd import ClipNDProcessor

    name = check_source(source)
    try:
        if adapter_base(name) == "":
            raise M3ELError(f"{source} holds adapters that name no base: {NAME_BASE}")
        is_clip = PretrainedConfig.get_config_dict(name)[0].get("model_type") == "clip"
        model = ClipNDModel.from_clip(name) if is_clip else ClipNDModel.from_pretrained(name)
        processor = ClipNDProcessor.from_pretrained(name)
    except M3ELError:
        raise
    except (OSError, ValueError) as error:
        raise M3ELError(f"{source} cannot be loaded as a model: {explain_hub_error(error)}") from error
    return model.to(default_device()), processor


def model_revision(source: str) -> str:
    """Returns what changes with a model's files: of a folder a digest of them, of a Hub repository the commit.

    Raises:
        M3ELError: If it is neither.
    """
    from transformers import PretrainedConfig

    folder = Path(check_source(source))
    if not folder.is_dir():
        try:
            return str(PretrainedConfig.get_config_dict(source)[0].get("_commit_hash"))
        except (OSError, ValueError) as error:
            raise M3ELError(f"{source} cannot be had: {explain_hub_error(error)}") from error
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin", ".txt")):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def default_device() -> Any:
    """The torch.device of the accelerator where there is one, else the CPU; accelerate is not set up by asking."""
    import torch

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
