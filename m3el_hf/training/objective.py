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
import torch.nn.functional as F  # noqa: N812
from accelerate import Accelerator
from torch import Tensor, nn

from m3el_hf.modeling.encoded_clipnd import Encoded, MatchingEntities, MatchingMentions
from m3el_hf.modeling.losses_clipnd import loss_terms, seen_of_mentions, weigh
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
        wanted: ``[N, 2]`` bool, whether some row that brings an entity along shows its text, and its picture. The
            others do without what is not encoded for it.
        names: The id of each mention's row in the dataset.
        candidates: How many candidates the mentions have together; many are the same entity.
    """

    mentions: Side
    entities: Side
    entity_ids: Tensor
    labels: Tensor
    rows: Tensor
    views: Tensor
    wanted: Tensor
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
        every_tower: Run both towers for each part, whatever it holds. Where weights are divided among processes, all
            must ask for the same weights in the same order.
    """

    _no_split_modules = ["CLIPEncoderLayer"]  # noqa: RUF012 (accelerate reads it, to divide layer by layer)

    def __init__(self, model: ClipNDModel, *, every_tower: bool = False) -> None:
        super().__init__()
        self.model, self.every_tower = model, every_tower

    def forward(
        self, mentions: Side | list[Side], entities: Side | list[Side], batch: TrainingBatch | None = None
    ) -> dict[str, dict[str, Tensor]] | dict[str, Tensor]:
        """Encodes mentions and entities, and compares them if a batch says what with what.

        Args:
            mentions: Arguments of `ClipNDModel.encode_mentions`, or a list of what this made of parts of them.
            entities: The same of the entities.
            batch: None to encode only.

        Returns:
            Without a batch what is kept of either side, by the names of `Encoded`. With one, this process's share of
            its ``loss`` and of each term, ``loss/NAME``; and ``backward``, of whose gradients the processes' mean is
            that of the batch they share.
        """
        sides = {"mentions": self._encoded("mentions", mentions), "entities": self._encoded("entities", entities)}
        if batch is None:
            kept = {name: side.tensors() for name, side in sides.items()}
            kept["mentions"]["text"] = kept["mentions"]["text"] + self._nothing()
            return kept
        return self._compare(**sides, batch=batch)

    def _nothing(self) -> Tensor:
        """Zero, with a gradient for weights that what a process's rows show may leave without one.

        DDP waits for some weight's, FSDP for all outside the layers that it divides by themselves.
        """
        if self.every_tower:
            weights = [one for name, one in self.named_parameters() if ".layers." not in name and one.requires_grad]
        else:
            weights = [min((one for one in self.parameters() if one.requires_grad), key=Tensor.numel)]
        return torch.stack([one.flatten()[:0].sum() for one in weights]).sum()

    def _encoded(self, side: str, given: Side | list[Side]) -> Any:
        if isinstance(given, Mapping):
            if self.every_tower:
                rows = torch.arange(len(given["has_text"]), device=given["has_text"].device)
                return self.model._encode(side, self._with_blank(given))[rows]  # a copy: FSDP wants no views
            return self.model._encode(side, given)
        kind: type[Encoded] = Encoded
        if self.model.config.head == "matching":
            kind = MatchingMentions if side == "mentions" else MatchingEntities
        return kind.join([kind(**part) for part in given])

    def _with_blank(self, side: Side) -> dict[str, Tensor]:
        """Adds a row that has a text and a picture."""
        config: Any = self.model.config.clip_config
        vision = config.vision_config
        has_text = side["has_text"]
        tokens = has_text.new_zeros(len(has_text), 1, dtype=torch.long)
        pixels = has_text.new_zeros(len(has_text), vision.num_channels, vision.image_size, vision.image_size)
        empty = {"input_ids": tokens, "attention_mask": tokens, "pixel_values": pixels.float()}
        fills = {name: 1 for name in side} | {"input_ids": config.text_config.eos_token_id, "pixel_values": 0}
        filled = {name: empty[name] if value is None else value for name, value in side.items()}
        return {
            name: F.pad(value, [0, 0] * (value.ndim - 1) + [0, 1], value=fills[name]) for name, value in filled.items()
        }

    def _compare(self, mentions: Encoded, entities: Encoded, batch: TrainingBatch) -> dict[str, Tensor]:
        asking, asked = gather_encoded(mentions, entities)
        mine = seen_of_mentions(batch.rows, batch.views, len(mentions))
        told = gather([batch.entity_ids, batch.entity_ids[batch.labels], mine])
        ids, golds, seen = (torch.cat(parts) for parts in zip(*told, strict=True))
        known, first = _first_of_each(ids)
        start = sum(len(part) for part in asking[: process_index()])
        every = mentions.join(asking)
        _, terms = loss_terms(
            self.model,
            every,
            entities.join(asked)[first],
            torch.searchsorted(known, golds),
            batch.rows + start,
            batch.views,
            slice(start, start + len(mentions)),
            seen,
        )
        counts = {name: total(count) for name, (_, count) in terms.items()}
        shares = {n: summed / counts[n].clamp(min=1) for n, (summed, _) in terms.items() if counts[n] or n == "total"}
        share = weigh(shares, self.model.config)
        zero = every.text[:0].sum() + self._nothing()  # the backward of what was gathered runs in every process
        named = {f"loss/{name}": one.detach() for name, one in shares.items()}
        return {"backward": share * process_count() + zero, "loss": share.detach()} | named


def backward(objective: nn.Module, batch: TrainingBatch, parts: int, accelerator: Accelerator) -> dict[str, Tensor]:
    """Adds the gradient of the batch's loss to the weights.

    Args:
        objective: What `Accelerator.prepare` made of an `Objective`.
        batch: This process's share of the batch.
        parts: Into how many parts encoding is divided; more take less memory and, above 1, a third more time.
        accelerator: Scales losses and synchronises processes.

    Returns:
        This process's share of the ``loss`` and of each term, ``loss/NAME``.
    """
    batch = leave_out_unwanted(batch)
    if parts == 1:
        terms = objective(batch.mentions, batch.entities, batch)
        accelerator.backward(terms.pop("backward"))
    else:
        terms = _backward_in_parts(objective, batch, parts, accelerator)
    for weight in objective.parameters():
        if weight.requires_grad and weight.grad is None:  # what no process used is 0 for one, and for many, processes
            weight.grad = torch.zeros_like(weight)
    return terms


def _backward_in_parts(
    objective: nn.Module, batch: TrainingBatch, parts: int, accelerator: Accelerator
) -> dict[str, Tensor]:
    pieces = list(zip(_split(batch.mentions, parts), _split(batch.entities, parts), strict=True))
    states, encoded = [], []
    with torch.no_grad():
        for piece in pieces:
            states.append(_random_state())
            encoded.append({side: _leaves(tensors) for side, tensors in objective(*piece).items()})
    with accelerator.no_sync(objective):
        terms = objective([one["mentions"] for one in encoded], [one["entities"] for one in encoded], batch)
        accelerator.backward(terms.pop("backward"))
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


def leave_out_unwanted(batch: TrainingBatch) -> TrainingBatch:
    """Leaves out the texts and pictures of entities that no row, of any process, which brings them along shows."""
    told = gather([batch.entity_ids, batch.wanted])
    ids, wanted = (torch.cat(parts) for parts in zip(*told, strict=True))
    known, which = torch.unique(ids, return_inverse=True)
    times = torch.zeros(len(known), 2, dtype=torch.long, device=ids.device).index_add_(0, which, wanted.long())
    mine = times[torch.searchsorted(known, batch.entity_ids)] > 0
    shown = {name: batch.entities[name] & mine[:, column] for column, name in enumerate(("has_text", "has_image"))}
    return TrainingBatch(**{**vars(batch), "entities": {**batch.entities, **shown}})


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
