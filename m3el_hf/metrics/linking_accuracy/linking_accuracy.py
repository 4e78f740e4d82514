"""Accuracy, hits@k and MRR of entity linking, as an `evaluate` module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.ranking import KS, Counts, gold_counts, summarise

_DESCRIPTION = """Accuracy of entity linking: the share of mentions whose gold entity comes first.
Of scores, a tie counts by its probability, so scoring all candidates alike gives chance."""

_INPUTS = """
Args:
    scores: One score a candidate for each mention; the numbers of candidates may differ.
    candidate_counts: With the config "padded" alone: how many of each mention's scores are those of candidates; the
        rest is padding.
    predictions: With the config "ranked", instead of scores: each mention's entity ids, best first, or its one id.
    references: The index of each mention's gold among its candidates, -1 where it is not among them; with the config
        "ranked" its id.
    ks: The k of hits@k; 1, 3, 5, 10 and 20 by default.
    ties: "expected" (by default), "optimistic" or "pessimistic": what a gold gets that ties with others.

Returns:
    accuracy, accuracy_low and accuracy_high (95 % bootstrap interval), hits@k, mrr, mean_rank and median_rank (of the
    mentions whose gold is among the candidates), tie_share (mentions whose first place the gold shares), misses
    (mentions whose gold is not among the candidates), ceiling (the share of the others), n.

Example:
    >>> metric = evaluate.load("linking_accuracy")
    >>> metric.compute(scores=[[0.9, 0.1, 0.2], [0.5, 0.5]], references=[0, 1])["accuracy"]
    0.75
    >>> metric = evaluate.load("linking_accuracy", "ranked")
    >>> metric.compute(predictions=[["Q1", "Q2"], ["Q3"]], references=["Q2", "Q9"])["mrr"]
    0.25
"""

_CITATION = """M3EL, the dataset: arXiv 2410.18096."""

_SCORES, _INDEX, _ID = datasets.List(datasets.Value("float64")), datasets.Value("int64"), datasets.Value("string")
_CONFIGS = {
    "default": {"scores": _SCORES, "references": _INDEX},
    "padded": {"scores": _SCORES, "candidate_counts": _INDEX, "references": _INDEX},
    "ranked": {"predictions": datasets.List(_ID), "references": _ID},
}


class LinkingAccuracy(evaluate.Metric):
    """A thin wrapper of `m3el_hf.evaluation.ranking`.

    Rows are checked when they are added, so that a mistake is told where it was made and leaves nothing half added.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in _CONFIGS:
            raise M3ELError(f"there is no config {self.config_name!r}: choose {', '.join(_CONFIGS)}")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            inputs_description=_INPUTS,
            citation=_CITATION,
            features=datasets.Features(_CONFIGS[self.config_name]),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **others: Any) -> None:
        """Adds rows.

        Raises:
            M3ELError: If a row has no rank; its number counts from the first of these rows.
        """
        super().add_batch(**self._checked({"predictions": predictions, "references": references, **others}))

    def add(self, *, prediction: Any = None, reference: Any = None, **others: Any) -> None:
        """Adds one row, the inputs named as in `add_batch`, or ``prediction`` and ``reference``.

        Raises:
            M3ELError: If the row has no rank.
        """
        row = {"predictions": prediction, "references": reference, **others}
        batch = self._checked({name: None if value is None else [value] for name, value in row.items()})
        super().add(**{name: values[0] for name, values in batch.items()})

    def _checked(self, inputs: dict[str, Any]) -> dict[str, Any]:
        names = self._feature_names()
        missing = [name for name in names if inputs.get(name) is None]
        unknown = [name for name, values in inputs.items() if name not in names and values is not None]
        if missing or unknown:
            wrong = f"{' and '.join(missing)} missing" if missing else f"{' and '.join(unknown)} not known"
            raise M3ELError(f"{wrong}: the config {self.config_name!r} takes {', '.join(names)}")
        batch = {name: inputs[name] for name in names}
        lengths = {name: len(values) for name, values in batch.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{count} {name}" for name, count in lengths.items())
            raise M3ELError(f"inputs of different lengths ({found}): pass one of each a mention")
        if self.config_name == "ranked":
            batch = {
                "predictions": [_ids(row, one) for row, one in enumerate(batch["predictions"])],
                "references": [_id(row, one) for row, one in enumerate(batch["references"])],
            }
        _counts(**batch)
        return batch

    def _compute(
        self,
        *,
        references: Any,
        scores: Any = None,
        candidate_counts: Any = None,
        predictions: Any = None,
        ks: Sequence[int] = KS,
        ties: str = "expected",
    ) -> dict[str, float]:
        return summarise(*_counts(references, scores, candidate_counts, predictions), ks=ks, ties=ties)


def _counts(
    references: Any, scores: Any = None, candidate_counts: Any = None, predictions: Any = None
) -> tuple[Counts, Counts]:
    """How many candidates come before each row's gold, and how many with it."""
    if predictions is not None:
        return _ranked_counts(predictions, references)
    return gold_counts(scores if candidate_counts is None else _unpadded(scores, candidate_counts), references)


def _ranked_counts(predictions: Sequence[list[str]], references: Sequence[str]) -> tuple[Counts, Counts]:
    greater, equal = np.zeros(len(predictions), np.int64), np.zeros(len(predictions), np.int64)
    for row, (ranked, gold) in enumerate(zip(predictions, references, strict=True)):
        if len(set(ranked)) < len(ranked):
            twice = next(one for place, one in enumerate(ranked) if one in ranked[:place])
            raise M3ELError(f"row {row} ranks {twice} twice: an entity has one rank")
        equal[row] = gold in ranked
        greater[row] = ranked.index(gold) if equal[row] else len(ranked)
    return greater, equal


def _unpadded(scores: Sequence[Sequence[float]], candidate_counts: Any) -> list[Sequence[float]]:
    """Each row's scores of candidates."""
    counts = np.asarray(candidate_counts)
    if counts.ndim != 1 or (counts.size and counts.dtype.kind not in "iu"):
        raise M3ELError("candidate counts must be whole numbers, one a mention")
    for row, (one, count) in enumerate(zip(scores, counts, strict=True)):
        if not 0 <= count <= len(one):
            raise M3ELError(f"row {row} has candidate count {count}, but {len(one)} scores: count those of candidates")
    return [one[:count] for one, count in zip(scores, counts, strict=True)]


def _ids(row: int, ranked: Any) -> list[str]:
    """A row's ranked ids, of a list of them or of one."""
    single = isinstance(ranked, str) or not isinstance(ranked, Iterable)
    ids = [ranked] if single else list(ranked)
    if ranked is None or not ids:
        raise M3ELError(f"row {row} has no prediction: pass at least one id")
    return [_id(row, one) for one in ids]


def _id(row: int, value: Any) -> str:
    if not isinstance(value, (str, int, np.integer)) or isinstance(value, bool):
        raise M3ELError(f"row {row} has {value!r} for an id: ids are texts or whole numbers")
    return str(value)
