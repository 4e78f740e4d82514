"""Registers CLIPND with transformers' Auto classes, at once where they are imported already and else once they are.

Registering needs the classes themselves, and those need torch. Waiting for the Auto modules keeps `import m3el_hf` and
the command line's help fast, and whoever uses an Auto class finds CLIPND registered all the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


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


_ACTIONS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
    "transformers.models.auto.processing_auto": _register_processor,
}


def register() -> None:
    """Registers the configuration, the model and the processor, each as soon as its Auto class is imported."""
    watcher = _Watcher()
    sys.meta_path.insert(0, watcher)
    watcher.run_due()


class _Watcher(MetaPathFinder):
    """Watches imports of transformers and of our model, and registers what is due whenever the last of them is done.

    transformers' modules import one another in circles, and ours import them: only when none is half done can the
    classes be had.
    """

    def __init__(self) -> None:
        self._pending = dict(_ACTIONS)
        self._depth = 0

    def run_due(self) -> None:
        """Runs the actions whose Auto module is imported, each once, and stops watching after the last."""
        for module in [module for module in self._pending if module in sys.modules]:
            if module in self._pending:  # an action imports modules itself, and so may have come here before
                self._pending.pop(module)()
        if not self._pending and self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(("transformers.", "m3el_hf.modeling.")):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            self._watch(spec.loader)
        return spec

    def _watch(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self._depth += 1
            try:
                execute(module)
            finally:
                self._depth -= 1
            if self._depth == 0:
                self.run_due()

        loader.exec_module = exec_module
