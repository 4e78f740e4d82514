"""What can be measured: anything that encodes mentions and entities, and scores them against one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from m3el_hf.data.collator import EntityRow
from m3el_hf.tasks import Task

Row = Mapping[str, Any]
Scores = NDArray[np.float64]


class System(Protocol):
    """A baseline, a model, a control.

    Both protocols ask it the same way: mentions and entities are encoded once, and any of them are scored against any.
    What is encoded has a length and is indexed by an array of rows, as NumPy's and SciPy's arrays and `Encoded` are.

    Attributes:
        name: Its name in every table.
    """

    name: str

    def can_do(self, task: Task) -> bool:
        """Whether the system has a say on the task at all."""
        ...

    def encode_mentions(self, rows: Sequence[Row]) -> Any:
        """Encodes B mentions; each has a name, a sentence or a picture (as bytes)."""
        ...

    def encode_entities(self, entities: Sequence[EntityRow]) -> Any:
        """Encodes N entities; each has a name, a description or a picture (as bytes)."""
        ...

    def score(self, mentions: Any, entities: Any, task: Task) -> Scores:
        """Scores ``[B, N]`` by what the task shows of both sides; higher is better, and no score is NaN or +inf.

        Of a mention or an entity that lacks what the task shows, the scores may be any: whoever asks masks them.
        """
        ...
