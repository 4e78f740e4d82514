"""Where a saved model or a built dataset comes from: a folder here, or a repository on the Hub."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from m3el_hf import __version__
from m3el_hf.errors import M3ELError

if TYPE_CHECKING:
    from datasets import DatasetDict

    from m3el_hf.modeling.modeling_clipnd import ClipNDModel
    from m3el_hf.modeling.processing_clipnd import ClipNDProcessor


def check_source(name: str | Path) -> str:
    """Returns ``name`` if it is a folder or looks like a Hub id, ``user/name``.

    Without this a mistyped folder is looked up on the Hub, or, worse, found in a cache under the same name.

    Raises:
        M3ELError: If it is neither.
    """
    is_folder = name != "" and Path(name).is_dir()
    if not is_folder and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        raise M3ELError(f"no such folder: {name}; pass a folder, or a Hub id such as user/name")
    return str(name)


def is_built(folder: Path) -> bool:
    """Whether ``folder`` is one that `m3el-hf data build` wrote; a raw release may have a README too."""
    return (folder / "README.md").is_file() and (folder / "manifest.json").is_file()


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


def load_built(source: str | Path, config: str = "all") -> DatasetDict:
    """Loads a built dataset, all splits.

    Args:
        source: A folder that `m3el-hf data build` wrote, or a Hub id.
        config: One of its configs.

    Raises:
        M3ELError: If it cannot be loaded.
    """
    from datasets import load_dataset

    try:
        return load_dataset(check_source(source), config)
    except M3ELError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise M3ELError(f"{source} is no dataset that m3el-hf data build wrote: {reason}") from error


def load_model(source: str | Path) -> tuple[ClipNDModel, ClipNDProcessor]:
    """Loads a saved model, onto the accelerator where there is one, and its processor.

    Args:
        source: A folder or a Hub id of a saved `ClipNDModel`.

    Raises:
        M3ELError: If it cannot be loaded.
    """
    from accelerate import Accelerator

    from m3el_hf.modeling.modeling_clipnd import ClipNDModel
    from m3el_hf.modeling.processing_clipnd import ClipNDProcessor

    name = check_source(source)
    try:
        model, processor = ClipNDModel.from_pretrained(name), ClipNDProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise M3ELError(f"{source} is no saved model: {' '.join(str(error).split())}") from error
    return model.to(Accelerator().device), processor
