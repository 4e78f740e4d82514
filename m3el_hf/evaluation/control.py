"""The mention-blind control: what a model links correctly without looking at the mention is a shortcut, not linking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from m3el_hf.data.collator import EntityRow, undecoded
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.sharing import Share
from m3el_hf.evaluation.systems import ModelSystem, Row, Scores
from m3el_hf.modeling.encoded_clipnd import Encoded
from m3el_hf.tasks import Task

BATCH_SIZE = 64


class MentionBlind:
    """A model to which every mention is the average mention. It must sit at chance.

    Args:
        name: Its name in every table.
        system: The model.
        average: By `average_mention`.
    """

    def __init__(self, name: str, system: ModelSystem, average: Encoded) -> None:
        self.name = name
        self._system = system
        self._average = average

    @property
    def fingerprint(self) -> str | None:
        """The model's: both encode entities alike."""
        return self._system.fingerprint

    def can_do(self, task: Task) -> bool:
        """Every task."""
        return True

    def encode_mentions(self, rows: Sequence[Row]) -> Encoded:
        """The average mention, once a row."""
        return self._average[torch.zeros(len(rows), dtype=torch.long)]

    def encode_entities(self, entities: Sequence[EntityRow]) -> Encoded:
        """As the model does."""
        return self._system.encode_entities(entities)

    def score(self, mentions: Encoded, entities: Encoded, tasks: Sequence[Task]) -> Scores:
        """As the model does."""
        return self._system.score(mentions, entities, tasks)


def average_mention(
    system: ModelSystem, rows: Dataset | Sequence[Row], accelerator: Accelerator | None = None
) -> Encoded:
    """Encodes all mentions and returns their average: one row, with one token.

    Args:
        system: The model.
        rows: Rows of `m3el_hf.data.schema.ROW_FEATURES`; a sequence has its pictures as bytes.
        accelerator: Of several processes, which all call this and divide the work; the result is the same.

    Raises:
        M3ELError: If no row has a name, a sentence or a picture.
    """
    rows = undecoded(rows) if isinstance(rows, Dataset) else rows
    share = Share(accelerator)
    starts = range(0, len(rows), BATCH_SIZE)
    found = [(start, _sums(system, rows, start)) for start in share.mine(starts)]
    parts = [part for _, part in sorted(share.gathered(found), key=lambda one: one[0]) if part is not None]
    if not parts:
        raise M3ELError("no mention has a name, a sentence or a picture: there is nothing to average")
    sums = {name: torch.stack([part.sums[name] for part in parts]).sum(0) for name in parts[0].sums}
    counts = {name: sum(part.counts[name] for part in parts) for name in parts[0].sums}
    average: dict[str, Any] = {name: (one / max(1, counts[name])).unsqueeze(0) for name, one in sums.items()}
    average |= {name: F.normalize(average[name], dim=-1) for name in ("text", "image")}
    average |= {name: value.unsqueeze(1) for name, value in average.items() if name.endswith(("_keys", "_values"))}
    average |= {f"has_{kind}": torch.tensor([counts[kind] > 0]) for kind in ("text", "image")}
    if "text_keys" in average:
        average["text_mask"] = torch.ones(1, 1, dtype=torch.bool)
    return replace(parts[0].example, **average)


class _Sums:
    """What the mentions of a batch add up to, by attribute, and over how many rows or tokens."""

    def __init__(self, encoded: Encoded) -> None:
        self.example = encoded[:1]
        chosen = {
            name: value[_present(encoded, name)]
            for name, value in encoded.tensors().items()
            if value.is_floating_point()
        }
        self.sums: dict[str, Tensor] = {name: value.sum(0) for name, value in chosen.items()}
        self.counts = {name: len(value) for name, value in chosen.items()}


def _sums(system: ModelSystem, rows: Sequence[Row], start: int) -> _Sums | None:
    batch = [rows[number] for number in range(start, min(start + BATCH_SIZE, len(rows)))]
    batch = [row for row in batch if row["mention"] or row["context"] or row["mention_image"] is not None]
    return _Sums(system.encode_mentions(batch).to("cpu")) if batch else None


def _present(mentions: Encoded, name: str) -> Tensor:
    """Which rows, or which tokens of which rows, of an attribute say something."""
    if name == "cross":
        return mentions.has_text & mentions.has_image
    present = mentions.has_text if name.startswith("text") else mentions.has_image
    if not name.endswith(("_keys", "_values")):
        return present
    values = mentions.tensors()
    shown = present.unsqueeze(1).expand(values[name].shape[:2])
    return shown & values["text_mask"] if name.startswith("text") else shown
