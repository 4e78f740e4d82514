"""The records that readers yield and the one flat row that everything after them speaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Features, Image, List, Value

SPLITS: tuple[str, ...] = ("train", "validation", "test")

NIL = "NIL"
"""The answer of a mention whose entity the knowledge base does not have."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as a source names it; nothing is opened until a row is made of it.

    Attributes:
        path: The file that holds it, or None if ``data`` does.
        data: The encoded bytes, or None if ``path`` holds them.
        url: Where the picture came from, or None if the source does not say.
        licence: Under what terms it may be used, or None if the source does not say.
        flaw: Why it cannot be had, where the reader can tell; it is then never opened.
    """

    path: Path | None = None
    data: bytes | None = None
    url: str | None = None
    licence: str | None = None
    flaw: str | None = None


@dataclass(frozen=True, slots=True)
class Entity:
    """An entity, as a candidate of a mention or in a knowledge base. Missing: an empty name, and None elsewhere."""

    qid: str
    name: str
    description: str | None = None
    picture: Picture | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One mention with its candidates as a source gives them: released order, gold included.

    Attributes:
        id: Unique in its source and the same at every reading; every task shows it, so it must not tell the gold.
        source: File and row, for messages to people ("person.json row 12").
        topic: A short lower-case word; M³EL's are `m3el_hf.tasks.TOPICS`. None where the source has no topics.
        split: The released split, or None where the source has none.
        mention: The mention's name.
        context: Its sentence, or None.
        picture: Its picture, or None.
        answer_qid: The gold entity, or `NIL`. It stands among the candidates, where there are some.
        candidates: In the order in which the source lists them; empty where every entity of the source's knowledge
            base is one.
        difficulty: Only some sources have it.
    """

    id: str
    source: str
    topic: str | None
    split: str | None
    mention: str
    context: str | None
    picture: Picture | None
    answer_qid: str
    candidates: tuple[Entity, ...]
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
        "mention_name_is_gold": Value("bool"),
        "image_urls": List(Value("string")),
        "licences": List(Value("string")),
    }
)
"""One row: one mention with its shuffled candidates. ``answer`` is the gold's index among them. ``image_urls`` and
``licences`` list the mention's picture first, then the candidates'. What is missing is null."""

IMAGE_COLUMNS: tuple[str, ...] = ("mention_image", "candidate_images")

_CANDIDATE_COLUMNS = {name for name in ROW_FEATURES if name.startswith("candidate_")} | {
    "answer",
    "gold_position_released",
}
MENTION_FEATURES = Features({name: kind for name, kind in ROW_FEATURES.items() if name not in _CANDIDATE_COLUMNS})
"""One row of the ``mentions`` config, for sources with a knowledge base: every entity of it is a candidate."""

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

    Every instance that a reader counts in ``read`` becomes one record or one line of ``skipped``, and likewise for the
    entities of a knowledge base; a build checks that it is so.

    Attributes:
        read: Instances (mentions) found in the input.
        skipped: ``"file row N: reason"`` for each instance that could not be used.
        entities_read: Entities found in the input's knowledge base, where it has one.
        entities_skipped: ``"file row N: reason"`` for each entity that could not be used.
        unusable_images: The reason for each picture that a source names and that cannot be had: absent, broken,
            no picture at all. By file.
        counts: Anything else worth a line, by name.
        title: What the source turned out to be, where the reader can tell only from its files.
    """

    read: int = 0
    skipped: list[str] = field(default_factory=list)
    entities_read: int = 0
    entities_skipped: list[str] = field(default_factory=list)
    unusable_images: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    title: str | None = None


@dataclass(frozen=True)
class Reader:
    """A raw format: how it is read, and what the card of data read from it has to say.

    Attributes:
        title: What the data is called.
        records: Yields the mentions of a folder in a fixed order; takes the folder, a `Report` and options of its own.
        entities: Yields the knowledge base that all mentions share; None where each mention has its own candidates.
        recognises: Whether a folder is of this format, told by a look at its files; None if none is read.
        about: What it is and where it comes from, in Markdown.
        caveats: What gives the gold away in it and which way it leans, in Markdown.
        licence: Under what terms text and pictures stand, in Markdown.
        license_id: The licence as the Hub lists it, for the YAML of the card.
        citations: BibTeX of the works that the data comes from, one entry each.
    """

    title: str
    records: Callable[..., Iterator[Record]]
    entities: Callable[[Path, Report], Iterator[Entity]] | None = None
    recognises: Callable[[Path], bool] | None = None
    about: str = ""
    caveats: str = ""
    licence: str = "The source states no licence."
    license_id: str = "unknown"
    citations: tuple[str, ...] = ()
