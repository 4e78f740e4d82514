"""Measures a system of your own beside the baselines: here one that counts shared words and forgets the common ones.

python examples/evaluate_your_own_system.py [FOLDER OR HUB ID OF A BUILT DATASET]
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from m3el_hf.data.collator import EntityRow
from m3el_hf.data.store import build
from m3el_hf.evaluation.baselines import baselines
from m3el_hf.evaluation.evaluator import evaluate
from m3el_hf.evaluation.measure import described
from m3el_hf.evaluation.systems import Row, Scores
from m3el_hf.sources import load_built
from m3el_hf.tasks import Task


class RareWords:
    """Scores a pair by the words that both have, each by how few descriptions have it."""

    name = "rare words"
    fingerprint = None  # what it encodes is not worth keeping on disk

    def __init__(self, entities: Sequence[EntityRow]) -> None:
        self.counts = Counter(word for entity in entities for word in self.words(entity.name, entity.description))

    def can_do(self, task: Task) -> bool:
        return task.mention.has_text and task.candidate.has_text

    def encode_mentions(self, rows: Sequence[Row]) -> np.ndarray:
        return np.array([self.words(row["mention"], row["context"]) for row in rows], dtype=object)

    def encode_entities(self, entities: Sequence[EntityRow]) -> np.ndarray:
        return np.array([self.words(entity.name, entity.description) for entity in entities], dtype=object)

    def score(self, mentions: np.ndarray, entities: np.ndarray, tasks: Sequence[Task]) -> Scores:
        scores = [[sum(1 / (1 + self.counts[word]) for word in one & other) for other in entities] for one in mentions]
        return np.array([scores] * len(tasks))

    @staticmethod
    def words(*texts: str | None) -> frozenset[str]:
        return frozenset(word for text in texts if text for word in text.lower().split())


def main(source: str | None = None) -> None:
    with TemporaryDirectory() as folder:
        if source is None:
            build("mini", None, Path(folder) / "m3el", instances=500)
        rows = load_built(source or f"{folder}/m3el", split="test")
        entities = list(described(rows))
        found = evaluate([*baselines(entities), RareWords(entities)], rows)
        for name in ("chance", "string match", "BM25", "rare words"):
            figures = found.figures(name, "t2t")
            interval = f"{figures['accuracy_low']:.3f} to {figures['accuracy_high']:.3f}"
            print(f"{name:12}  {figures['accuracy']:.3f} ({interval})  MRR {figures['mrr']:.3f}  n = {figures['n']}")
        difference = found.compare("rare words", "BM25", "t2t")
        print(f"rare words against BM25: {difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})")


if __name__ == "__main__":
    main(*sys.argv[1:2])
