"""Mentions to look at: where a system errs, with what it saw and what it preferred."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from m3el_hf.data.collator import candidates_of, undecoded
from m3el_hf.evaluation.evaluator import score_candidates
from m3el_hf.evaluation.outcomes import Evaluation
from m3el_hf.evaluation.report.document import Candidate, Example
from m3el_hf.evaluation.systems import Row, Scores, System
from m3el_hf.modeling.decoding_clipnd import decode_image
from m3el_hf.tasks import get_task

SIDE = 160
"""Longest side of a picture in an example, in pixels."""


def errors(evaluation: Evaluation, system: System, rows: Dataset | Sequence[Row], each: int = 2) -> list[Example]:
    """Shows rows whose gold the system did not rank first, of every task, topics taking turns.

    Args:
        evaluation: Of these rows.
        system: One of those that were measured.
        rows: The rows that were measured.
        each: How many of a task, at most.
    """
    rows = undecoded(rows) if isinstance(rows, Dataset) else rows
    wanted = {
        task: _spread(evaluation, outcome.rows[outcome.greater > 0], number * each)[:each]
        for number, (task, outcome) in enumerate(evaluation.outcomes[system.name].items())
    }
    numbers = sorted({number for some in wanted.values() for number in some})
    chosen = {number: rows[number] for number in numbers}
    if not chosen:
        return []
    scores = score_candidates(system, list(chosen.values()), [get_task(task) for task in wanted])
    place = {number: position for position, number in enumerate(numbers)}
    pairs = [(number, task, scores[task][place[number]]) for task, some in wanted.items() for number in some]
    return [example(chosen[number], task, system.name, own) for number, task, own in pairs if own is not None]


def example(row: Row, task: str, system: str, scores: Scores) -> Example:
    """Shows one row as a task does, its candidates from best to worst.

    Args:
        row: With pictures as bytes.
        task: The task's name.
        system: The system's name.
        scores: ``[C]``, its scores of the candidates.
    """
    shown = get_task(task)
    candidates = [
        Candidate(
            name=entity.name or entity.qid if shown.candidate.has_text else entity.qid,
            description=entity.description if shown.candidate.has_text else None,
            score=float(score),
            is_gold=place == row["answer"],
            picture=_small(entity.image) if shown.candidate.has_image else None,
        )
        for place, (entity, score) in enumerate(zip(candidates_of(row), scores, strict=True))
    ]
    answer = row["answer"]
    above = f"{(scores > scores[answer]).sum()} of {len(candidates) - 1} others score above the gold"
    return Example(
        task=task,
        topic=row.get("topic") or "",
        system=system,
        mention=row["mention"] if shown.mention.has_text else "",
        context=row["context"] if shown.mention.has_text else None,
        picture=_small(row["mention_image"]) if shown.mention.has_image else None,
        candidates=tuple(sorted(candidates, key=lambda one: -one.score)),
        remark=f"{row['id']}: {above if answer >= 0 else 'the gold is not among the candidates'}",
    )


def _spread(evaluation: Evaluation, rows: Any, first: int) -> list[int]:
    """Rows in an order in which topics take turns, from the ``first``-th on."""
    topics = evaluation.facts["topic"][rows]
    names = np.roll(np.unique(evaluation.facts["topic"]), -first)
    turns = zip_longest(*(rows[topics == topic].tolist() for topic in names))
    return [row for turn in turns for row in turn if row is not None]


def _small(image: Any) -> bytes | None:
    """A copy of a picture that a page can carry many of; None where there is none."""
    if image is None:
        return None
    picture = decode_image(image["bytes"], SIDE)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()
