"""What is known of each row beside its scores, by which figures are told apart: topic, gold, leak, familiarity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.systems import Row
from m3el_hf.tasks import Task

SEEN = ("as a gold", "as a distractor only", "never")
"""How training may have met a row's gold."""


@dataclass(frozen=True)
class Familiar:
    """The entities that training has met.

    Attributes:
        golds: In how many training rows each is the gold.
        candidates: In how many it is a candidate, gold or not.
    """

    golds: Counter[str] = field(default_factory=Counter)
    candidates: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, rows: Dataset) -> Familiar:
        """Counts the entities of training rows; where these have no candidates, the golds alone are met."""
        golds = Counter(rows["answer_qid"])
        if "candidate_qids" not in rows.column_names:
            return cls(golds, golds)
        return cls(golds, Counter(qid for qids in rows["candidate_qids"] for qid in set(qids)))

    def seen(self, qid: str) -> str:
        """One of `SEEN`."""
        return SEEN[0] if qid in self.golds else SEEN[1] if qid in self.candidates else SEEN[2]


def row_facts(rows: Sequence[Row], familiar: Familiar | None) -> dict[str, NDArray[Any]]:
    """Returns the columns ``[n]`` of an `Evaluation`'s facts.

    ``id``, ``topic`` and ``gold`` (a Qid), as the rows have them, an unknown topic being empty; ``own_picture``: the
    mention's picture is the gold's own; and, empty and -1 where training rows are not known, how training has met the
    gold (``seen``), in how many rows as the gold (``train_golds``), and in how many at all (``train_rows``).

    Raises:
        M3ELError: If two rows have the same id, which would be counted twice.
    """
    ids = [row["id"] for row in rows]
    if len(set(ids)) < len(ids):
        [(double, times)] = Counter(ids).most_common(1)
        raise M3ELError(f"{times} rows have the id {double}: each would be counted, so leave all but one out")
    golds = [row["answer_qid"] for row in rows]
    known = familiar or Familiar()
    return {
        "id": np.array(ids),
        "topic": np.array([row.get("topic") or "" for row in rows]),
        "gold": np.array(golds),
        "own_picture": np.array([bool(row.get("mention_image_is_gold")) for row in rows]),
        "seen": np.array([known.seen(gold) if familiar else "" for gold in golds]),
        "train_golds": np.array([known.golds[gold] if familiar else -1 for gold in golds]),
        "train_rows": np.array([known.candidates[gold] if familiar else -1 for gold in golds]),
    }


def why_not(row: Row, task: Task) -> str | None:
    """Returns what a row lacks that the task shows, None where it lacks nothing: the row then fits the task."""
    if not row["candidate_names"]:
        return "no candidates"
    if task.fits(row):
        return None
    if task.mention.has_text and not row["mention"]:
        return "no mention text"
    if task.mention.has_image and row["mention_image"] is None:
        return "no mention picture"
    if task.candidate.has_text and not all(row["candidate_names"]):
        return "a candidate without a name"
    return "a candidate without a picture"
