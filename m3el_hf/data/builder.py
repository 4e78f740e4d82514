"""The `datasets` builder that reads raw releases. The published folder needs none of this: it is plain Parquet."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from m3el_hf import __version__
from m3el_hf.data.configs import CONFIGS, DEFAULT_CONFIG, ENTITIES_CONFIG, get_config
from m3el_hf.data.rows import Collection, collect
from m3el_hf.data.schema import SPLITS
from m3el_hf.errors import M3ELError
from m3el_hf.sources import is_built


@dataclass
class M3ELConfig(datasets.BuilderConfig):
    """A config of the builder.

    Attributes:
        reader: The raw format, a name of `m3el_hf.data.readers.READERS`.
        seed: Seeds the splits (where the release has none) and the order of candidates.
    """

    reader: str = "m3el"
    seed: int = 0


class M3EL(datasets.GeneratorBasedBuilder):
    """Reads a raw release into the flat row of `m3el_hf.data.schema`.

    `m3el_hf.load_m3el` is the short way to use it.
    """

    VERSION = datasets.Version(__version__)
    BUILDER_CONFIG_CLASS = M3ELConfig
    BUILDER_CONFIGS = [M3ELConfig(name=name, version=datasets.Version(__version__)) for name in CONFIGS]  # noqa: RUF012
    DEFAULT_CONFIG_NAME = DEFAULT_CONFIG

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=get_config(self.config.name).features)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        if self.config.data_dir is None:
            raise M3ELError("data_dir is not set: pass the folder that holds the release")
        view = get_config(self.config.name)
        collection = collect(self.config.reader, Path(self.config.data_dir), self.config.seed)
        if view.name == ENTITIES_CONFIG:
            return [datasets.SplitGenerator("train", gen_kwargs={"collection": collection, "split": None})]
        splits = [split for split in SPLITS if collection.count(split, view.topic)]
        if not splits:
            raise M3ELError(f"{self.config.data_dir} has no {view.topic} rows: it has {', '.join(collection.topics)}")
        return [
            datasets.SplitGenerator(split, gen_kwargs={"collection": collection, "split": split}) for split in splits
        ]

    def _generate_examples(self, collection: Collection, split: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
        view = get_config(self.config.name)
        rows = collection.entities() if split is None else collection.rows(split, view.topic)
        for number, row in enumerate(rows):
            yield number, {name: row[name] for name in view.features}


def load_m3el(
    config: str = DEFAULT_CONFIG,
    *,
    data_dir: str | Path,
    split: str | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> datasets.DatasetDict | datasets.Dataset:
    """Reads a raw M³EL release, without a build step.

    Args:
        config: ``"all"``, a topic, a task such as ``"i2t"``, or ``"entities"``.
        data_dir: The folder that holds the release's ``<topic>.json`` files.
        split: One split, or None for all of them.
        seed: Seeds the splits (where the release has none) and the order of candidates.
        cache_dir: Where `datasets` keeps what it made; None for its default.

    Returns:
        One `Dataset`, or a `DatasetDict` if ``split`` is None.

    Raises:
        M3ELError: If the config or the folder does not exist, or nothing in it can be used.
    """
    get_config(config)
    folder = Path(data_dir)
    if not folder.is_dir():
        raise M3ELError(f"no such folder: {folder}; pass the folder that holds the release's <topic>.json files")
    if is_built(folder):
        raise M3ELError(f"{folder} is built already: read it with datasets.load_dataset({str(folder)!r}, {config!r})")
    builder = M3EL(
        config_name=config, data_dir=str(folder), cache_dir=cache_dir, seed=seed, hash=_fingerprint(folder, seed)
    )
    try:
        builder.download_and_prepare()
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, M3ELError):
            raise error.__cause__ from None
        raise
    if split is not None and split not in builder.info.splits:
        raise M3ELError(f"no split {split!r} in {folder}: it has {', '.join(builder.info.splits)}")
    return builder.as_dataset(split=split)


def _fingerprint(folder: Path, seed: int) -> str:
    """Changes with the release's files, since `datasets` would otherwise reuse what it made of the folder's name."""
    digest = hashlib.sha256(repr((seed, __version__)).encode())
    for path in sorted(folder.rglob("*")):
        state = path.lstat()  # enough for pictures, which are many
        digest.update(repr((str(path.relative_to(folder)), state.st_size, state.st_mtime_ns)).encode())
        if path.parent == folder and path.suffix == ".json" and path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
