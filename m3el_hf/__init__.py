"""Multimodal entity linking on the Hugging Face Hub.

Importing this registers the model with transformers' Auto classes; heavy libraries are imported when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from m3el_hf.registration import register

__version__ = "0.1.0"

_HOMES = {
    "ClipNDConfig": "m3el_hf.modeling.configuration_clipnd",
    "ClipNDModel": "m3el_hf.modeling.modeling_clipnd",
    "ClipNDProcessor": "m3el_hf.modeling.processing_clipnd",
    "EntityLinker": "m3el_hf.linking.linker",
    "Link": "m3el_hf.linking.linker",
    "M3ELError": "m3el_hf.errors",
    "TASKS": "m3el_hf.tasks",
    "TOPICS": "m3el_hf.tasks",
    "TrainingArguments": "m3el_hf.training.arguments",
    "add_lora": "m3el_hf.training.lora",
    "evaluate": "m3el_hf.evaluation.evaluator",
    "load_m3el": "m3el_hf.data.builder",
    "load_metric": "m3el_hf.metrics",
    "register_dataset": "m3el_hf.data.builder",
    "train": "m3el_hf.training.loop",
}

__all__ = sorted(["__version__", *_HOMES])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__


register()
