"""Systems without a model, which stand in every table: chance, string match, image hash.

Each is a `m3el_hf.evaluation.evaluator.System`: it scores the candidates of every row for every task that it can do.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m3el_hf.evaluation.evaluator import Row, Scores
from m3el_hf.modeling.decoding_clipnd import decode_image
from m3el_hf.tasks import Task


class _RowSystem(ABC):
    """Scores row by row, without a model."""

    def scores(self, rows: Sequence[Row], tasks: Sequence[Task]) -> dict[str, list[Scores | None]]:
        """Scores each row's candidates for each task; None where the row does not fit the task."""
        return {task.name: [self.score(row, task) if task.fits(row) else None for row in rows] for task in tasks}

    @abstractmethod
    def score(self, row: Row, task: Task) -> Scores:
        """Scores the candidates ``[C]`` of a row that fits the task."""


class Chance(_RowSystem):
    """Scores all candidates alike; ties count as chance."""

    name = "chance"

    def can_do(self, task: Task) -> bool:
        """Every task."""
        return True

    def score(self, row: Row, task: Task) -> Scores:
        """Returns zeros ``[C]``."""
        return np.zeros(len(row["candidate_names"]))


class StringMatch(_RowSystem):
    """Token overlap of the mention's name and context with the candidate's name and description (Dice coefficient)."""

    name = "string match"

    def can_do(self, task: Task) -> bool:
        """Tasks with text on both sides."""
        return task.mention.has_text and task.candidate.has_text

    def score(self, row: Row, task: Task) -> Scores:
        """Returns the overlaps ``[C]``."""
        mention = _tokens(row["mention"], row["context"])
        candidates = zip(row["candidate_names"], row["candidate_descriptions"], strict=True)
        return np.array([_dice(mention, _tokens(*candidate)) for candidate in candidates])


class ImageHash(_RowSystem):
    """Cosine of 8 x 8 colour thumbnails, each centred on its mean."""

    name = "image hash"

    def can_do(self, task: Task) -> bool:
        """Tasks with pictures on both sides."""
        return task.mention.has_image and task.candidate.has_image

    def score(self, row: Row, task: Task) -> Scores:
        """Returns the cosines ``[C]``."""
        mention = _thumbnail(row["mention_image"]["bytes"])
        return np.array([float(mention @ _thumbnail(image["bytes"])) for image in row["candidate_images"]])


BASELINES = (Chance(), StringMatch(), ImageHash())


def _tokens(*texts: str | None) -> set[str]:
    return {token for text in texts if text for token in re.findall(r"\w+", text.lower())}


def _dice(one: set[str], other: set[str]) -> float:
    return 2 * len(one & other) / max(1, len(one) + len(other))


@lru_cache(maxsize=4096)  # each picture comes back in four tasks and in several rows
def _thumbnail(data: bytes) -> NDArray[np.float64]:
    """The unit vector of an encoded picture; zeros for a picture of one colour."""
    picture = decode_image(data).resize((8, 8), Image.Resampling.BOX)
    values = np.asarray(picture, dtype=np.float64).ravel()
    values -= values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-12)
