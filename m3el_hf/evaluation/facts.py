"""What is known of each row beside its scores, by which figures are told apart: topic, gold, leak, familiarity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from m3el_hf.data.perceptual import NEAR_SAME, perceptual_hash
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.systems import Row
from m3el_hf.modeling.decoding_clipnd import decode_image
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
    mention's picture is the gold's own, byte for byte; ``like_picture``: it is near-same, which is False until
    `near_same_pictures` has looked; and, empty and -1 where training rows are not known, how training has met the gold
    (``seen``), in how many rows as the gold (``train_golds``), and in how many at all (``train_rows``).

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
        "like_picture": np.zeros(len(rows), bool),
        "seen": np.array([known.seen(gold) if familiar else "" for gold in golds]),
        "train_golds": np.array([known.golds[gold] if familiar else -1 for gold in golds]),
        "train_rows": np.array([known.candidates[gold] if familiar else -1 for gold in golds]),
    }


def near_same_pictures(rows: Sequence[Row]) -> NDArray[np.bool_]:
    """Returns which rows' mention shows a picture near-same to the gold's, ``[n]``: by the perceptual hash of an audit.

    The hash sees no colour, so that drawings which differ in that alone count too.

    Args:
        rows: Rows of `m3el_hf.data.schema.ROW_FEATURES`, pictures as bytes.
    """
    near = np.zeros(len(rows), bool)
    for number, row in enumerate(rows):
        images = [row["mention_image"], *(row["candidate_images"][place] for place in [row["answer"]] if place >= 0)]
        hashes = [_hash(image["bytes"]) for image in images if image is not None]
        if len(hashes) == 2 and hashes[0] is not None and hashes[1] is not None:
            near[number] = (hashes[0] ^ hashes[1]).bit_count() <= NEAR_SAME
    return near


@lru_cache(maxsize=4096)  # a gold comes back in several rows
def _hash(data: bytes) -> int | None:
    return perceptual_hash(decode_image(data))


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
