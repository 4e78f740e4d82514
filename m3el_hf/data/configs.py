"""The named views of the data: everything, one topic, one task, the entities.

The published folder's YAML and the builder are both made of this one table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from datasets import Features

from m3el_hf.data.schema import ENTITY_FEATURES, MENTION_FEATURES, ROW_FEATURES, SPLITS
from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TASKS, TOPICS, get_task

DEFAULT_CONFIG = "all"
MENTIONS_CONFIG = "mentions"
ENTITIES_CONFIG = "entities"

RESERVED = {DEFAULT_CONFIG, "default", MENTIONS_CONFIG, ENTITIES_CONFIG, *TASKS}
"""Names that no topic can have."""

_FEATURES = {"data": ROW_FEATURES, "text": ROW_FEATURES, "mentions": MENTION_FEATURES, "entities": ENTITY_FEATURES}


@dataclass(frozen=True)
class Config:
    """One named view.

    Attributes:
        name: What `load_dataset` is given.
        folder: The folder of the published repository that it reads.
        topic: The one topic it holds, or None for all.
        columns: The columns it shows, in the folder's order whatever theirs is, or None for all of the folder's.
        default: Whether it is what `load_dataset` gives without a name.
    """

    name: str
    folder: str = "data"
    topic: str | None = None
    columns: tuple[str, ...] | None = None
    default: bool = False

    @property
    def features(self) -> Features:
        """The features of its rows, in the order of its files, which is the one that `load_dataset` keeps."""
        features = _FEATURES[self.folder]
        return Features({name: kind for name, kind in features.items() if name in (self.columns or features)})

    def data_files(self, rows: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
        """Returns the files of each split that has some, as patterns.

        Args:
            rows: The number of rows of the dataset by topic and split.
        """
        if self.folder == "entities":
            return {"train": "entities/*.parquet"}
        topics = rows if self.topic is None else [self.topic]
        place = self.folder if self.folder == "mentions" else f"{self.folder}/{self.topic or '*'}"
        return {
            split: f"{place}/{split}-*.parquet" for split in SPLITS if any(rows[topic].get(split) for topic in topics)
        }


def configs(topics: Iterable[str], knowledge_base: bool) -> dict[str, Config]:
    """Returns the configs of a dataset by name.

    Args:
        topics: The topics that it has.
        knowledge_base: Whether its mentions share a knowledge base rather than have candidates of their own.
    """
    entities = Config(ENTITIES_CONFIG, folder="entities")
    if knowledge_base:
        views = [Config(MENTIONS_CONFIG, folder="mentions", default=True), entities]
    else:
        views = [
            Config(DEFAULT_CONFIG, default=True),
            *(Config(topic, topic=topic) for topic in topics),
            *(_task_config(task) for task in TASKS),
            entities,
        ]
    return {config.name: config for config in views}


def select(
    name: str, task: str | None = None, topics: Iterable[str] | None = TOPICS, knowledge_base: bool = False
) -> Config:
    """Returns the view of a name, or of a topic (or ``"all"``) and a task.

    Args:
        name: ``"all"``, a topic, a task, ``"mentions"`` or ``"entities"``.
        task: One of the nine tasks, with ``"all"`` or a topic.
        topics: The topics that there are; None while nobody knows them, so that any word that is no other view's name
            is taken for a topic.
        knowledge_base: Whether the mentions share a knowledge base: they have neither topics nor tasks then.

    Raises:
        M3ELError: If there is no such view.
    """
    if topics is None:
        topics = () if name in RESERVED or not re.fullmatch(r"[\w-]+", name) else (name,)
    known = configs(topics, knowledge_base)
    if name not in known:
        raise M3ELError(f"unknown config {name!r}: choose one of {', '.join(known)}")
    if task is None:
        return known[name]
    get_task(task)
    if name != DEFAULT_CONFIG and known[name].topic is None:
        raise M3ELError(f"a task goes with {DEFAULT_CONFIG!r} or a topic, not with {name!r}")
    return _task_config(task, known[name].topic)


def _task_config(name: str, topic: str | None = None) -> Config:
    """A task without pictures reads the files without pictures: column projection alone saves no download."""
    return Config(name, "data" if TASKS[name].needs_images else "text", topic, TASKS[name].columns)
