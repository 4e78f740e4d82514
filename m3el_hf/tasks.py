"""The vocabulary every other room speaks: five topics, three modalities, nine tasks.

A task says what a mention shows and what a candidate shows: ``t2i`` is a mention given as text and candidates given as
pictures (M³EL, arXiv 2410.18096, lists the nine).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from m3el_hf.errors import M3ELError

TOPICS: tuple[str, ...] = ("movies", "common", "person", "books", "sports")

TEMPLATES: tuple[str, ...] = ("N", "D", "ND")
"""What an entity's text is made of: name, description or both."""


class Modality(Enum):
    """What one side of a pair shows: text, image, or both."""

    TEXT = "t"
    IMAGE = "i"
    BOTH = "it"

    @property
    def has_text(self) -> bool:
        """Whether the text is shown."""
        return self is not Modality.IMAGE

    @property
    def has_image(self) -> bool:
        """Whether the picture is shown."""
        return self is not Modality.TEXT


@dataclass(frozen=True)
class Task:
    """One of the nine linking tasks.

    Attributes:
        mention: What is shown of the mention.
        candidate: What is shown of every candidate.
    """

    mention: Modality
    candidate: Modality

    @property
    def name(self) -> str:
        """The short name, for example ``"it2t"``."""
        return f"{self.mention.value}2{self.candidate.value}"

    @property
    def needs_images(self) -> bool:
        """Whether either side shows a picture."""
        return self.mention.has_image or self.candidate.has_image

    @property
    def columns(self) -> tuple[str, ...]:
        """The dataset columns that this task may see; none of them reveals the gold but ``answer``, the label."""
        mention = ("mention", "context") * self.mention.has_text + ("mention_image",) * self.mention.has_image
        candidate = ("candidate_names", "candidate_descriptions") * self.candidate.has_text
        candidate += ("candidate_images",) * self.candidate.has_image
        return ("id", "topic", *mention, *candidate, "answer")

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has all that the task shows, of the mention and of every candidate; a name suffices as text.

        Example:
            >>> row = {"mention": "Kansas", "mention_image": None}
            >>> row |= {"candidate_names": ["Kansas"], "candidate_images": [{"bytes": b"..."}]}
            >>> [name for name, task in TASKS.items() if task.fits(row)]
            ['t2t', 't2i', 't2it']
        """
        shown = [row["mention"]] * self.mention.has_text + row["candidate_names"] * self.candidate.has_text
        pictures = [row["mention_image"]] * self.mention.has_image + row["candidate_images"] * self.candidate.has_image
        return all(shown) and all(picture is not None for picture in pictures)


TASKS: dict[str, Task] = {
    task.name: task for task in (Task(mention, candidate) for mention in Modality for candidate in Modality)
}


def get_task(name: str) -> Task:
    """Looks a task up by its short name.

    Raises:
        M3ELError: If there is no such task.

    Example:
        >>> get_task("i2t").columns
        ('id', 'topic', 'mention_image', 'candidate_names', 'candidate_descriptions', 'answer')
    """
    if name not in TASKS:
        raise M3ELError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]
