"""The README of the dataset repository: its YAML makes the configs, its text says what is inside."""

from __future__ import annotations

from importlib.resources import files

from huggingface_hub import DatasetCard, DatasetCardData

from m3el_hf import __version__
from m3el_hf.data.configs import CONFIGS, DEFAULT_CONFIG, ENTITIES_CONFIG, Config
from m3el_hf.data.rows import Collection
from m3el_hf.data.schema import SPLITS


def render_dataset_card(collection: Collection, reader: str) -> str:
    """Renders the README of a built dataset repository.

    Args:
        collection: What was built; its report must be complete, so render last.
        reader: The reader's name.
    """
    counts = {topic: {split: collection.count(split, topic) for split in SPLITS} for topic in collection.topics}
    card_data = DatasetCardData(
        pretty_name="M3EL mini" if reader == "mini" else "M³EL",
        tags=["entity-linking", "multimodal", "m3el"],
        task_categories=["other"],
        language=["en"],
        configs=[_yaml_config(config, counts) for config in CONFIGS.values() if config.topic in (None, *counts)],
    )
    return DatasetCard.from_template(
        card_data,
        template_str=files("m3el_hf.dataset_card").joinpath("template.md").read_text(encoding="utf-8"),
        reader=reader,
        topics=collection.topics,
        splits=SPLITS,
        counts=counts,
        seed=collection.seed,
        released=all(record.split for record in collection.records),
        report=collection.report,
        version=__version__,
    ).content


def _yaml_config(config: Config, counts: dict[str, dict[str, int]]) -> dict[str, object]:
    """The `configs:` entry that plain `load_dataset` reads."""
    if config.name == ENTITIES_CONFIG:
        return {"config_name": config.name, "data_files": [{"split": "train", "path": "entities/*.parquet"}]}
    topics = [config.topic] if config.topic else list(counts)
    data_files = [
        {"split": split, "path": f"{config.folder}/{config.topic or '*'}/{split}-*.parquet"}
        for split in SPLITS
        if any(counts[topic][split] for topic in topics)
    ]
    entry: dict[str, object] = {"config_name": config.name, "data_files": data_files}
    if config.name == DEFAULT_CONFIG:
        entry["default"] = True
    if config.columns:
        entry["columns"] = list(config.columns)
    return entry
