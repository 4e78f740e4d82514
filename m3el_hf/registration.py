"""Registers CLIPND with transformers' Auto classes, at once where they are imported already and else once they are.

Registering needs the classes themselves, and those need torch. Waiting for the Auto modules keeps `import m3el_hf` and
the command line's help fast, and whoever uses an Auto class finds CLIPND registered all the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import transformers


def _register_config() -> None:
    from transformers import AutoConfig

    from m3el_hf.modeling.configuration_clipnd import ClipNDConfig

    AutoConfig.register(ClipNDConfig.model_type, ClipNDConfig)


def _register_model() -> None:
    from transformers import AutoModel

    from m3el_hf.modeling.configuration_clipnd import ClipNDConfig
    from m3el_hf.modeling.modeling_clipnd import ClipNDModel

    AutoModel.register(ClipNDConfig, ClipNDModel)


def _register_processor() -> None:
    from transformers import AutoProcessor

    from m3el_hf.modeling.configuration_clipnd import ClipNDConfig
    from m3el_hf.modeling.processing_clipnd import ClipNDProcessor

    AutoProcessor.register(ClipNDConfig, ClipNDProcessor)


_CLASSES = {
    "ClipNDConfig": "m3el_hf.modeling.configuration_clipnd",
    "ClipNDModel": "m3el_hf.modeling.modeling_clipnd",
    "ClipNDProcessor": "m3el_hf.modeling.processing_clipnd",
}

_ACTIONS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
    "transformers.models.auto.processing_auto": _register_processor,
}


def register() -> None:
    """Registers the configuration, the model and the processor, each as soon as its Auto class is imported."""
    pending = dict(_ACTIONS)
    lazy_module: type = type(transformers)

    class _Registering(lazy_module):
        """The lazy `transformers` module, which acts once what it was asked for is imported whole."""

        _depth = 0  # transformers asks itself for names while its own imports are half done

        def __getattr__(self, name: str) -> Any:
            _Registering._depth += 1
            try:
                value = super().__getattr__(name)
            finally:
                _Registering._depth -= 1
            if _Registering._depth == 0:
                _run_due(pending)
            return value

    _run_due(pending)
    if pending:
        transformers.__class__ = _Registering


def _half_imported() -> bool:
    """Whether one of our own modules is being imported: it asks transformers for names, and cannot be used yet."""
    return any(module in sys.modules and name not in vars(sys.modules[module]) for name, module in _CLASSES.items())


def _run_due(pending: dict[str, Callable[[], None]]) -> None:
    """Runs, and takes out of ``pending``, the actions whose Auto module is imported."""
    if _half_imported():
        return
    for module in [module for module in pending if module in sys.modules]:
        if module in pending:  # an action imports from transformers itself, and so may have come here before
            pending.pop(module)()
