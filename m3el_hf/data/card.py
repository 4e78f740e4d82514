"""The README of the dataset repository: its YAML makes the configs, its text says what is inside."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from huggingface_hub import DatasetCard, DatasetCardData

from m3el_hf import __version__
from m3el_hf.data.collection import RELEASED
from m3el_hf.data.configs import Config, configs
from m3el_hf.data.manifest import Manifest
from m3el_hf.data.readers import get_reader, works
from m3el_hf.data.rows import REMOVED
from m3el_hf.data.schema import SPLITS
from m3el_hf.errors import one_line

if TYPE_CHECKING:
    from m3el_hf.data.audit import Audit

_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}


def render_dataset_card(manifest: Manifest, audit: Audit | None = None) -> str:
    """Renders the README of a built dataset repository.

    Args:
        manifest: What was built.
        audit: What was found in it, or None while nobody has looked.
    """
    reader = get_reader(manifest.reader)
    card_data = DatasetCardData(
        pretty_name=manifest.title,
        license=manifest.license_id,
        size_categories=next((name for most, name in _SIZES.items() if manifest.total < most), "n>1M"),
        tags=["entity-linking", "multimodal", "m3el"],
        task_categories=["other"],
        language=["en"],
        configs=[_yaml_config(config, manifest) for config in _configs(manifest)],
    )
    return DatasetCard.from_template(
        card_data,
        template_str=files("m3el_hf.dataset_card").joinpath("template.md").read_text(encoding="utf-8"),
        manifest=manifest,
        linking=manifest.kind == "candidates",
        topics=list(manifest.rows),
        reader=reader,
        citation="\n\n".join(dict.fromkeys([works.M3EL, works.MATCHING_NETWORK, *reader.citations])),
        partly_released=manifest.counts.get(RELEASED),
        removed=REMOVED,
        plain=plain,
        splits=SPLITS,
        audit=audit,
        version=__version__,
    ).content


def plain(text: str) -> str:
    """Returns text of the data as one line that Markdown and HTML take as text."""
    line = one_line("".join(letter if letter.isprintable() else " " for letter in text))
    for sign in "\\|<>[]*_#":
        line = line.replace(sign, f"\\{sign}")
    return line.replace("`", "'")


def _configs(manifest: Manifest) -> list[Config]:
    return list(configs(manifest.rows, manifest.kind == "knowledge_base").values())


def _yaml_config(config: Config, manifest: Manifest) -> dict[str, object]:
    """The `configs:` entry that plain `load_dataset` reads."""
    data_files = [{"split": split, "path": path} for split, path in config.data_files(manifest.rows).items()]
    entry: dict[str, object] = {
        "config_name": config.name,
        # Without something that changes with the data, `datasets` takes a folder that was built again for the old one.
        "description": f"revision {manifest.revision}",
        "data_files": data_files,
    }
    if config.default:
        entry["default"] = True
    if config.columns:
        entry["columns"] = list(config.columns)
    return entry
