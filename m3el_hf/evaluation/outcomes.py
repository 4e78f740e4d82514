"""What an evaluation found: of each row and task two counts, from which every figure follows."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.ranking import Difference, hits_at_k, paired_difference, reciprocal_ranks, summarise
from m3el_hf.tasks import Task, get_task

Mask = NDArray[np.bool_]
Values = NDArray[np.float64]

OUTCOMES, ROWS = "outcomes.parquet", "rows.parquet"


@dataclass(frozen=True)
class Outcome:
    """How one system ranked the golds of the rows that fit one task.

    Attributes:
        rows: ``[m]``, which rows of the evaluation these are.
        greater: ``[m]``, how many candidates scored above the gold.
        equal: ``[m]``, how many scored as it did, itself among them; 0 where it is not among the candidates.
        candidates: ``[m]``, how many candidates there were.
    """

    rows: NDArray[np.int64]
    greater: NDArray[np.int64]
    equal: NDArray[np.int64]
    candidates: NDArray[np.int64]

    def values(self, figure: str) -> Values:
        """Each row's share of a figure, ``[m]``: its ``accuracy`` or its ``mrr``."""
        if figure == "mrr":
            return reciprocal_ranks(self.greater, self.equal)
        return hits_at_k(self.greater, self.equal, 1)


COUNTS = tuple(one.name for one in fields(Outcome))


@dataclass(frozen=True)
class Evaluation:
    """All that was counted; figures of any part of the rows are made from it.

    Attributes:
        facts: One row a mention, with the columns of `m3el_hf.evaluation.facts.row_facts`.
        outcomes: By system, then by task; of tasks that a system cannot do there is none.
        tasks: The tasks that were asked for.
        protocol: What the candidates were, for tables: "candidate set of N", or "full knowledge base of N entities".
        missing: By task, how many rows do not count for it, by the reason.
    """

    facts: dict[str, NDArray[Any]]
    outcomes: dict[str, dict[str, Outcome]]
    tasks: tuple[Task, ...]
    protocol: str
    missing: dict[str, dict[str, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.facts["id"])

    @property
    def systems(self) -> list[str]:
        """The systems, in the order in which they were measured."""
        return list(self.outcomes)

    def evaluable(self, task: str) -> int:
        """How many rows fit a task."""
        return len(self) - sum(self.missing[task].values())

    def figures(self, system: str, task: str, where: Mask | None = None) -> dict[str, float] | None:
        """Accuracy with its interval, Hits@k, MRR and the rest of `summarise`; None where there are no rows.

        Args:
            system: Its name.
            task: Its name.
            where: ``[n]``, which rows count; None for all that fit.
        """
        part = self._part(system, task, where)
        if part is None:
            return None
        return summarise(part.greater, part.equal, groups=self.facts["gold"][part.rows])

    def mean(self, system: str, figure: str = "accuracy", where: Mask | None = None) -> float | None:
        """The mean over the tasks that some row fits; None where the system cannot do one of them, or none fits."""
        found = self.values(system, None, figure, where)
        return None if found is None else float(found[1].mean())

    def values(
        self, system: str, task: str | None = None, figure: str = "accuracy", where: Mask | None = None
    ) -> tuple[NDArray[np.int64], Values] | None:
        """The rows that count, and each one's value of a figure, which is the mean of these.

        Of the mean over tasks, a row's value is that mean and what the row adds to it: by how much it is above or below
        each of its tasks' means, over the number of tasks and the share of the rows that fit the task (the influence
        function of a mean of ratios). Intervals and paired differences of the mean are those of these values.

        Args:
            system: The system.
            task: The task; None for the mean over the tasks that some row fits.
            figure: ``"accuracy"`` or ``"mrr"``.
            where: ``[n]``, which rows count; None for all that fit.

        Returns:
            Rows ``[m]`` and values ``[m]``; None where there are no rows, or the system cannot do a task.
        """
        if task is not None:
            part = self._part(system, task, where)
            return None if part is None else (part.rows, part.values(figure))
        means, added, count = [], np.zeros(len(self)), np.zeros(len(self), bool)
        fitting = [task.name for task in self.tasks if self._fits(task.name, where)]
        for task in fitting:
            part = self._part(system, task, where)
            if part is None:
                return None
            values = part.values(figure)
            means.append(values.mean())
            added[part.rows] += (values - values.mean()) / (len(fitting) * len(part.rows))
            count[part.rows] = True
        rows = np.flatnonzero(count)
        return (rows, np.mean(means) + added[rows] * len(rows)) if len(rows) else None

    def compare(self, one: str, other: str, task: str | None = None, figure: str = "accuracy") -> Difference | None:
        """By how much one system is better than another on the same rows; None without rows or where one cannot do it.

        Args:
            one: The system.
            other: The one it is compared with.
            task: The task; None for the mean over tasks.
            figure: ``"accuracy"`` or ``"mrr"``.
        """
        mine, theirs = (self.values(system, task, figure) for system in (one, other))
        if mine is None or theirs is None:
            return None
        return paired_difference(mine[1], theirs[1], self.facts["gold"][mine[0]])

    def deleaked(self, task: str, near: bool = False) -> Mask:
        """Which rows do not give the gold away by the mention's picture being the gold's own, ``[n]``.

        Among candidates these are the rows that count in data built with the protocol ``deleaked``; in a whole
        knowledge base a row without its picture still counts there, where it has text.

        Args:
            task: The task: where it shows no picture of the mention, nothing is given away.
            near: Whether near-same pictures count as the gold's own too.
        """
        leaks = self.facts["own_picture"] | self.facts["like_picture"] if near else self.facts["own_picture"]
        return ~(leaks & get_task(task).mention.has_image)

    def _fits(self, task: str, where: Mask | None) -> bool:
        if where is None:
            return self.evaluable(task) > 0
        return any(self._part(system, task, where) is not None for system in self.systems)

    def _part(self, system: str, task: str, where: Mask | None) -> Outcome | None:
        """The outcome of some rows, or None where there are none."""
        if system not in self.outcomes or task not in self.missing:
            raise M3ELError(
                f"{system} was not measured on {task}: there are the systems {', '.join(self.outcomes)} and the tasks "
                f"{', '.join(self.missing)}"
            )
        outcome = self.outcomes[system].get(task)
        if outcome is None:
            return None
        chosen = slice(None) if where is None else where[outcome.rows]
        columns = (outcome.rows, outcome.greater, outcome.equal, outcome.candidates)
        part = Outcome(*(column[chosen] for column in columns))
        return part if len(part.rows) else None

    def save(self, folder: Path) -> None:
        """Writes ``rows.parquet``, the facts, and ``outcomes.parquet``: from these any other figure can be made."""
        schema = pa.schema(dict.fromkeys(("system", "task"), pa.string()) | dict.fromkeys(COUNTS, pa.int64()))
        parts = [
            pa.table({"system": [system] * len(one.rows), "task": [task] * len(one.rows)} | vars(one), schema)
            for system, by_task in self.outcomes.items()
            for task, one in by_task.items()
        ]
        about = {
            "protocol": self.protocol,
            "tasks": [task.name for task in self.tasks],
            "systems": {system: list(by_task) for system, by_task in self.outcomes.items()},
            "missing": self.missing,
        }
        table = pa.concat_tables([schema.empty_table(), *parts])
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OUTCOMES).unlink(missing_ok=True)
        pq.write_table(pa.table({name: values.tolist() for name, values in self.facts.items()}), folder / ROWS)
        partial = folder / f"{OUTCOMES}.partial"
        pq.write_table(table.replace_schema_metadata({"evaluation": json.dumps(about)}), partial)
        partial.replace(folder / OUTCOMES)  # last: it says that all is there

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            M3ELError: If it is not there.
        """
        if not (folder / OUTCOMES).is_file():
            raise M3ELError(f"{folder} holds no {OUTCOMES}: pass a folder that m3el-hf evaluate wrote")
        table = pq.read_table(folder / OUTCOMES)
        about = json.loads(table.schema.metadata[b"evaluation"])
        columns = {name: table[name].to_numpy() for name in COUNTS}
        keys = list(zip(table["system"].to_pylist(), table["task"].to_pylist(), strict=True))
        places: dict[tuple[str, str], list[int]] = {}
        for place, key in enumerate(keys):
            places.setdefault(key, []).append(place)
        outcomes = {
            system: {
                task: Outcome(**{name: values[places.get((system, task), [])] for name, values in columns.items()})
                for task in names
            }
            for system, names in about["systems"].items()
        }
        rows = pq.read_table(folder / ROWS)
        facts = {name: np.array(rows[name].to_pylist()) for name in rows.column_names}
        return cls(facts, outcomes, tuple(map(get_task, about["tasks"])), about["protocol"], about["missing"])
