"""Measures systems on the nine tasks, among each mention's own candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from datasets import Dataset
from numpy.typing import NDArray
from tqdm import tqdm

from m3el_hf.data.collator import EntityRow, candidates_of, undecoded
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.chunks import CHUNK, Chunks, EncodedStore, entity_key
from m3el_hf.evaluation.facts import Familiar, row_facts, why_not
from m3el_hf.evaluation.outcomes import Evaluation, Outcome
from m3el_hf.evaluation.ranking import gold_counts
from m3el_hf.evaluation.sharing import Share
from m3el_hf.evaluation.systems import Row, Scores, System
from m3el_hf.tasks import TASKS, Task

BATCH_SIZE = 64
"""Mentions that are encoded at once."""

GROUP_SIZE = 16
"""Mentions that are scored at once, against all candidates of any of them."""


def evaluate(
    systems: Sequence[System],
    rows: Dataset | Sequence[Row],
    tasks: Sequence[Task] = tuple(TASKS.values()),
    *,
    change: Callable[[Row], Row] | None = None,
    training: Dataset | None = None,
    cache_dir: Path | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measures every system on every task.

    A row counts for a task if it has everything that the task shows (`Task.fits`); how many do not, and why, is kept.
    Each mention and each entity is encoded once for all tasks.

    Args:
        systems: With names that differ.
        rows: Rows of `m3el_hf.data.schema.ROW_FEATURES`; a sequence has its pictures as bytes.
        tasks: The tasks; all nine by default.
        change: What is done to a row before systems see it, such as a condition of `m3el_hf.experiments`. Whether a row
            fits a task is asked of it as it was; what then shows nothing of a task is scored as all alike.
        training: The rows that the systems were trained on, to tell golds that are known from others; None where
            nobody knows them.
        cache_dir: Where encoded entities are kept for the next time; None to keep none.
        accelerator: Of several processes, which all call this and divide the work; each gets the whole result, the
            same as one process by itself.
        progress: Show a progress bar.

    Raises:
        M3ELError: If there are no rows, two have the same id, an answer is not the place of its gold, two systems
            have the same name, or a score is NaN or +inf.
    """
    if isinstance(rows, Mapping):
        raise M3ELError(f"rows of one split are measured: pass one of {', '.join(rows)}")
    share = Share(accelerator)
    asked = _Asked(undecoded(rows) if isinstance(rows, Dataset) else rows, tasks, change)
    check_names(systems)
    with share.folder(cache_dir) as folder:
        chunks = Chunks(asked.read, asked.chunk_count, EncodedStore(folder))
        found = _Measuring(able_of(systems, tasks), asked, chunks).run(share, progress)
    facts = row_facts(asked.facts, Familiar.of(training) if training is not None else None)
    outcomes = {
        system.name: {task.name: joined(found, (system.name, task.name)) for task in tasks if system.can_do(task)}
        for system in systems
    }
    return Evaluation(facts, outcomes, tuple(tasks), asked.protocol, asked.missing)


def score_candidates(
    system: System, rows: Sequence[Row], tasks: Sequence[Task] = tuple(TASKS.values())
) -> dict[str, list[Scores | None]]:
    """Scores ``[C]`` each row's candidates, in its order, by task; None where a row does not fit the task.

    Args:
        system: The system.
        rows: Rows of `m3el_hf.data.schema.ROW_FEATURES`, pictures as bytes.
        tasks: Tasks that the system can do.
    """
    asked = _Asked(rows, tasks)
    found: dict[str, list[Scores | None]] = {task.name: [None] * len(rows) for task in tasks}
    with Share(None).folder(None) as folder:
        measuring = _Measuring([system], asked, Chunks(asked.read, asked.chunk_count, EncodedStore(folder)))
        for batch in asked.batches():
            scores, mask = measuring.scores(system, None, batch, [rows[number] for number in batch], list(found))
            for (task, of_rows), totals in zip(found.items(), scores, strict=True):
                for number, own, real in zip(batch, totals, mask, strict=True):
                    of_rows[number] = own[real] if asked.fitting[task][number] else None
    return found


def check_names(systems: Sequence[System]) -> None:
    """Refuses systems that a table could not tell apart."""
    names = [system.name for system in systems]
    if not names:
        raise M3ELError("no systems to measure: pass at least one")
    if len(set(names)) < len(names):
        raise M3ELError(f"two systems have the same name: {', '.join(names)}; give each its own")


def able_of(systems: Sequence[System], tasks: Sequence[Task]) -> list[System]:
    """Returns the systems that can do some task: the others need encode nothing."""
    return [system for system in systems if any(map(system.can_do, tasks))]


FACTS = ("id", "topic", "answer_qid", "mention_image_is_gold")


class _Asked:
    """What is asked of each row: the tasks that it fits, and where its candidates stand among all that differ."""

    def __init__(self, rows: Sequence[Row], tasks: Sequence[Task], change: Callable[[Row], Row] | None = None) -> None:
        if not len(rows):
            raise M3ELError("no rows to evaluate: choose a split that has some")
        self._rows, self._change = rows, change
        self.facts: list[dict[str, Any]] = []
        self.fitting: dict[str, NDArray[np.bool_]] = {task.name: np.zeros(len(rows), bool) for task in tasks}
        self.missing: dict[str, dict[str, int]] = {task.name: Counter() for task in tasks}
        self.positions: list[NDArray[np.int64]] = []  # of each row's candidates; empty where it fits no task
        self.answers: list[int] = []
        self._places: list[tuple[int, int]] = []  # row and candidate where each entity stands first
        known: dict[bytes, int] = {}
        for number, row in enumerate(rows):
            self.facts.append({name: row.get(name) for name in FACTS})
            self.answers.append(_answer(row))
            for task in tasks:
                reason = why_not(row, task)
                self.fitting[task.name][number] = reason is None
                if reason is not None:
                    self.missing[task.name][reason] += 1
            if any(fits[number] for fits in self.fitting.values()):
                shown = row if change is None else change(row)
                self.positions.append(self._positions(number, candidates_of(shown), known))
            else:
                self.positions.append(np.zeros(0, np.int64))
        self.missing = {task: dict(reasons) for task, reasons in self.missing.items()}

    def _positions(self, number: int, candidates: list[EntityRow], known: dict[bytes, int]) -> NDArray[np.int64]:
        """Where a row's candidates stand; each description of an entity stands for itself."""
        positions = []
        for place, entity in enumerate(candidates):
            position = known.setdefault(entity_key(entity), len(known))
            if position == len(self._places):
                self._places.append((number, place))
            positions.append(position)
        return np.array(positions)

    @property
    def protocol(self) -> str:
        """Among how many candidates golds are sought."""
        counts = [len(positions) for positions in self.positions if len(positions)]
        few, many = min(counts, default=0), max(counts, default=0)
        return f"candidate set of {many}" if few == many else f"candidate sets of {few} to {many}"

    def row(self, number: int) -> Row:
        """A row as systems see it."""
        row = self._rows[number]
        return row if self._change is None else self._change(row)

    @property
    def chunk_count(self) -> int:
        return -(-len(self._places) // CHUNK)

    def read(self, number: int) -> list[EntityRow]:
        """The entities of a chunk."""
        rows: dict[int, list[EntityRow]] = {}
        entities = []
        for row, place in self._places[number * CHUNK : (number + 1) * CHUNK]:
            if row not in rows:
                rows = {row: candidates_of(self.row(row))}
            entities.append(rows[row][place])
        return entities

    def batches(self) -> list[list[int]]:
        """The rows that fit some task, batch by batch."""
        able = [number for number, positions in enumerate(self.positions) if len(positions)]
        return [able[start : start + BATCH_SIZE] for start in range(0, len(able), BATCH_SIZE)]


def _answer(row: Row) -> int:
    """Which candidate is the gold; -1: none is."""
    if not (count := len(row["candidate_qids"])):
        return -1
    answer, gold = row["answer"], row["answer_qid"]
    if answer is None or not -1 <= answer < count:
        raise M3ELError(f"row {row['id']} has answer {answer} but {count} candidates: pass its gold's index, or -1")
    places = [place for place, qid in enumerate(row["candidate_qids"]) if qid == gold]
    if places != [answer][: answer >= 0]:
        said = " and ".join(map(str, places)) or "nowhere"
        raise M3ELError(f"row {row['id']} has answer {answer}, but its gold {gold} stands at {said}: make them agree")
    return answer


Counted = dict[tuple[str, str], Outcome]


@dataclass
class _Measuring:
    systems: Sequence[System]
    asked: _Asked
    chunks: Chunks

    def run(self, share: Share, progress: bool) -> list[Counted]:
        """Encodes and scores this process's share, and returns what all processes counted, batch by batch."""
        fingerprints = [system.fingerprint for system in self.systems]
        kept = {name: system for name, system in zip(fingerprints, self.systems, strict=True) if name is not None}
        ahead = [(system, name, number) for name, system in kept.items() for number in range(len(self.chunks))]
        batches = share.mine(self.asked.batches())
        mine = share.mine(ahead)
        is_quiet = not (progress and share.is_main)
        found = []
        with tqdm(total=len(mine) + len(batches), desc="evaluating", unit=" batches", disable=is_quiet) as bar:
            for system, name, number in mine:
                self.chunks.encoded(system, name, number)
                bar.update()
            share.wait()
            for batch in batches:
                rows = [self.asked.row(number) for number in batch]
                counted: Counted = {}
                for system, fingerprint in zip(self.systems, fingerprints, strict=True):
                    counted |= self._count(system, fingerprint, batch, rows)
                found.append(counted)
                bar.update()
        return share.gathered(found)

    def _count(self, system: System, fingerprint: str | None, batch: list[int], rows: list[Row]) -> Counted:
        tasks = [name for name in self.asked.fitting if system.can_do(TASKS[name])]
        fitting = {name: self.asked.fitting[name][batch] for name in tasks}
        chosen = [place for place in range(len(batch)) if any(fits[place] for fits in fitting.values())]
        if not chosen:
            return {}
        numbers = [batch[place] for place in chosen]
        scores, mask = self.scores(system, fingerprint, numbers, [rows[place] for place in chosen], tasks)
        counted: Counted = {}
        for name, totals in zip(tasks, scores, strict=True):
            able = fitting[name][chosen]
            of = np.array(numbers)[able]
            check_scores(system, name, totals[able], mask[able], [self.asked.facts[number]["id"] for number in of])
            answers = [self.asked.answers[number] for number in of]
            greater, equal = gold_counts(totals[able], answers, mask[able])
            counted[system.name, name] = Outcome(of, greater, equal, mask[able].sum(1))
        return counted

    def scores(
        self, system: System, fingerprint: str | None, numbers: list[int], rows: list[Row], tasks: list[str]
    ) -> tuple[Scores, NDArray[np.bool_]]:
        """Scores ``[T, B, C]`` of each row's own candidates, and which of them there are, ``[B, C]``."""
        positions = [self.asked.positions[number] for number in numbers]
        mask = np.arange(max(map(len, positions))) < np.array([[len(own)] for own in positions])
        scores = np.zeros((len(tasks), *mask.shape))
        mentions = system.encode_mentions(rows)
        able = [TASKS[name] for name in tasks]
        own = np.concatenate(positions)
        row, place = np.nonzero(mask)
        # Chunk by chunk, not group by group: of many chunks few are held.
        for chunk in np.unique(own // CHUNK):
            encoded = self.chunks.encoded(system, fingerprint, int(chunk))
            inside = np.flatnonzero(own // CHUNK == chunk)
            groups = row[inside] // GROUP_SIZE
            for here in np.split(inside, np.flatnonzero(np.diff(groups)) + 1):
                start = row[here[0]] // GROUP_SIZE * GROUP_SIZE
                wanted, column = np.unique(own[here] % CHUNK, return_inverse=True)
                found = scored(system, mentions[start : start + GROUP_SIZE], encoded[wanted], able)
                scores[:, row[here], place[here]] = found[:, row[here] - start, column]
        return scores, mask


def scored(system: System, mentions: Any, entities: Any, tasks: Sequence[Task]) -> Scores:
    """Returns a system's scores ``[T, B, N]``.

    Raises:
        M3ELError: If they have another shape, which might fit by chance.
    """
    scores = np.asarray(system.score(mentions, entities, tasks), dtype=np.float64)
    if scores.shape != (len(tasks), len(mentions), len(entities)):
        expected = f"{len(tasks)} tasks, {len(mentions)} mentions and {len(entities)} entities"
        raise M3ELError(f"{system.name} returns scores of the shape {scores.shape} for {expected}: give one a triple")
    return scores


def check_scores(
    system: System, task: str, scores: Scores, mask: NDArray[np.bool_], ids: Sequence[str] | NDArray[np.str_]
) -> None:
    """Refuses scores that have no rank.

    Raises:
        M3ELError: If a score is NaN or +inf.
    """
    wrong = (np.isnan(scores) | np.isposinf(scores)) & mask
    if wrong.any():
        raise M3ELError(
            f"{system.name} scores {ids[int(wrong.any(1).argmax())]} with NaN or infinity on {task}: no rank"
        )


def joined(found: Sequence[Counted], key: tuple[str, str]) -> Outcome:
    """One outcome of the parts that several batches and processes counted, in the rows' order."""
    parts = [counted[key] for counted in found if key in counted]
    if not parts:
        return Outcome(*(np.zeros(0, np.int64) for _ in range(4)))
    columns = (np.concatenate(values) for values in zip(*(vars(part).values() for part in parts), strict=True))
    rows, *counts = columns
    order = np.argsort(rows)
    return Outcome(rows[order], *(values[order] for values in counts))
