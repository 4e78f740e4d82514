"""The named views of the data: everything, one topic, one task, the entities.

The published folder's YAML and the builder are both made of this one table.
"""

from __future__ import annotations

from dataclasses import dataclass

from datasets import Features

from m3el_hf.data.schema import ENTITY_FEATURES, ROW_FEATURES
from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TASKS, TOPICS

DEFAULT_CONFIG = "all"
ENTITIES_CONFIG = "entities"


@dataclass(frozen=True)
class Config:
    """One named view.

    Attributes:
        name: What `load_dataset` is given.
        folder: The folder of the published repository that it reads.
        topic: The one topic it holds, or None for all.
        columns: The columns it shows, or None for all of the folder's.
    """

    name: str
    folder: str = "data"
    topic: str | None = None
    columns: tuple[str, ...] | None = None

    @property
    def features(self) -> Features:
        """The features of its rows."""
        if self.name == ENTITIES_CONFIG:
            return ENTITY_FEATURES
        return ROW_FEATURES if self.columns is None else Features({name: ROW_FEATURES[name] for name in self.columns})


CONFIGS: dict[str, Config] = {
    config.name: config
    for config in (
        Config(DEFAULT_CONFIG),
        *(Config(topic, topic=topic) for topic in TOPICS),
        # A task without pictures reads the files without pictures: column projection alone saves no download.
        *(Config(name, "data" if task.needs_images else "text", columns=task.columns) for name, task in TASKS.items()),
        Config(ENTITIES_CONFIG, folder="entities"),
    )
}


def get_config(name: str) -> Config:
    """Looks a config up by name.

    Raises:
        M3ELError: If there is no such config.
    """
    if name not in CONFIGS:
        raise M3ELError(f"unknown config {name!r}: choose one of {', '.join(CONFIGS)}")
    return CONFIGS[name]
