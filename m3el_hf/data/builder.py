"""The `datasets` builder that reads raw releases. The published folder needs none of this: it is plain Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets

from m3el_hf import __version__
from m3el_hf.data.collection import Piece, Spool, collect
from m3el_hf.data.configs import DEFAULT_CONFIG, ENTITIES_CONFIG, MENTIONS_CONFIG, Config, configs, select
from m3el_hf.data.images import SHORT_SIDE, PictureStore
from m3el_hf.data.manifest import FILE_NAME, Manifest
from m3el_hf.data.readers import get_reader
from m3el_hf.data.rows import RowMaker, check_protocol
from m3el_hf.data.schema import SPLITS
from m3el_hf.errors import M3ELError
from m3el_hf.sources import check_source, fingerprint, is_built
from m3el_hf.tasks import TOPICS

_NAMES = [*configs(TOPICS, knowledge_base=False), MENTIONS_CONFIG]
_PIECE = 500  # rows that one process takes at a time


@dataclass
class M3ELConfig(datasets.BuilderConfig):
    """A config of the builder.

    Attributes:
        task: One of the nine tasks, beside the name ``"all"`` or a topic; None for all columns.
        reader: The raw format, a name of `m3el_hf.data.readers.READERS`.
        seed: Seeds the splits (where the release has none) and the order of candidates.
        protocol: One of `m3el_hf.data.rows.PROTOCOLS`.
        short_side: Larger pictures are reduced to this short side, in pixels; None keeps the originals.
    """

    task: str | None = None
    reader: str = "m3el"
    seed: int = 0
    protocol: str = "as_released"
    short_side: int | None = SHORT_SIDE

    def create_config_id(self, config_kwargs: dict[str, Any], custom_features: Any = None) -> str:
        """Names the cache after the release's files too: `datasets` would go by the folder's name alone."""
        config_id = super().create_config_id(config_kwargs, custom_features)
        return config_id if self.data_dir is None else f"{config_id}-{fingerprint(Path(self.data_dir))}"


class M3EL(datasets.GeneratorBasedBuilder):
    """Reads a raw release into the flat row of `m3el_hf.data.schema`.

    `m3el_hf.load_m3el` is the short way to use it.
    """

    VERSION = datasets.Version(__version__)
    BUILDER_CONFIG_CLASS = M3ELConfig
    BUILDER_CONFIGS = [M3ELConfig(name=name, version=datasets.Version(__version__)) for name in _NAMES]  # noqa: RUF012
    DEFAULT_CONFIG_NAME = DEFAULT_CONFIG

    @property
    def _view(self) -> Config:
        return select(self.config.name, self.config.task)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=self._view.features)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        config, view = self.config, self._view
        if config.data_dir is None:
            raise M3ELError("data_dir is not set: pass the folder that holds the release")
        # The builder keeps the collection, for its spool is removed with it.
        self._collection = collection = collect(config.reader, Path(config.data_dir), config.seed)
        shared = {"spool": collection.folder}
        if view.name == ENTITIES_CONFIG:
            parts: list[Any] = [*collection.base(size=_PIECE)]
            parts += [piece for split in SPLITS for piece in collection.pieces(split, size=_PIECE) if piece.entities]
            return [datasets.SplitGenerator("train", gen_kwargs=shared | {"pieces": parts})]
        if (view.name == MENTIONS_CONFIG) != (collection.reader.entities is not None):
            right = [DEFAULT_CONFIG, "a topic", "a task"] if view.name == MENTIONS_CONFIG else [MENTIONS_CONFIG]
            raise M3ELError(f"{config.data_dir} has no {view.name!r}: choose {', '.join([*right, ENTITIES_CONFIG])}")
        found = {split: collection.pieces(split, view.topic, size=_PIECE) for split in SPLITS}
        if not any(found.values()):
            raise M3ELError(f"{config.data_dir} has no {view.topic} rows: it has {', '.join(collection.topics)}")
        return [
            datasets.SplitGenerator(split, gen_kwargs=shared | {"pieces": pieces})
            for split, pieces in found.items()
            if pieces
        ]

    def _generate_examples(self, spool: Path, pieces: list[Piece | range]) -> Iterator[tuple[str, dict[str, Any]]]:
        config, view = self.config, self._view
        maker = RowMaker(Spool(spool), PictureStore(config.short_side), config.seed, config.protocol)
        for piece in pieces:
            if isinstance(piece, range):
                rows = maker.base(piece)
            elif view.name == ENTITIES_CONFIG:
                rows = chain.from_iterable(maker.described(piece))
            else:
                rows = maker.rows(piece)
            for row in rows:
                yield str(row.get("id") or row.get("qid")), {name: row[name] for name in view.features}


def register_dataset() -> None:
    """Makes ``load_dataset("m3el", "person", data_dir=raw)`` read a raw release.

    Not done on import: it goes through a private table of `datasets`, and from then on ``"m3el"`` no longer means a
    folder of that name. Call it once a process, before `load_dataset`.

    Example:
        >>> from datasets import get_dataset_config_names
        >>> register_dataset()
        >>> get_dataset_config_names("m3el", data_files={"train": __file__})[:3]
        ['all', 'movies', 'common']
    """
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    _PACKAGED_DATASETS_MODULES["m3el"] = (M3EL.__module__, __version__)


def load_m3el(
    config: str = DEFAULT_CONFIG,
    *,
    data_dir: str | Path,
    task: str | None = None,
    split: str | None = None,
    streaming: bool = False,
    reader: str = "m3el",
    seed: int = 0,
    protocol: str | None = None,
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
) -> Any:
    """Reads a raw release without a build step, or any topic and task of a built one.

    Args:
        config: ``"all"``, a topic, a task such as ``"i2t"``, or ``"entities"``; where the mentions share a knowledge
            base, ``"mentions"`` or ``"entities"``.
        data_dir: The folder of a raw release, or a built folder, or a Hub id of one.
        task: One of the nine tasks, to see a topic as that task does.
        split: One split, or None for all of them.
        streaming: Whether to read rows as they are asked for, rather than all at once.
        reader: The raw format, a name of `m3el_hf.data.readers.READERS`; a built folder needs none.
        seed: Seeds the splits (where a raw release has none) and the order of candidates.
        protocol: How a raw release is read: ``"as_released"``, or ``"deleaked"``, which removes a mention's picture
            where it is the gold's own; None for as released, or for however a built folder was built.
        num_proc: Processes that read a raw release; None for one.
        cache_dir: Where `datasets` keeps what it made; None for its default.

    Returns:
        One `Dataset`, or a `DatasetDict` if ``split`` is None; their iterable kin if streaming.

    Raises:
        M3ELError: If the config or the folder does not exist, or nothing in it can be used.
    """
    folder = Path(data_dir)
    if not folder.is_dir() or is_built(folder):
        source = check_source(data_dir)
        return _load_built(config, task, source, split, protocol, streaming=streaming, cache_dir=cache_dir)
    select(config, task)
    protocol = check_protocol(protocol or "as_released")
    get_reader(reader)
    builder = M3EL(
        config_name=config,
        data_dir=str(folder),
        cache_dir=cache_dir,
        task=task,
        reader=reader,
        seed=seed,
        protocol=protocol,
    )
    try:
        if streaming:
            rows = builder.as_streaming_dataset()
        else:
            builder.download_and_prepare(num_proc=num_proc)
            rows = builder.as_dataset()
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, M3ELError):
            raise error.__cause__ from None
        raise
    return _one_split(rows, split, folder)


def _load_built(
    config: str, task: str | None, source: str, split: str | None, protocol: str | None, **options: Any
) -> datasets.DatasetDict | datasets.Dataset:
    """Loads any topic and task of a built folder or of a Hub repository; its own configs have only one or the other."""
    if Path(source).is_dir():
        manifest = Manifest.load(Path(source))
    else:
        manifest = _hub_manifest(source)
    if protocol not in (None, manifest.protocol):
        raise M3ELError(f"{source} was built {manifest.protocol}: build it again with --protocol {protocol}")
    view = select(config, task, manifest.rows)
    if (view.folder == MENTIONS_CONFIG) != (manifest.kind == "knowledge_base") and view.name != ENTITIES_CONFIG:
        known = configs(manifest.rows, manifest.kind == "knowledge_base")
        raise M3ELError(f"{source} has no {config!r}: choose one of {', '.join(known)}")
    columns = None if view.columns is None else list(view.columns)
    rows = datasets.load_dataset(source, data_files=view.data_files(manifest.rows), columns=columns, **options)
    return _one_split(rows, split, source)


def _hub_manifest(source: str) -> Manifest:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        path = hf_hub_download(source, FILE_NAME, repo_type="dataset")
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())
        raise M3ELError(f"{source} is no dataset that m3el-hf data build wrote: {reason}") from error
    return Manifest.load(Path(path).parent)


def _one_split(rows: Any, split: str | None, source: str | Path) -> Any:
    if split is None:
        return rows
    if split not in rows:
        raise M3ELError(f"no split {split!r} in {source}: it has {', '.join(rows)}")
    return rows[split]
