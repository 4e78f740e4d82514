"""The `datasets` builder that reads raw releases. The published folder needs none of this: it is plain Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import datasets

from m3el_hf import __version__
from m3el_hf.data.collection import Piece, Spool, collect
from m3el_hf.data.configs import DEFAULT_CONFIG, ENTITIES_CONFIG, Config, select
from m3el_hf.data.images import SHORT_SIDE, PictureStore
from m3el_hf.data.readers import get_reader
from m3el_hf.data.rows import RowMaker, check_protocol
from m3el_hf.data.schema import SPLITS
from m3el_hf.errors import M3ELError
from m3el_hf.sources import check_source, check_split, fingerprint, is_built, load_built
from m3el_hf.tasks import TOPICS

logger = datasets.utils.logging.get_logger(__name__)

_PIECE = 500  # rows that one process takes at a time


@dataclass
class M3ELConfig(datasets.BuilderConfig):
    """A config of the builder.

    Attributes:
        name: ``"all"``, a topic, a task, ``"mentions"`` or ``"entities"``.
        task: One of the nine tasks, beside the name ``"all"`` or a topic; None for all columns.
        reader: The raw format, a name of `m3el_hf.data.readers.READERS`.
        seed: Seeds the splits (where the release has none) and the order of candidates.
        protocol: One of `m3el_hf.data.rows.PROTOCOLS`.
        short_side: Larger pictures are reduced to this short side, in pixels; None keeps the originals.
        view: What the name and the task show.

    Raises:
        M3ELError: If one of them does not exist, or the folder is a built one.
    """

    name: str = DEFAULT_CONFIG
    task: str | None = None
    reader: str = "m3el"
    seed: int = 0
    protocol: str = "as_released"
    short_side: int | None = SHORT_SIDE
    view: Config = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuses what can be refused before the release is read."""
        if self.data_dir is not None and is_built(Path(self.data_dir)):
            call = f"load_m3el({self.name!r}, data_dir={str(self.data_dir)!r})"
            raise M3ELError(f"{self.data_dir} is a built dataset, no raw release: load it with m3el_hf.{call}")
        check_protocol(self.protocol)
        shares_base = get_reader(self.reader).entities is not None
        # Only the topics of M³EL have fixed names.
        self.view = select(self.name, self.task, TOPICS if self.reader == "m3el" else None, shares_base)
        super().__post_init__()

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
    DEFAULT_CONFIG_NAME = DEFAULT_CONFIG

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=self.config.view.features)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        config, view = self.config, self.config.view
        if config.data_dir is None:
            raise M3ELError("data_dir is not set: pass the folder that holds the release")
        # The builder keeps the collection, for its spool is removed with it.
        self._collection = collection = collect(config.reader, Path(config.data_dir), config.seed)
        report = collection.report
        for kind, read, skipped in (
            ("instances", report.read, report.skipped),
            ("entities", report.entities_read, report.entities_skipped),
        ):
            if skipped:
                logger.warning("%s of %s %s are skipped, such as: %s", len(skipped), read, kind, skipped[0])
        shared = {"spool": collection.folder}
        if view.name == ENTITIES_CONFIG:
            parts: list[Any] = [*collection.base(size=_PIECE)]
            parts += [piece for split in SPLITS for piece in collection.pieces(split, size=_PIECE) if piece.entities]
            return [datasets.SplitGenerator("train", gen_kwargs=shared | {"pieces": parts})]
        found = {split: collection.pieces(split, view.topic, size=_PIECE) for split in SPLITS}
        if not any(found.values()):
            raise M3ELError(f"{config.data_dir} has no {view.topic} rows: it has {', '.join(collection.topics)}")
        return [
            datasets.SplitGenerator(split, gen_kwargs=shared | {"pieces": pieces})
            for split, pieces in found.items()
            if pieces
        ]

    def _generate_examples(self, spool: Path, pieces: list[Piece | range]) -> Iterator[tuple[str, dict[str, Any]]]:
        config, view = self.config, self.config.view
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
        if lost := maker.report.unusable_images:
            file, reason = next(iter(lost.items()))
            logger.warning("%s pictures cannot be had and are null, such as: %s %s", len(lost), file, reason)


def register_dataset() -> None:
    """Makes ``load_dataset("m3el", "person", data_dir=raw)`` read a raw release.

    Not done on import: it goes through a private table of `datasets`, and from then on ``"m3el"`` no longer means a
    folder of that name. Call it once a process, before `load_dataset`.

    Example:
        >>> from datasets import load_dataset_builder
        >>> register_dataset()
        >>> list(load_dataset_builder("m3el", "i2i", data_files={"train": __file__}).info.features)
        ['id', 'topic', 'mention_image', 'answer', 'candidate_images']
    """
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    _PACKAGED_DATASETS_MODULES["m3el"] = (M3EL.__module__, __version__)


def load_m3el(
    config: str = DEFAULT_CONFIG,
    *,
    data_dir: str | Path,
    task: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    reader: str | None = None,
    seed: int | None = None,
    protocol: str | None = None,
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
) -> Any:
    """Reads a raw release without a build step, or any topic and task of a built one.

    A built folder has its own reader, seed and protocol. They need not be given, and others are refused.

    Args:
        config: ``"all"``, a topic, a task such as ``"i2t"``, or ``"entities"``; where the mentions share a knowledge
            base, ``"mentions"`` or ``"entities"``.
        data_dir: The folder of a raw release, or a built folder, or a Hub id of one.
        task: One of the nine tasks, to see a topic as that task does.
        split: One split, or a part of it such as ``"train[:10]"``; None for all of them. Of a Hub repository, only its
            files are downloaded.
        revision: A tag, branch or commit of a Hub repository; None for its main branch.
        streaming: Whether to read rows as they are asked for, rather than all at once.
        reader: The raw format, a name of `m3el_hf.data.readers.READERS`; None for ``"m3el"``.
        seed: Seeds the splits (where a raw release has none) and the order of candidates; None for 0.
        protocol: ``"as_released"``, or ``"deleaked"``, which removes a mention's picture where it is the gold's own;
            None for as released.
        num_proc: Processes that read a raw release; None for one.
        cache_dir: Where `datasets` keeps what it made; None for its default.

    Returns:
        One `Dataset`, or a `DatasetDict` if ``split`` is None; their iterable kin if streaming.

    Raises:
        M3ELError: If the config, the folder or the repository does not exist, or nothing in it can be used.
    """
    source = check_source(data_dir, revision)
    settings = {"reader": reader, "seed": seed, "protocol": protocol}
    if not Path(source).is_dir() or is_built(Path(source)):
        return load_built(
            source,
            config,
            task=task,
            split=split,
            revision=revision,
            streaming=streaming,
            cache_dir=cache_dir,
            **settings,
        )
    given = {name: value for name, value in settings.items() if value is not None}
    builder = M3EL(config_name=config, data_dir=source, cache_dir=cache_dir, task=task, **given)
    try:
        if streaming:
            rows = builder.as_streaming_dataset()
            if split is not None:
                (name,) = check_split(split, rows, source, streaming)
                rows = rows[name]
        else:
            builder.download_and_prepare(num_proc=num_proc)
            if split is not None:
                check_split(split, builder.info.splits, source, streaming)
            rows = builder.as_dataset(split=split)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, M3ELError):
            raise error.__cause__ from None
        raise
    return rows
