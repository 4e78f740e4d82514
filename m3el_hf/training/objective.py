"""What a step minimises: the loss of one batch that all processes share, in the memory that a part of it takes.

Gradient caching (L. Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021,
arXiv 2101.06983, section 3): encode a batch part by part without a graph, take the loss back to what was encoded, then
encode each part again and take that on to the weights. The gradient is that of the whole batch, with all its negatives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from m3el_hf.modeling.encoded_clipnd import Encoded, MatchingEntities, MatchingMentions
from m3el_hf.modeling.modeling_clipnd import ClipNDModel
from m3el_hf.training.gathering import gather, gather_encoded, process_count, process_index, total

Side = Mapping[str, Any]
"""Tensors by name; None for what no row has."""


@dataclass
class TrainingBatch:
    """The B mentions of a process, the N entities that they bring along, and R rows: mentions as a task shows them.

    Attributes:
        mentions: Arguments of `ClipNDModel.encode_mentions`.
        entities: Arguments of `ClipNDModel.encode_entities`.
        entity_ids: ``[N]``, a number that stands for the entity in every process.
        labels: ``[B]``, the index of each mention's gold among the entities.
        rows: ``[R]``, the mention of each row.
        views: ``[R, 4]`` bool, what each row shows: mention text and picture, entity text and picture.
        names: The id of each mention's row in the dataset.
        candidates: How many candidates the mentions have together; many are the same entity.
    """

    mentions: Side
    entities: Side
    entity_ids: Tensor
    labels: Tensor
    rows: Tensor
    views: Tensor
    names: list[str]
    candidates: int

    def to(self, device: torch.device) -> TrainingBatch:
        """Moves all tensors."""

        def moved(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: moved(one) for name, one in value.items()}
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return TrainingBatch(**{name: moved(value) for name, value in vars(self).items()})


class Objective(nn.Module):
    """Encodes a part of a batch, or compares what was encoded: every use of a weight, as DDP and FSDP want it.

    Args:
        model: The model; adapters may have been put into it.
    """

    def __init__(self, model: ClipNDModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, mentions: Side | list[Side], entities: Side | list[Side], batch: TrainingBatch | None = None
    ) -> dict[str, dict[str, Tensor]] | dict[str, Tensor]:
        """Encodes mentions and entities, and compares them if a batch says what with what.

        Args:
            mentions: Arguments of `ClipNDModel.encode_mentions`, or a list of what this made of parts of them.
            entities: The same of the entities.
            batch: None to encode only.

        Returns:
            Without a batch what is kept of either side, by the names of `Encoded`. With one its ``loss``, of which the
            mean of all processes' gradients is that of the batch they share, and this process's share of each term.
        """
        sides = {"mentions": self._encoded("mentions", mentions), "entities": self._encoded("entities", entities)}
        if batch is None:
            return {name: side.tensors() for name, side in sides.items()}
        return self._compare(**sides, batch=batch)

    def _encoded(self, side: str, given: Side | list[Side]) -> Any:
        if isinstance(given, Mapping):
            return self.model._encode(side, given)
        kind: type[Encoded] = Encoded
        if self.model.config.head == "matching":
            kind = MatchingMentions if side == "mentions" else MatchingEntities
        return kind.join([kind(**part) for part in given])

    def _compare(self, mentions: Encoded, entities: Encoded, batch: TrainingBatch) -> dict[str, Tensor]:
        parts = gather_encoded(mentions)
        ids, golds = torch.cat(gather(batch.entity_ids)), torch.cat(gather(batch.entity_ids[batch.labels]))
        known, first = _first_of_each(ids)
        start = sum(len(part) for part in parts[: process_index()])
        _, terms = self.model.losses(
            mentions.join(parts),
            entities.join(gather_encoded(entities))[first],
            torch.searchsorted(known, golds),
            batch.rows + start,
            batch.views,
            slice(start, start + len(mentions)),
        )
        counts = {name: total(count) for name, (_, count) in terms.items()}
        shares = {name: summed / counts[name] for name, (summed, _) in terms.items() if counts[name]}
        return {"loss": self.model.weigh(shares) * process_count()} | {n: one.detach() for n, one in shares.items()}


def backward(objective: nn.Module, batch: TrainingBatch, parts: int, accelerator: Accelerator) -> dict[str, Tensor]:
    """Adds the gradient of the batch's loss to the weights.

    Args:
        objective: What `Accelerator.prepare` made of an `Objective`.
        batch: This process's share of the batch.
        parts: Into how many parts encoding is divided; more take less memory and, above 1, a third more time.
        accelerator: Scales losses and synchronises processes.

    Returns:
        What the objective returned: the loss and this process's share of each term.
    """
    batch = _without_what_no_row_shows(batch)
    if parts == 1:
        terms = objective(batch.mentions, batch.entities, batch)
        accelerator.backward(terms["loss"])
        return terms
    pieces = list(zip(_split(batch.mentions, parts), _split(batch.entities, parts), strict=True))
    states, encoded = [], []
    with torch.no_grad():
        for piece in pieces:
            states.append(_random_state())
            encoded.append({side: _leaves(tensors) for side, tensors in objective(*piece).items()})
    with accelerator.no_sync(objective):
        terms = objective([one["mentions"] for one in encoded], [one["entities"] for one in encoded], batch)
        accelerator.backward(terms["loss"])
    for number in reversed(range(parts)):  # the first part is the largest: it is not empty, and can synchronise
        with accelerator.no_sync(objective) if number else nullcontext(), _random(states[number]):
            again = objective(*pieces[number])
        pairs = [
            (again[side][name], leaf.grad) for side, leaves in encoded[number].items() for name, leaf in leaves.items()
        ]
        wanted = [(value, gradient) for value, gradient in pairs if gradient is not None and value.requires_grad]
        if wanted:
            values, gradients = zip(*wanted, strict=True)
            torch.autograd.backward(values, gradients)
    return terms


def _without_what_no_row_shows(batch: TrainingBatch) -> TrainingBatch:
    """Entities' texts or pictures are not encoded where no row of any process shows them."""
    seen = total(batch.views[:, 2:].any(0).long()) > 0
    hidden = {name: batch.entities[name] & seen[column] for column, name in enumerate(("has_text", "has_image"))}
    return TrainingBatch(**{**vars(batch), "entities": {**batch.entities, **hidden}})


def _split(side: Side, parts: int) -> Iterator[dict[str, Tensor | None]]:
    """Cuts a side into ``parts`` parts, of which the last are empty if it has too few rows."""
    columns = {name: [None] * parts if value is None else value.tensor_split(parts) for name, value in side.items()}
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: one.detach().requires_grad_(one.is_floating_point()) for name, one in tensors.items()}


def _first_of_each(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the different ids, sorted, and where each stands first."""
    known, which = torch.unique(ids, return_inverse=True)
    places = torch.arange(len(ids), device=ids.device)
    return known, torch.full_like(known, len(ids)).scatter_reduce(0, which, places, "amin")


def _random_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


@contextmanager
def _random(state: tuple[Tensor, Tensor | None]) -> Iterator[None]:
    """Draws as then, so that dropout hides the same the second time."""
    now = _random_state()
    _restore(state)
    try:
        yield
    finally:
        _restore(now)


def _restore(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
