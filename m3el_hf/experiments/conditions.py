"""What is done to test rows to see how robust a system is: less is shown, or worse, or beside likelier distractors.

A condition changes what a row shows of its mention or of its candidates. Ids, golds, answers and the number of
candidates stay. What is drawn follows from the seed, the condition's name and the row's id or the candidate's Qid
alone: rows may come in any order, and an entity is changed alike wherever it is a candidate.

What is absent stays absent, a picture that cannot be decoded stays as it is, and so does a mention or candidate that
would have neither text nor picture left. Whether a row fits a task (`Task.fits`) is a question to the row as it was: a
mention without its picture is to be linked by what else the task shows.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from m3el_hf.data.collator import EntityRow, candidates_of
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.baselines import Chance, ImageHash, StringMatch
from m3el_hf.evaluation.systems import Row, System
from m3el_hf.modeling.decoding_clipnd import UnusableImageError, decode_image
from m3el_hf.tasks import TASKS

Change = Callable[[Row], dict[str, Any]]
Draw = np.random.Generator


@dataclass(frozen=True)
class Condition:
    """Something that is done to test rows.

    Attributes:
        name: Its name in every table.
        about: What it does, one sentence without a full stop.
        prepare: Takes the rows that are evaluated and a seed, and returns what changes one of them. Only conditions
            that choose other distractors read the rows, once, and keep each of their candidates, picture included.
            Rows are those of `m3el_hf.data.schema.ROW_FEATURES` with pictures as bytes; a condition of mentions does
            with the mention's columns.

    Example:
        >>> row = {"id": "1", "mention": "Kansas", "context": "Kansas toured in 1976.", "mention_image": None}
        >>> CONDITIONS["mention-without-name"].prepare([row], 0)(row)["context"]
        'toured in 1976.'
    """

    name: str
    about: str
    prepare: Callable[[Iterable[Row], int], Change]


class MentionRow(NamedTuple):
    """A row's mention; None for what it lacks."""

    id: str
    name: str | None
    context: str | None
    image: dict[str, Any] | None


Edit = Callable[[Any, Draw], Any]
"""Of a `MentionRow` or an `EntityRow`."""

MENTION_COLUMNS = ("id", "mention", "context", "mention_image")
ENTITY_COLUMNS = ("candidate_qids", "candidate_names", "candidate_descriptions", "candidate_images")


def _of_mentions(name: str, about: str, edit: Edit) -> Condition:
    def prepare(rows: Iterable[Row], seed: int) -> Change:
        def change(row: Row) -> dict[str, Any]:
            mention = _edited(MentionRow(*(row[column] for column in MENTION_COLUMNS)), edit, seed, name)
            return {**row, **dict(zip(MENTION_COLUMNS, mention, strict=True))}

        return change

    return Condition(name, about, prepare)


def _of_entities(name: str, about: str, edit: Edit) -> Condition:
    def prepare(rows: Iterable[Row], seed: int) -> Change:
        def change(row: Row) -> dict[str, Any]:
            return _with_candidates(row, [_edited(one, edit, seed, name) for one in candidates_of(row)])

        return change

    return Condition(name, about, prepare)


def _edited(side: Any, edit: Edit, seed: int, name: str) -> Any:
    """What an edit makes of a mention or an entity, or this itself where it would have nothing left."""
    edited = edit(side, _draw(seed, name, side[0]))
    return edited if any(edited[1:]) else side


def _with_candidates(row: Row, candidates: Iterable[EntityRow]) -> dict[str, Any]:
    columns = zip(*candidates, strict=True)
    return {**row, **{name: list(column) for name, column in zip(ENTITY_COLUMNS, columns, strict=True)}}


def _draw(seed: int, name: str, key: str) -> Draw:
    digest = hashlib.blake2b(repr((seed, name, key)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest))


# What is missing.


def _hide(field: str) -> Edit:
    return lambda side, draw: side._replace(**{field: None})


def _hide_name(mention: MentionRow, draw: Draw) -> MentionRow:
    """Cuts the name out of the sentence too, in upper and lower case; inflected forms of it stay."""
    context = mention.context
    if context and mention.name and (name := mention.name.strip()):
        # A name must not be cut out of a longer word. Scripts without case write words together, or join particles.
        before, after = (r"\b" if end.lower() != end.upper() else "" for end in (name[0], name[-1]))
        cut = re.sub(before + re.escape(name) + after, " ", context, flags=re.IGNORECASE)
        context = " ".join(cut.split()) or None
    return mention._replace(name=None, context=context)


def _half(edit: Edit) -> Edit:
    return lambda side, draw: edit(side, draw) if draw.random() < 0.5 else side


MISSING = (
    (_of_mentions, "mention-without-picture", "mentions have no picture", _hide("image")),
    (_of_mentions, "mention-without-sentence", "mentions have a name and no sentence", _hide("context")),
    (_of_mentions, "mention-without-name", "mentions have no name, in their sentence neither", _hide_name),
    (_of_entities, "entity-without-picture", "entities have no picture", _hide("image")),
    (_of_entities, "entity-without-description", "entities have a name and no description", _hide("description")),
)


# Descriptions.


def _described(edit: Callable[[str, Draw], str]) -> Edit:
    def edit_entity(entity: EntityRow, draw: Draw) -> EntityRow:
        text = entity.description
        return entity._replace(description=edit(text, draw)) if text and text.strip() else entity

    return edit_entity


def _typos(share: float) -> Edit:
    """Swaps characters with those before them, drops them, or puts others of the same text before them."""

    def edit(text: str, draw: Draw) -> str:
        characters = list(text)
        places = draw.choice(len(text), size=math.ceil(share * len(text)), replace=False)
        for place in sorted(places.tolist(), reverse=True):  # from the end: what is before stays where it was
            kind = draw.integers(3)
            if kind == 0 and place:
                characters[place - 1 : place + 1] = characters[place], characters[place - 1]
            elif kind == 1 and len(characters) > 1:
                del characters[place]
            else:
                characters.insert(place, text[draw.integers(len(text))])
        return "".join(characters)

    return _described(edit)


def _drop_words(share: float) -> Edit:
    """Drops words, which white space parts, but for one that is left at least."""

    def edit(text: str, draw: Draw) -> str:
        words = text.split()
        kept = max(1, len(words) - round(share * len(words)))
        places = draw.permutation(len(words))[:kept]
        return " ".join(words[place] for place in sorted(places))

    return _described(edit)


def _shuffle_words(text: str, draw: Draw) -> str:
    words = text.split()
    return " ".join(words[place] for place in draw.permutation(len(words)))


def _first_words(count: int) -> Edit:
    return _described(lambda text, draw: " ".join(text.split()[:count]))


NOISY = (
    ("description-typos-10", "10 % of a description's characters are swapped, dropped or inserted", _typos(0.1)),
    ("description-typos-30", "30 % of a description's characters are swapped, dropped or inserted", _typos(0.3)),
    ("description-words-dropped", "descriptions lack 30 % of their words", _drop_words(0.3)),
    ("description-words-shuffled", "the words of descriptions are in random order", _described(_shuffle_words)),
    ("description-first-8-words", "descriptions end after 8 words", _first_words(8)),
    ("description-first-3-words", "descriptions end after 3 words", _first_words(3)),
)


# Pictures. Severities are those of the common corruptions of Hendrycks and Dietterich ("Benchmarking Neural Network
# Robustness to Common Corruptions and Perturbations", 2019, arXiv 1807.01697) on their scale of 1 to 5, for pictures of
# 224 pixels: larger ones are reduced to that short side first. Greys, occlusion and rotation are not among theirs.

SHORT_SIDE = 224
FILL = (128, 128, 128)


def _pictured(corrupt: Callable[[Image.Image, Draw], Image.Image]) -> Edit:
    """The result is a PNG, so that nothing else is lost."""

    def edit(side: Any, draw: Draw) -> Any:
        picture = _opened(side.image)
        if picture is None:
            return side
        if min(picture.size) > SHORT_SIDE:
            picture = _with_short_side(picture, SHORT_SIDE, Image.Resampling.BICUBIC)
        picture = corrupt(picture, draw)
        picture.info = {}  # else Pillow would write what the original said of itself
        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=1)
        return side._replace(image={"bytes": file.getvalue(), "path": None})

    return edit


def _opened(image: Mapping[str, Any] | None) -> Image.Image | None:
    """A picture in RGB; None where there is none, or it cannot be decoded."""
    try:
        return decode_image(image["bytes"], 2 * SHORT_SIDE) if image and image["bytes"] else None
    except UnusableImageError:
        return None


def _with_short_side(picture: Image.Image, pixels: int, resampling: Image.Resampling) -> Image.Image:
    ratio = pixels / min(picture.size)
    return picture.resize((round(picture.width * ratio), round(picture.height * ratio)), resampling)


def _add_noise(picture: Image.Image, draw: Draw) -> Image.Image:
    values = np.asarray(picture, dtype=np.float64)
    noisy = values + draw.normal(scale=0.18 * 255, size=values.shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def _blur(picture: Image.Image, draw: Draw) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(3 * min(picture.size) / SHORT_SIDE))


def _compress(picture: Image.Image, draw: Draw) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=10)
    return decode_image(file.getvalue())


def _shrink(picture: Image.Image, draw: Draw) -> Image.Image:
    return _with_short_side(picture, 16, Image.Resampling.BOX) if min(picture.size) > 16 else picture


def _drain(picture: Image.Image, draw: Draw) -> Image.Image:
    return picture.convert("L").convert("RGB")


def _occlude(picture: Image.Image, draw: Draw) -> Image.Image:
    width, height = (math.ceil(side / 2) for side in picture.size)
    left, top = int(draw.integers(picture.width - width + 1)), int(draw.integers(picture.height - height + 1))
    covered = picture.copy()
    covered.paste(FILL, (left, top, left + width, top + height))
    return covered


def _rotate(picture: Image.Image, draw: Draw) -> Image.Image:
    return picture.rotate(float(draw.choice([-15, 15])), Image.Resampling.BICUBIC, fillcolor=FILL)


CORRUPTED = (
    ("noise", "have Gaussian noise of 0.18 of the range of their values (severity 3)", _add_noise),
    ("blur", "are blurred by a Gaussian of 3 pixels in 224 (severity 3)", _blur),
    ("jpeg", "are compressed to JPEG of quality 10 (severity 4)", _compress),
    ("16-pixels", "are reduced to 16 pixels (beyond severity 5 of pixelation)", _shrink),
    ("grey", "have no colours", _drain),
    ("occluded", "are covered by a grey rectangle over a quarter of them", _occlude),
    ("rotated", "are turned by 15 degrees to either side", _rotate),
)


# Distractors.


class Pooled(NamedTuple):
    """A candidate of some row, and where its picture is from, by column."""

    entity: EntityRow
    sources: dict[str, str | None]


SOURCE_COLUMNS = ("image_urls", "licences")
"""The mention's picture first, then the candidates'."""


def _of_distractors(name: str, about: str, system: System, seen: Callable[[EntityRow], EntityRow]) -> Condition:
    """Replaces distractors by those entities of the pool that a system takes most for the gold, ties at random.

    Entities that have all that the gold has come first, so that no distractor is known by what it lacks. A row whose
    gold is no candidate, or has nothing that the system reads, stays as it is.

    Args:
        name: The condition's.
        about: The condition's.
        system: A baseline, which compares all that it sees; the gold is its mention.
        seen: What it sees of an entity.
    """

    def prepare(rows: Iterable[Row], seed: int) -> Change:
        pool = _pool(rows)
        encoded = system.encode_entities([seen(one.entity) for one in pool])
        lacking = np.array([[not value for value in one.entity[1:]] for one in pool])

        def likeliest(gold: EntityRow) -> Iterator[Pooled]:
            _, text, _, image = seen(gold)
            mention = {"id": gold.qid, "mention": text, "context": None, "mention_image": image}
            likeness = system.score(system.encode_mentions([mention]), encoded, [TASKS["it2it"]]).reshape(len(pool))
            poorer = (lacking & [bool(value) for value in gold[1:]]).any(1)
            order = np.lexsort((_draw(seed, name, gold.qid).permutation(len(pool)), -likeness, poorer))
            return (pool[place] for place in order if pool[place].entity.qid != gold.qid)

        def change(row: Row) -> dict[str, Any]:
            candidates = candidates_of(row)
            if row["answer"] < 0 or not any(seen(gold := candidates[row["answer"]])[1:]):
                return {**row}
            places = [place for place in range(len(candidates)) if place != row["answer"]]
            chosen = list(islice(likeliest(gold), len(places)))
            if len(chosen) < len(places):
                raise M3ELError(
                    f"row {row['id']} has {len(candidates)} candidates, more than there are entities to choose from "
                    f"({len(pool)}): give {name} the rows that are evaluated"
                )
            sources = {column: list(row[column]) for column in SOURCE_COLUMNS if row.get(column)}
            for place, one in zip(places, chosen, strict=True):
                candidates[place] = one.entity
                for column, values in sources.items():
                    values[1 + place] = one.sources.get(column)
            return _with_candidates(row, candidates) | sources

        return change

    return Condition(name, about, prepare)


def _pool(rows: Iterable[Row]) -> list[Pooled]:
    """Each candidate of the rows once, by Qid: as some row shows most of it, and of several such the first in order."""
    pool: dict[str, Pooled] = {}
    for row in rows:
        for place, entity in enumerate(candidates_of(row)):
            sources = {column: row[column][1 + place] for column in SOURCE_COLUMNS if row.get(column)}
            pool[entity.qid] = min(pool.get(entity.qid, Pooled(entity, sources)), Pooled(entity, sources), key=_poverty)
    return [pool[qid] for qid in sorted(pool)]


def _poverty(one: Pooled) -> tuple[Any, ...]:
    _, name, description, image = one.entity
    missing = sum(not value for value in one.entity[1:])
    return missing, name or "", description or "", image["bytes"] if image else b"", repr(one.sources)


def _by_name(entity: EntityRow) -> EntityRow:
    return entity._replace(description=None, image=None)


def _by_picture(entity: EntityRow) -> EntityRow:
    return EntityRow(entity.qid, None, None, entity.image if _opened(entity.image) else None)


def _by_nothing(entity: EntityRow) -> EntityRow:
    return entity


LIKELY = (
    ("distractors-of-like-name", "distractors have the names most like the gold's", StringMatch("character"), _by_name),
    ("distractors-of-like-picture", "distractors have the pictures most like the gold's", ImageHash(), _by_picture),
    ("distractors-at-random", "distractors are drawn from all rows' candidates: the control", Chance(), _by_nothing),
)


def _all_conditions() -> Iterator[Condition]:
    for make, name, about, edit in MISSING:
        yield make(name, about, edit)
        yield make(f"{name}-half", f"{about}, with a chance of a half", _half(edit))
    for name, about, edit in NOISY:
        yield _of_entities(name, about, edit)
    for side, plural, make in (("mention", "mentions", _of_mentions), ("entity", "entities", _of_entities)):
        for name, about, corrupt in CORRUPTED:
            yield make(f"{side}-picture-{name}", f"pictures of {plural} {about}", _pictured(corrupt))
    for name, about, system, seen in LIKELY:
        yield _of_distractors(name, about, system, seen)


CONDITIONS: Mapping[str, Condition] = {one.name: one for one in _all_conditions()}
"""By name, in the order of a table."""
