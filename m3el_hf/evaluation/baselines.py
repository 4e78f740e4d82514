"""Systems without a model, which stand in every table: chance, three matches of strings, image hash.

Each is a `m3el_hf.evaluation.systems.System` that keeps nothing of what it encodes. A score depends on its own mention
and entity alone, to the last bit, so the chunks in which a knowledge base comes do not matter.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import csr_array

from m3el_hf.data.collator import EntityRow
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.systems import Row, Scores, System
from m3el_hf.modeling.decoding_clipnd import decode_image
from m3el_hf.tasks import Task

SIDE = 8
"""Pixels of a thumbnail's side."""


def baselines(entities: Iterable[EntityRow]) -> tuple[System, ...]:
    """Returns all baselines in the order of the tables.

    Args:
        entities: Those that are to be told apart, each once: a knowledge base, or all candidates. They are read once,
            and not kept.

    Raises:
        M3ELError: If there are none.
    """
    return (Chance(), StringMatch("token"), StringMatch("character"), BM25(entities), ImageHash())


class Baseline(ABC):
    """A system that compares a pair alike whatever the task, and keeps nothing of what it encodes."""

    name: str
    fingerprint = None

    def score(self, mentions: Any, entities: Any, tasks: Sequence[Task]) -> Scores:
        """Returns `compare`'s scores once a task, ``[T, B, N]``."""
        scores = self.compare(mentions, entities)
        return np.broadcast_to(scores, (len(tasks), *scores.shape))

    @abstractmethod
    def compare(self, mentions: Any, entities: Any) -> Scores:
        """Scores ``[B, N]`` encoded mentions against encoded entities."""

    @abstractmethod
    def can_do(self, task: Task) -> bool:
        """As `System.can_do`, and so are the others."""

    @abstractmethod
    def encode_mentions(self, rows: Sequence[Row]) -> Any:
        """Encodes B mentions."""

    @abstractmethod
    def encode_entities(self, entities: Sequence[EntityRow]) -> Any:
        """Encodes N entities."""


class Chance(Baseline):
    """Scores all entities alike; ties count as chance."""

    name = "chance"

    def can_do(self, task: Task) -> bool:
        """Every task."""
        return True

    def encode_mentions(self, rows: Sequence[Row]) -> NDArray[np.float64]:
        """Returns zeros ``[B]``."""
        return np.zeros(len(rows))

    def encode_entities(self, entities: Sequence[EntityRow]) -> NDArray[np.float64]:
        """Returns zeros ``[N]``."""
        return np.zeros(len(entities))

    def compare(self, mentions: NDArray[np.float64], entities: NDArray[np.float64]) -> Scores:
        """Returns zeros ``[B, N]``."""
        return np.zeros((len(mentions), len(entities)))


@dataclass(frozen=True)
class Bags:
    """Texts as bags of terms.

    Attributes:
        columns: The column of each term; others' columns are others.
        weights: ``[n, C]``, the weight of each term in each text.
    """

    columns: dict[str, int]
    weights: csr_array

    @classmethod
    def of(cls, texts: Sequence[Mapping[str, float]]) -> Bags:
        """Takes the weights of n texts' terms."""
        columns: dict[str, int] = defaultdict(count().__next__)
        ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
        indices = np.fromiter(map(columns.__getitem__, chain.from_iterable(texts)), np.int32, ends[-1])
        weights = np.fromiter(chain.from_iterable(text.values() for text in texts), np.float64, ends[-1])
        return cls(dict(columns), csr_array((weights, indices, ends), shape=(len(texts), len(columns))))

    def __len__(self) -> int:
        return self.weights.shape[0]

    def __getitem__(self, rows: Any) -> Bags:
        return Bags(self.columns, self.weights[rows])

    @property
    def sizes(self) -> NDArray[np.int64]:
        """``[n]``, the number of each text's different terms."""
        return np.diff(self.weights.indptr).astype(np.int64)

    def product(self, others: Bags) -> Scores:
        """Sums, ``[n, m]``, the products of the weights of the terms that two texts share.

        A sum runs in the order of this side's terms (as SciPy multiplies), so its bits do not depend on other texts.
        """
        place = np.array([others.columns.get(term, -1) for term in self.columns], dtype=np.int32)[self.weights.indices]
        shared = place >= 0
        ends = np.concatenate([[0], np.cumsum(shared)])[self.weights.indptr]
        weights = csr_array(
            (self.weights.data[shared], place[shared], ends), shape=(len(self), others.weights.shape[1])
        )
        return (weights @ others.weights.T).toarray()


class _TextBaseline(Baseline):
    """What the matches of strings share: which tasks they do, and what they read."""

    def can_do(self, task: Task) -> bool:
        """Tasks with text on both sides."""
        return task.mention.has_text and task.candidate.has_text


class StringMatch(_TextBaseline):
    """Overlap of the mention's name and context with the entity's name and description: Dice coefficient of two sets.

    Args:
        level: ``"token"``: the sets are of words. ``"character"``: of each character with its two neighbours within a
            word, a space where the word ends, so that most of a misspelt or inflected word still counts. Three is the
            usual length, with this coefficient, for finding misspelt words (Angell, Freund and Willett, "Automatic
            spelling correction using a trigram similarity measure", 1983).
    """

    def __init__(self, level: Literal["token", "character"] = "token") -> None:
        self.name = "string match" if level == "token" else "character match"
        self._terms: Callable[[str], list[str]] = tokens if level == "token" else trigrams

    def encode_mentions(self, rows: Sequence[Row]) -> Bags:
        """Encodes the names and contexts of B mentions."""
        return self._encode(_mention_text(row) for row in rows)

    def encode_entities(self, entities: Sequence[EntityRow]) -> Bags:
        """Encodes the names and descriptions of N entities."""
        return self._encode(_entity_text(entity) for entity in entities)

    def compare(self, mentions: Bags, entities: Bags) -> Scores:
        """Returns the overlaps ``[B, N]``, 0 to 1; 0 where a text is empty."""
        return 2 * mentions.product(entities) / np.maximum(1, np.add.outer(mentions.sizes, entities.sizes))

    def _encode(self, texts: Iterable[str]) -> Bags:
        return Bags.of([dict.fromkeys(self._terms(text), 1.0) for text in texts])


class BM25(_TextBaseline):
    """BM25 with the mention's name and context as the query, and the entity's name and description as the document.

    A document of ``length`` words scores, over the query's words (a word that it has twice counts twice), the sum of

        log(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 * (1 - b + b * length / average length))

    This is the formula of Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009), with
    Lucene's inverse document frequency, which is never negative; the library bm25s calls it ``method="lucene"``, and
    ``k1`` and ``b`` are its defaults, which are within the range that the former give. A library's index scores what it
    indexed; here any entity is scored, chunk by chunk, by the frequencies of those that it is fitted on.

    Args:
        entities: Those whose words are counted, each once. A word that none of them has is as rare as can be.

    Raises:
        M3ELError: If there are none.
    """

    name = "BM25"
    k1 = 1.5
    b = 0.75

    def __init__(self, entities: Iterable[EntityRow]) -> None:
        frequencies: Counter[str] = Counter()
        total, words = 0, 0
        for entity in entities:
            document = tokens(_entity_text(entity))
            frequencies.update(set(document))
            total, words = total + 1, words + len(document)
        if not total:
            raise M3ELError("BM25 counts the words of entities, and there are none: choose a split that has some")
        self._rarity = {word: _rarity(total, documents) for word, documents in frequencies.items()}
        self._rarest = _rarity(total, 0)
        self._average = words / total or 1.0  # of no words at all there is nothing to divide

    def encode_mentions(self, rows: Sequence[Row]) -> Bags:
        """Counts the words of B mentions."""
        return Bags.of([Counter(tokens(_mention_text(row))) for row in rows])

    def encode_entities(self, entities: Sequence[EntityRow]) -> Bags:
        """Weighs the words of N entities."""
        return Bags.of([self._weigh(tokens(_entity_text(entity))) for entity in entities])

    def compare(self, mentions: Bags, entities: Bags) -> Scores:
        """Returns the scores ``[B, N]``, at least 0."""
        return mentions.product(entities)

    def _weigh(self, document: list[str]) -> dict[str, float]:
        damping = self.k1 * (1 - self.b + self.b * len(document) / self._average)
        return {
            word: self._rarity.get(word, self._rarest) * times / (times + damping)
            for word, times in Counter(document).items()
        }


class ImageHash(Baseline):
    """Cosine of 8 x 8 colour thumbnails, each centred on its mean."""

    name = "image hash"

    def can_do(self, task: Task) -> bool:
        """Tasks with pictures on both sides."""
        return task.mention.has_image and task.candidate.has_image

    def encode_mentions(self, rows: Sequence[Row]) -> NDArray[np.uint8]:
        """Returns thumbnails ``[B, 192]``; zeros where there is no picture."""
        return _thumbnails([row["mention_image"] for row in rows])

    def encode_entities(self, entities: Sequence[EntityRow]) -> NDArray[np.uint8]:
        """Returns thumbnails ``[N, 192]``; zeros where there is no picture."""
        return _thumbnails([entity.image for entity in entities])

    def compare(self, mentions: NDArray[np.uint8], entities: NDArray[np.uint8]) -> Scores:
        """Returns the cosines ``[B, N]``; 0 where a thumbnail has but one value."""
        one, other = _centred(mentions), _centred(entities)
        lengths = np.sqrt(np.multiply.outer((one * one).sum(1), (other * other).sum(1)))
        return one @ other.T / np.maximum(1, lengths)


def tokens(text: str) -> list[str]:
    """Returns the words of a text in lower case."""
    return re.findall(r"\w+", text.lower())


def trigrams(text: str) -> list[str]:
    """Returns each character with its neighbours within a word, in lower case; words end at white space.

    Example:
        >>> trigrams("A cat")
        [' a ', ' ca', 'cat', 'at ']
    """
    padded = f" {' '.join(text.lower().split())} "
    return [padded[start : start + 3] for start in range(len(padded) - 2) if padded[start + 1] != " "]


def _mention_text(row: Row) -> str:
    return f"{row['mention'] or ''} {row['context'] or ''}"


def _entity_text(entity: EntityRow) -> str:
    return f"{entity.name or ''} {entity.description or ''}"


def _rarity(total: int, documents: int) -> float:
    """The inverse document frequency of a word that so many of all documents have."""
    return math.log(1 + (total - documents + 0.5) / (documents + 0.5))


def _thumbnails(images: Sequence[Mapping[str, Any] | None]) -> NDArray[np.uint8]:
    result = np.zeros((len(images), SIDE * SIDE * 3), dtype=np.uint8)
    for thumbnail, image in zip(result, images, strict=True):
        if image is not None:
            picture = decode_image(image["bytes"]).resize((SIDE, SIDE), Image.Resampling.BOX)
            thumbnail[:] = np.asarray(picture).ravel()
    return result


def _centred(thumbnails: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Centres each on its mean, times the number of its values, so that products are exact sums of whole numbers."""
    values = thumbnails.astype(np.float64)
    return values * values.shape[1] - values.sum(1, keepdims=True)
