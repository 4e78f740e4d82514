"""Accuracy and MRR of entity linking among candidates, as an `evaluate` module."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from m3el_hf.evaluation.ranking import gold_counts, summarise

_DESCRIPTION = """Accuracy of entity linking among candidates: the share of mentions whose gold scores highest.
A tie counts by its probability, so scoring all candidates alike gives chance."""

_INPUTS = """
Args:
    scores: One score a candidate for each mention; the numbers of candidates may differ.
    references: The index of each mention's gold among its candidates.

Returns:
    accuracy, accuracy_low and accuracy_high (95 % bootstrap interval), mrr, tie_share (rows whose first place is
    tied), n.

Example:
    >>> metric = evaluate.load("linking_accuracy")
    >>> metric.compute(scores=[[0.9, 0.1, 0.2], [0.5, 0.5]], references=[0, 1])["accuracy"]
    0.75
"""

_CITATION = """M3EL, the dataset: arXiv 2410.18096."""


class LinkingAccuracy(evaluate.Metric):
    """A thin wrapper of `m3el_hf.evaluation.ranking.summarise`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            inputs_description=_INPUTS,
            citation=_CITATION,
            features=datasets.Features(
                {"scores": datasets.List(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, scores: list[list[float]], references: list[int]) -> dict[str, Any]:
        return summarise(*gold_counts(scores, references))
