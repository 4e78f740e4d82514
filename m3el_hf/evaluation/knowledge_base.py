"""Measures systems against a whole knowledge base: every entity of it is a candidate of every mention.

Ranks are counted chunk by chunk, so that what is held does not grow with the entities; the scores of all pairs never
exist together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
from accelerate import Accelerator
from datasets import Dataset, Image
from numpy.typing import NDArray
from tqdm import tqdm

from m3el_hf.data.collator import EntityRow
from m3el_hf.data.schema import MENTION_FEATURES, NIL
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.chunks import CHUNK, Chunks, EncodedStore
from m3el_hf.evaluation.evaluator import FACTS, Counted, able_of, check_names, check_scores, joined, scored
from m3el_hf.evaluation.facts import Familiar, row_facts
from m3el_hf.evaluation.outcomes import Evaluation, Outcome
from m3el_hf.evaluation.sharing import Share
from m3el_hf.evaluation.systems import Row, Scores, System
from m3el_hf.tasks import Modality, Task, get_task

MENTIONS = 4096
"""Mentions that are held encoded: the knowledge base is gone through once for so many of them."""

BLOCK = 256
"""Mentions that are scored at once against a chunk of entities."""

READ = 1024
"""Entities that are read at once."""

ABSENT = -1
"""The place of a gold that is not in the knowledge base."""

Nil = Literal["drop", "miss", "entity"]


def evaluate_knowledge_base(
    systems: Sequence[System],
    rows: Dataset,
    entities: Dataset,
    tasks: Sequence[Task] = (get_task("it2it"),),
    *,
    nil: Nil = "drop",
    nil_scores: Mapping[str, float] | None = None,
    training: Dataset | None = None,
    cache_dir: Path | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = False,
) -> Evaluation:
    """Ranks each mention's gold among all entities.

    A row counts for a task if its mention has something of what the task shows: with ``it2it``, a name or a picture
    suffices. An entity that shows nothing scores -inf. A gold that the knowledge base does not have is a miss, and
    counts.

    Args:
        systems: With names that differ.
        rows: Mentions, with at least the columns of `m3el_hf.data.schema.MENTION_FEATURES`.
        entities: The knowledge base, with the columns of `m3el_hf.data.schema.ENTITY_FEATURES`.
        tasks: The tasks.
        nil: What becomes of rows whose answer is `NIL`: ``"drop"`` leaves them out, ``"miss"`` counts them as wrong,
            and ``"entity"`` makes NIL one more candidate of every row.
        nil_scores: Its score by a system's name, with ``"entity"``: a threshold on the scale of that system, chosen on
            other rows. A system that has none here scores it -inf, and so never answers NIL. None else.
        training: As in `m3el_hf.evaluation.evaluator.evaluate`, and so are the others.
        cache_dir: Where encoded entities are kept for the next time; None to keep none.
        accelerator: Of several processes, which share ``cache_dir``, or their temporary folder.
        progress: Show a progress bar.

    Raises:
        M3ELError: If there are no rows or no entities, an entity stands twice, two rows have the same id, two systems
            the same name, ``nil`` is no choice or ``nil_scores`` do not go with it, or a score is NaN or +inf.
    """
    if nil not in get_args(Nil):
        raise M3ELError(f"nil cannot be {nil!r}: choose {', '.join(get_args(Nil))}")
    for name, score in (nil_scores or {}).items():
        if math.isnan(score) or score == math.inf or name not in [system.name for system in systems]:
            raise M3ELError(f"NIL cannot have the score {score} for {name}: pass a number for each of some systems")
    if (nil == "entity") != bool(nil_scores):
        raise M3ELError("NIL has a score just where it is an entity: pass nil_scores with nil='entity', and only there")
    if not len(rows):
        raise M3ELError("no rows to evaluate: choose a split that has some")
    check_names(systems)
    share = Share(accelerator)
    rows = rows.select_columns([name for name in MENTION_FEATURES if name in rows.column_names])
    rows = rows.cast_column("mention_image", Image(decode=False))
    base = _Base(entities)
    asked = _Mentions(rows, base, tasks, nil, nil_scores)
    with share.folder(cache_dir) as folder:
        chunks = Chunks(base.read, base.chunk_count, EncodedStore(folder))
        found = _Ranking(able_of(systems, tasks), asked, base, chunks, share, progress).run()
    facts = list(rows.select_columns([name for name in FACTS if name in rows.column_names]))
    outcomes = {
        system.name: {task.name: joined(found, (system.name, task.name)) for task in tasks if system.can_do(task)}
        for system in systems
    }
    return Evaluation(
        row_facts(facts, Familiar.of(training) if training is not None else None),
        outcomes,
        tuple(tasks),
        f"full knowledge base of {len(entities):,} entities, NIL: {nil}",
        asked.missing,
    )


class _Base:
    """The knowledge base: what each entity shows, and those that show something, in chunks."""

    def __init__(self, entities: Dataset) -> None:
        if not len(entities):
            raise M3ELError("the knowledge base is empty: pass at least one entity")
        self._entities = entities.select_columns(["qid", "name", "description", "image"])
        parts = [_shown(table) for table in self._entities.with_format("arrow").iter(READ)]
        self.has_text, self.has_image = (np.concatenate(one) for one in zip(*parts, strict=True))
        self._filled = np.flatnonzero(self.has_text | self.has_image)
        self._entities = self._entities.cast_column("image", Image(decode=False))

    def __len__(self) -> int:
        return len(self.has_text)

    @property
    def chunk_count(self) -> int:
        return -(-len(self._filled) // CHUNK)

    @property
    def blank_count(self) -> int:
        """Entities that show nothing at all, which no system is asked about."""
        return len(self) - len(self._filled)

    def members(self, number: int) -> NDArray[np.int64]:
        """The places of a chunk's entities."""
        return self._filled[number * CHUNK : (number + 1) * CHUNK]

    def read(self, number: int) -> list[EntityRow]:
        """The entities of a chunk."""
        columns = self._entities[self.members(number).tolist()]
        return [EntityRow(*values) for values in zip(*columns.values(), strict=True)]

    def places(self, qids: Sequence[str]) -> NDArray[np.int64]:
        """Where each entity stands, `ABSENT` if it does not.

        Raises:
            M3ELError: If an entity stands twice: which of the two would be the gold?
        """
        wanted, hashes = set(qids), np.empty(len(self), np.int64)  # all names would be too many to hold
        found: dict[str, int] = {}
        for place, qid in enumerate(self._qids()):
            hashes[place] = hash(qid)
            if qid in wanted:
                found[qid] = place
        values, counts = np.unique(hashes, return_counts=True)
        if alike := set(values[counts > 1].tolist()):
            [(qid, times)] = Counter(qid for qid in self._qids() if hash(qid) in alike).most_common(1)
            if times > 1:
                raise M3ELError(f"entity {qid} stands {times} times in the knowledge base: leave all but one out")
        return np.array([found.get(qid, ABSENT) for qid in qids])

    def _qids(self) -> Iterator[str]:
        columns = self._entities.select_columns(["qid"]).iter(READ)  # a row would bring its picture along
        return (qid for some in columns for qid in some["qid"])

    def shows(self, places: NDArray[np.int64], task: Task) -> NDArray[np.bool_]:
        """Which entities have something of what a task shows."""
        return (self.has_text[places] & task.candidate.has_text) | (self.has_image[places] & task.candidate.has_image)


def _shown(table: pa.Table) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    pairs = zip(table["name"].to_pylist(), table["description"].to_pylist(), strict=True)
    return np.array([bool(name or text) for name, text in pairs]), np.asarray(table["image"].is_valid())


class _Mentions:
    """The rows, where their golds stand, and the tasks that each counts for."""

    def __init__(
        self, rows: Dataset, base: _Base, tasks: Sequence[Task], nil: Nil, nil_scores: Mapping[str, float] | None
    ) -> None:
        self.rows, self.tasks, self.nil_scores = rows, tasks, nil_scores
        answers = list(rows["answer_qid"])
        self.ids = np.array(rows["id"])
        self.golds = base.places(answers)
        self.is_nil = np.array([answer == NIL for answer in answers])
        texts = [bool(name or context) for name, context in zip(rows["mention"], rows["context"], strict=True)]
        pictures = [picture is not None for picture in rows["mention_image"]]
        self.counts: dict[str, NDArray[np.bool_]] = {}
        self.missing: dict[str, dict[str, int]] = {}
        dropped = self.is_nil & (nil == "drop")
        for task in tasks:
            shown = np.array(texts) & task.mention.has_text | np.array(pictures) & task.mention.has_image
            self.counts[task.name] = shown & ~dropped
            reasons = {"NIL": dropped, f"no mention {_SHOWN[task.mention]}": ~shown & ~dropped}
            self.missing[task.name] = {reason: int(rows.sum()) for reason, rows in reasons.items() if rows.any()}

    def blocks(self) -> list[NDArray[np.int64]]:
        """The rows that count for some task, block by block, those together whose golds stand together."""
        able = np.flatnonzero(np.any(list(self.counts.values()), axis=0))
        able = able[np.argsort(self.golds[able], kind="stable")]
        return [able[start : start + BLOCK] for start in range(0, len(able), BLOCK)]

    def read(self, block: NDArray[np.int64]) -> list[Row]:
        """The rows of a block."""
        return [self.rows[number] for number in block.tolist()]


_SHOWN = {Modality.TEXT: "text", Modality.IMAGE: "picture", Modality.BOTH: "text or picture"}


@dataclass
class _Tally:
    """What is counted of a block of B mentions by one system, for each of its T tasks."""

    mentions: Any
    golds: Scores  # [T, B]; NaN where the gold is not a candidate
    greater: NDArray[np.int64]  # [T, B]
    equal: NDArray[np.int64]  # [T, B]

    def add(self, scores: Scores) -> None:
        """Counts scores ``[T, B, N]`` of further candidates."""
        golds = self.golds[..., None]
        self.greater += (scores > golds).sum(2)
        self.equal += (scores == golds).sum(2)


@dataclass
class _Ranking:
    systems: Sequence[System]
    asked: _Mentions
    base: _Base
    chunks: Chunks
    share: Share
    progress: bool

    def run(self) -> list[Counted]:
        """Ranks this process's share of the mentions, and returns what all processes counted, block by block."""
        self.fingerprints = [system.fingerprint for system in self.systems]
        kept = {name: system for name, system in zip(self.fingerprints, self.systems, strict=True) if name is not None}
        ahead = self.share.mine([(system, name, number) for name, system in kept.items() for number in self._numbers])
        blocks = self.share.mine(self.asked.blocks())
        rounds = [blocks[start : start + MENTIONS // BLOCK] for start in range(0, len(blocks), MENTIONS // BLOCK)]
        total = len(ahead) + len(rounds) * len(self.systems) * 2 * len(self.chunks)
        is_quiet = not (self.progress and self.share.is_main)
        with tqdm(total=total, desc="ranking", unit=" batches", disable=is_quiet) as self.bar:
            for system, name, number in ahead:
                self.chunks.encoded(system, name, number)
                self.bar.update()
            self.share.wait()
            found = [
                counted
                for some in rounds
                for system, name in zip(self.systems, self.fingerprints, strict=True)
                for counted in self._rank(system, name, some)
            ]
        return self.share.gathered(found)

    @property
    def _numbers(self) -> range:
        return range(len(self.chunks))

    def _rank(self, system: System, fingerprint: str | None, blocks: Sequence[NDArray[np.int64]]) -> list[Counted]:
        tasks = [task for task in self.asked.tasks if system.can_do(task)]
        tallies = [self._begin(system, tasks, block) for block in blocks]
        # The golds first, by the very calls that score all: their scores are then the same to the last bit.
        for number in self._numbers:
            members = self.base.members(number)
            for block, tally in zip(blocks, tallies, strict=True):
                inside = np.flatnonzero(np.isin(self.asked.golds[block], members))
                if inside.size:
                    places = np.searchsorted(members, self.asked.golds[block][inside])
                    scores = self._scores(system, fingerprint, tally, tasks, block, number)
                    tally.golds[:, inside] = scores[:, inside, places]
            self.bar.update()
        for tally in tallies:
            self._add_beyond_chunks(system, tally)
        for number in self._numbers:
            for block, tally in zip(blocks, tallies, strict=True):
                tally.add(self._scores(system, fingerprint, tally, tasks, block, number))
            self.bar.update()
        return [self._counted(system, tasks, *one) for one in zip(blocks, tallies, strict=True)]

    def _begin(self, system: System, tasks: Sequence[Task], block: NDArray[np.int64]) -> _Tally:
        golds = np.full((len(tasks), len(block)), np.nan)
        golds[:, self.asked.golds[block] != ABSENT] = -np.inf  # until its chunk says more
        if self.asked.nil_scores is not None:
            golds[:, self.asked.is_nil[block]] = self.asked.nil_scores.get(system.name, -np.inf)
        greater, equal = np.zeros(golds.shape, np.int64), np.zeros(golds.shape, np.int64)
        return _Tally(system.encode_mentions(self.asked.read(block)), golds, greater, equal)

    def _add_beyond_chunks(self, system: System, tally: _Tally) -> None:
        """Counts the candidates that no system is asked about: entities that show nothing, and NIL."""
        shape = (*tally.golds.shape, 1)
        tally.equal += self.base.blank_count * (tally.golds == -np.inf)
        if self.asked.nil_scores is not None:
            tally.add(np.full(shape, self.asked.nil_scores.get(system.name, -np.inf)))

    def _scores(
        self,
        system: System,
        fingerprint: str | None,
        tally: _Tally,
        tasks: Sequence[Task],
        block: NDArray[np.int64],
        number: int,
    ) -> Scores:
        """Scores ``[T, B, N]`` against a chunk; -inf for entities that show nothing of a task."""
        members = self.base.members(number)
        shown = np.array([self.base.shows(members, task) for task in tasks])[:, None]
        scores = scored(system, tally.mentions, self.chunks.encoded(system, fingerprint, number), tasks)
        scores = np.where(shown, scores, -np.inf)
        for task, of_task in zip(tasks, scores, strict=True):
            counting = np.broadcast_to(self.asked.counts[task.name][block][:, None], of_task.shape)
            check_scores(system, task.name, of_task, counting, self.asked.ids[block])
        return scores

    def _counted(self, system: System, tasks: Sequence[Task], block: NDArray[np.int64], tally: _Tally) -> Counted:
        candidates = len(self.base) + (self.asked.nil_scores is not None)
        counted: Counted = {}
        for number, task in enumerate(tasks):
            counts = self.asked.counts[task.name][block]
            is_miss = np.isnan(tally.golds[number])
            if (lost := ~is_miss & (tally.equal[number] == 0) & counts).any():
                row = self.asked.ids[block[lost.argmax()]]
                raise M3ELError(
                    f"{system.name} scores the gold of {row} on {task.name} in two ways: scores must not change"
                )
            greater = np.where(is_miss, candidates, tally.greater[number])[counts]
            rows = block[counts]
            counted[system.name, task.name] = Outcome(
                rows, greater, tally.equal[number][counts], np.full(len(rows), candidates)
            )
        return counted
