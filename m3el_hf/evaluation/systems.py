"""What can be measured: anything that encodes mentions and entities, and scores them against one another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from m3el_hf import __version__
from m3el_hf.data.collator import EntityRow, LinkingCollator
from m3el_hf.modeling.encoded_clipnd import Encoded
from m3el_hf.modeling.modeling_clipnd import ClipNDModel
from m3el_hf.modeling.offload_clipnd import home_of
from m3el_hf.modeling.processing_clipnd import ClipNDProcessor
from m3el_hf.tasks import Task

Row = Mapping[str, Any]
Scores = NDArray[np.float64]


class System(Protocol):
    """A baseline, a model, a control.

    Both protocols ask it the same way: mentions and entities are encoded once, and any of them are scored against any.
    What is encoded has a length and is indexed by an array of rows, as NumPy's arrays and `Encoded` are.
    """

    @property
    def name(self) -> str:
        """Its name in every table."""
        ...

    @property
    def fingerprint(self) -> str | None:
        """Names all that entities are encoded by: these, an `Encoded`, are then kept on disk. None: never."""
        ...

    def can_do(self, task: Task) -> bool:
        """Whether the system has a say on the task at all."""
        ...

    def encode_mentions(self, rows: Sequence[Row]) -> Any:
        """Encodes B mentions; each has a name, a sentence or a picture (as bytes)."""
        ...

    def encode_entities(self, entities: Sequence[EntityRow]) -> Any:
        """Encodes N entities; each has a name, a description or a picture (as bytes)."""
        ...

    def score(self, mentions: Any, entities: Any, tasks: Sequence[Task]) -> Scores:
        """Scores ``[T, B, N]`` by what each task shows of both sides; higher is better, and none is NaN or +inf.

        Of a mention or an entity that lacks what a task shows, the scores may be any: whoever asks masks them.
        """
        ...


class ModelSystem:
    """A model as a `System`.

    Args:
        name: Its name in every table.
        model: The model, in whatever mode; it stays in that.
        processor: Its processor, or a collator that holds it (and has cached the pictures).
    """

    def __init__(self, name: str, model: ClipNDModel, processor: ClipNDProcessor | LinkingCollator) -> None:
        self.name = name
        self.model = model
        # Each picture is encoded once: none is worth keeping.
        self.collator = processor if isinstance(processor, LinkingCollator) else LinkingCollator(processor, 0)

    @property
    def fingerprint(self) -> str | None:
        """Of the weights, the processor, and what computes; None where the weights are not at hand."""
        weights = self.model.weights_fingerprint()
        if weights is None:
            return None
        processor = self.collator.processor
        settings = (
            self.model.config.to_json_string(),
            processor.image_processor.to_json_string(),
            processor.tokenizer.backend_tokenizer.to_str(),
            processor.max_text_length,
            processor.template,
            home_of(self.model).type,  # kinds of device differ in the last digits, and so do versions
            (__version__, torch.__version__, transformers.__version__),
        )
        return hashlib.blake2b(repr((weights, settings)).encode(), digest_size=12).hexdigest()

    def can_do(self, task: Task) -> bool:
        """Every task."""
        return True

    def encode_mentions(self, rows: Sequence[Row]) -> Encoded:
        """Encodes mentions by all that they have."""
        with _measured(self.model):
            return self.model.encode_mentions(**self._on_device(self.collator.mentions(rows)))

    def encode_entities(self, entities: Sequence[EntityRow]) -> Encoded:
        """Encodes entities by all that they have."""
        with _measured(self.model):
            return self.model.encode_entities(**self._on_device(self.collator.entities(entities)))

    def score(self, mentions: Encoded, entities: Encoded, tasks: Sequence[Task]) -> Scores:
        """Scores in fp32: lower precision would make ties."""
        sides = [(task.mention, task.candidate) for task in tasks]
        views = [(one.has_text, one.has_image, other.has_text, other.has_image) for one, other in sides]
        with _measured(self.model):
            device = home_of(self.model)
            return self.model.score_views(mentions.to(device), entities.to(device), views).double().cpu().numpy()

    def _on_device(self, inputs: Mapping[str, Tensor | None]) -> dict[str, Any]:
        return to_device(inputs, home_of(self.model))


def to_device(inputs: Mapping[str, Tensor | None], device: torch.device) -> dict[str, Any]:
    """Moves the arguments of an encoder to a device."""
    return {name: value.to(device) if value is not None else None for name, value in inputs.items()}


@contextmanager
def _measured(model: ClipNDModel) -> Iterator[None]:
    """Without gradients and dropout; each module then has the mode that it had."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
