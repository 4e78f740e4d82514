"""Links a mention to the entities of a knowledge base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from m3el_hf.errors import M3ELError
from m3el_hf.modeling.encoded_clipnd import Encoded
from m3el_hf.modeling.modeling_clipnd import ClipNDModel
from m3el_hf.modeling.offload_clipnd import home_of
from m3el_hf.modeling.processing_clipnd import ClipNDProcessor, ImageInput
from m3el_hf.sources import load_built, load_model

BATCH_SIZE = 64


@dataclass(frozen=True)
class Link:
    """One entity with its score for a mention; higher is better."""

    qid: str
    name: str | None
    description: str | None
    score: float


class EntityLinker:
    """Ranks the entities of a knowledge base for a mention; each entity is encoded once, at the start.

    Args:
        model: The model.
        processor: Its processor.
        entities: Rows with ``qid``, ``name``, ``description`` and ``image``, such as the ``entities`` config has; None
            where an entity has no description or picture.

    Raises:
        M3ELError: If there are no entities, or one has neither text nor picture.
    """

    @torch.inference_mode()
    def __init__(self, model: ClipNDModel, processor: ClipNDProcessor, entities: Iterable[Mapping[str, Any]]) -> None:
        self.model = model.eval()
        self.processor = processor
        self._known: list[tuple[str, str, str | None]] = []
        encoded: list[Encoded] = []
        for batch in _batches(entities):
            self._known += [(row["qid"], row["name"], row["description"]) for row in batch]
            inputs = processor.from_rows(batch, side="entity")
            for row, shown in zip(batch, (inputs["has_text"] | inputs["has_image"]).tolist(), strict=True):
                if not shown:
                    raise M3ELError(
                        f"entity {row['qid']} has neither text nor picture under the template {processor.template!r}: "
                        "leave it out"
                    )
            encoded.append(model.encode_entities(**self._on_device(inputs)))
        if not self._known:
            raise M3ELError("the knowledge base is empty: pass at least one entity")
        self._encoded = encoded[0].join(encoded)

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, *, knowledge_base: str | Path) -> EntityLinker:
        """Loads a model, onto the accelerator where there is one, and a knowledge base.

        Args:
            path_or_id: A folder or a Hub id of a saved `ClipNDModel`.
            knowledge_base: A folder or a Hub id of a built dataset; its ``entities`` config is used.

        Raises:
            M3ELError: If one of them is neither a folder nor a Hub id, or cannot be loaded.
        """
        return cls(*load_model(path_or_id), load_built(knowledge_base, "entities")["train"])

    @torch.inference_mode()
    def __call__(
        self,
        *,
        name: str | None = None,
        context: str | None = None,
        image: ImageInput | None = None,
        top_k: int = 5,
    ) -> list[Link]:
        """Returns the ``top_k`` best entities, best first; fewer if the knowledge base is smaller.

        Args:
            name: The mention's name, or None.
            context: Its sentence, or None.
            image: Its picture, or None.
            top_k: How many to return.

        Raises:
            ValueError: If the mention has neither text nor picture, or the picture cannot be decoded.
        """
        inputs = self._on_device(self.processor.mentions([name], [context], [image]))
        mention = self.model.encode_mentions(**inputs)
        scores = self.model.score(mention, self._encoded).total[0]
        best = scores.topk(min(top_k, len(scores)))
        links = []
        for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            qid, entity_name, description = self._known[index]
            links.append(Link(qid, entity_name, description, score))
        return links

    def _on_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        device = home_of(self.model)
        return {name: None if value is None else value.to(device) for name, value in inputs.items()}


def _batches(entities: Iterable[Mapping[str, Any]]) -> Iterable[Sequence[Mapping[str, Any]]]:
    batch: list[Mapping[str, Any]] = []
    for row in entities:
        batch.append(row)
        if len(batch) == BATCH_SIZE:
            yield batch
            batch = []
    if batch:
        yield batch
