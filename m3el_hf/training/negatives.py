"""Hard negatives: of all training entities those that the model takes a mention for, and is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from heapq import nsmallest
from itertools import chain

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from m3el_hf.data.collator import EntityRow, LinkingCollator, Row, candidates_of
from m3el_hf.evaluation.systems import to_device
from m3el_hf.modeling.encoded_clipnd import Encoded
from m3el_hf.modeling.modeling_clipnd import ClipNDModel
from m3el_hf.modeling.offload_clipnd import home_of
from m3el_hf.training.gathering import process_count, process_index

MENTION_BLOCK, ENTITY_BLOCK = 256, 512
"""Encoded, and scored against each other, at a time."""

MENTION_COLUMNS = ["id", "mention", "context", "mention_image", "answer_qid", "candidate_qids"]

Place = tuple[int, int]
"""A row, and one of its candidates."""


class HardNegatives(Mapping[str, list[EntityRow]]):
    """For each mention, by its row's id, entities that the model scores high and that it does not mean.

    Their texts and pictures are read from the rows when they are asked for. An entity is as the first row describes it,
    and what that row lacks as the next that has it does.

    Args:
        rows: The training rows, their pictures undecoded.
    """

    def __init__(self, rows: Dataset) -> None:
        self._rows = rows
        self._qids: dict[str, list[str]] = {}

    def __getitem__(self, row_id: str) -> list[EntityRow]:
        return self._read(self._qids[row_id])

    def __iter__(self) -> Iterator[str]:
        return iter(self._qids)

    def __len__(self) -> int:
        return len(self._qids)

    def state(self) -> dict[str, list[str]]:
        """The entities' identifiers, hardest first, by the row's id; as JSON has it."""
        return self._qids

    def restore(self, state: dict[str, list[str]]) -> None:
        """Takes back what `state` gave."""
        self._qids = state
        if state:
            _ = self._places  # found now, and not once more in each worker

    @torch.no_grad()
    def mine(self, model: ClipNDModel, collator: LinkingCollator, count: int, *, progress: bool = True) -> None:
        """Looks for them with the model as it is, among all candidates of all rows.

        Each mention is scored against each entity with all that both have. Processes divide the entities; all find the
        same. Neither the weights nor the random state change.

        Args:
            model: Scores pairs.
            collator: Prepares both sides.
            count: Of each mention, at most: the gold and the mention's own candidates are left out, and entities that
                show nothing.
            progress: Show a progress bar.
        """
        training = model.training
        model.eval()
        try:
            self._qids = self._found(model, collator, count, progress)
        finally:
            model.train(training)

    def _found(self, model: ClipNDModel, collator: LinkingCollator, count: int, progress: bool) -> dict[str, list[str]]:
        device, qids = home_of(model), list(self._places)
        numbers = {qid: number for number, qid in enumerate(qids)}
        mentions, asking = self._rows.select_columns(MENTION_COLUMNS), []
        for start in range(0, len(mentions), MENTION_BLOCK):
            rows = [mentions[number] for number in range(start, min(start + MENTION_BLOCK, len(mentions)))]
            encoded = model._encode("mentions", to_device(collator.mentions(rows), device))
            asking.append(_Asking.of(rows, numbers, encoded.to("cpu")))
        starts = range(0, len(qids), ENTITY_BLOCK)[process_index() :: process_count()]
        for start in tqdm(starts, "hard negatives", unit=" blocks", disable=not progress, leave=False):
            known = self._read(qids[start : start + ENTITY_BLOCK])
            entities = model._encode("entities", to_device(collator.entities(known), device))
            for some in asking:
                some.keep(model.score(some.encoded.to(device), entities).total, start, count)
        ids = [row_id for some in asking for row_id in some.ids]
        parts = gather_object([[best for some in asking for best in some.best()]])
        merged = (nsmallest(count, chain(*of_one)) for of_one in zip(*parts, strict=True))
        return {row_id: [qids[number] for _, number in best] for row_id, best in zip(ids, merged, strict=True)}

    @cached_property
    def _places(self) -> dict[str, list[Place]]:
        """Where each entity is described: the first place, and each later one that has what those before lack."""
        columns = ["candidate_qids", "candidate_names", "candidate_descriptions", "candidate_images"]
        places: dict[str, list[Place]] = {}
        known: dict[str, tuple[bool, ...]] = {}
        first = 0
        for table in self._rows.select_columns(columns).with_format("arrow").iter(1000):
            for batch in table.to_batches():
                qids, names, descriptions, _ = (batch[column].to_pylist() for column in columns)
                pictures = iter(batch["candidate_images"].flatten().is_valid().to_pylist())
                for number, candidates in enumerate(zip(qids, names, descriptions, strict=True)):
                    for position, (qid, name, description) in enumerate(zip(*candidates, strict=True)):
                        has = bool(name), bool(description), next(pictures)
                        had = known.get(qid, (False,) * 3)
                        if qid not in known or any(new > old for new, old in zip(has, had, strict=True)):
                            places.setdefault(qid, []).append((first + number, position))
                        known[qid] = tuple(map(max, has, had))
                first += len(batch)
        return places

    def _read(self, qids: Sequence[str]) -> list[EntityRow]:
        rows = sorted({row for qid in qids for row, _ in self._places[qid]})
        shown = {row: candidates_of(self._rows[row]) for row in rows}
        return [reduce(EntityRow.filled, (shown[row][position] for row, position in self._places[qid])) for qid in qids]


@dataclass
class _Asking:
    """A block of n mentions and the k entities, of those seen, that score best.

    Attributes:
        ids: Of the mentions' rows.
        taken: ``[2, T]``, pairs of a mention and the number of its gold or of one of its candidates.
        encoded: The mentions.
        scores: ``[n, k]``, falling.
        numbers: ``[n, k]``, the entities'.
    """

    ids: list[str]
    taken: Tensor
    encoded: Encoded
    scores: Tensor
    numbers: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], numbers: Mapping[str, int], encoded: Encoded) -> _Asking:
        own = [{*row["candidate_qids"], row["answer_qid"]} & numbers.keys() for row in rows]
        pairs = [(mention, numbers[qid]) for mention, qids in enumerate(own) for qid in qids]
        return cls(
            ids=[row["id"] for row in rows],
            taken=torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T,
            encoded=encoded,
            scores=torch.empty(len(rows), 0),
            numbers=torch.empty(len(rows), 0, dtype=torch.long),
        )

    def keep(self, scores: Tensor, start: int, count: int) -> None:
        """Takes in scores ``[n, N]`` of the entities from number ``start`` on; of equal ones the lower number wins."""
        mentions, entities = self.taken - torch.tensor([[0], [start]])
        within = (entities >= 0) & (entities < scores.shape[1])
        scores[mentions[within], entities[within]] = -math.inf
        best = scores.topk(min(count, scores.shape[1])).indices.sort().values
        numbers = torch.cat([self.numbers, best.cpu() + start], 1)
        scores = torch.cat([self.scores, scores.gather(1, best).cpu()], 1)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
        self.scores, self.numbers = scores.gather(1, order), numbers.gather(1, order)

    def best(self) -> Iterable[list[tuple[float, int]]]:
        """Of each mention the falling scores, negated, and the entities' numbers."""
        for scores, numbers in zip(self.scores.tolist(), self.numbers.tolist(), strict=True):
            yield [(-score, number) for score, number in zip(scores, numbers, strict=True) if math.isfinite(score)]
