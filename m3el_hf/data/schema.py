"""The records that readers yield and the one flat row that everything after them speaks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Features, Image, List, Value

SPLITS: tuple[str, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as a source names it; nothing is opened until a row is made of it.

    Attributes:
        path: The file that holds it, or None if ``data`` does.
        data: The encoded bytes, or None if ``path`` holds them.
        url: Where the picture came from, or None if the source does not say.
        flaw: Why it cannot be had, where the reader can tell; it is then never opened.
    """

    path: Path | None = None
    data: bytes | None = None
    url: str | None = None
    flaw: str | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One candidate entity of a mention. ``name`` is empty, the others are None, where the source has none."""

    qid: str
    name: str
    description: str | None = None
    picture: Picture | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One mention with its candidates as a source gives them: released order, gold included.

    Attributes:
        id: Unique in its source and the same at every reading.
        source: File and row, for messages to people ("person.json row 12").
        topic: One of `m3el_hf.tasks.TOPICS`.
        split: The released split, or None where the source has none.
        mention: The mention's name.
        context: Its sentence, or None.
        picture: Its picture, or None.
        answer_qid: The gold entity; it stands among the candidates.
        candidates: In the order in which the source lists them.
        difficulty: Only some sources have it.
    """

    id: str
    source: str
    topic: str
    split: str | None
    mention: str
    context: str | None
    picture: Picture | None
    answer_qid: str
    candidates: tuple[Candidate, ...]
    difficulty: str | None = None


ROW_FEATURES = Features(
    {
        "id": Value("string"),
        "topic": Value("string"),
        "split_group": Value("string"),
        "mention": Value("string"),
        "context": Value("string"),
        "mention_image": Image(),
        "answer": Value("int32"),
        "answer_qid": Value("string"),
        "candidate_qids": List(Value("string")),
        "candidate_names": List(Value("string")),
        "candidate_descriptions": List(Value("string")),
        "candidate_images": List(Image()),
        "difficulty": Value("string"),
        "gold_position_released": Value("int32"),
        "mention_image_is_gold": Value("bool"),
        "image_urls": List(Value("string")),
        "licences": List(Value("string")),
    }
)
"""One row: one mention with its shuffled candidates. ``answer`` is the gold's index among them. ``image_urls`` and
``licences`` list the mention's picture first, then the candidates'. What is missing is null."""

IMAGE_COLUMNS: tuple[str, ...] = ("mention_image", "candidate_images")

ENTITY_FEATURES = Features(
    {
        "qid": Value("string"),
        "name": Value("string"),
        "description": Value("string"),
        "image": Image(),
    }
)
"""One row of the ``entities`` config: one entity, once."""


@dataclass
class Report:
    """What happened to the input of a build: nothing is dropped or missing without a count and a reason.

    Attributes:
        read: Instances found in the input.
        skipped: ``"file row N: reason"`` for each instance that could not be used.
        unusable_images: The reason for each picture that a source names and that cannot be had: absent, broken,
            no picture at all. By file.
        counts: Anything else worth a line, by name.
    """

    read: int = 0
    skipped: list[str] = field(default_factory=list)
    unusable_images: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
