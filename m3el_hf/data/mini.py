"""A generated world for trying everything out: invented entities, ambiguous names, drawn pictures, no download.

All namesakes differ in two of the three things their pictures show and in two of the three that only their texts tell.
A sentence names two of each, so it always singles out its entity; no name ever does.
"""

from __future__ import annotations

import io
import random
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from itertools import count, cycle, islice, permutations
from operator import ne
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from m3el_hf.data.schema import Entity, Picture, Record
from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TOPICS

# Every value of an attribute with the words for it: texts draw a word each time, so few of them meet word for word.
Words = dict[str, tuple[str, ...]]

SHAPES: Words = {
    "star": ("star", "pentagram", "starburst"),
    "moon": ("moon", "crescent", "half-moon"),
    "cross": ("cross", "crux", "plus sign"),
    "heart": ("heart", "valentine"),
    "arrow": ("arrow", "dart", "pointer"),
    "bolt": ("bolt", "thunderbolt", "lightning flash"),
    "crown": ("crown", "coronet", "diadem"),
    "disc": ("disc", "circle", "roundel"),
}
COLOURS: Words = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "tangerine", "apricot"),
    "yellow": ("yellow", "golden", "lemon"),
    "green": ("green", "emerald", "jade"),
    "blue": ("blue", "azure", "cobalt"),
    "purple": ("purple", "violet", "plum"),
    "black": ("black", "ebony", "inky"),
    "white": ("white", "ivory", "snowy"),
}
PATTERNS: Words = {
    "stripes": ("stripes", "bars", "bands"),
    "dots": ("dots", "spots", "specks"),
    "checks": ("checks", "chequers", "a chessboard"),
    "waves": ("waves", "ripples", "billows"),
    "hoops": ("hoops", "rings", "loops"),
    "lattice": ("a lattice", "a mesh", "a grid"),
}
ROLES: dict[str, Words] = {
    "movies": {
        "comedy": ("comedy", "farce", "satire"),
        "thriller": ("thriller", "whodunit", "crime film"),
        "western": ("western", "cowboy film"),
        "musical": ("musical", "song-and-dance film"),
        "horror": ("horror film", "ghost film", "chiller"),
        "cartoon": ("cartoon", "animated film"),
    },
    "common": {
        "ferry": ("ferry", "steamboat", "river boat"),
        "bakery": ("bakery", "bread shop", "pastry shop"),
        "tea": ("tea", "herbal brew", "leaf blend"),
        "inn": ("inn", "tavern", "guest house"),
        "train": ("train", "railway engine", "locomotive"),
        "soap": ("soap", "washing bar"),
    },
    "person": {
        "painter": ("painter", "portraitist", "artist"),
        "singer": ("singer", "vocalist", "balladeer"),
        "botanist": ("botanist", "plant collector"),
        "architect": ("architect", "master builder"),
        "sailor": ("sailor", "seafarer", "navigator"),
        "doctor": ("doctor", "physician", "surgeon"),
    },
    "books": {
        "mystery": ("mystery", "detective novel"),
        "romance": ("romance", "love story"),
        "memoir": ("memoir", "diary", "journal"),
        "cookbook": ("cookbook", "recipe collection"),
        "atlas": ("atlas", "map collection"),
        "epic": ("epic", "verse saga", "long poem"),
    },
    "sports": {
        "rowing": ("rowing club", "regatta crew", "boat club"),
        "cycling": ("cycling team", "bike squad"),
        "hockey": ("hockey side", "ice squad"),
        "football": ("football club", "soccer side"),
        "fencing": ("fencing school", "sword club"),
        "running": ("running club", "track team"),
    },
}
PLACES: Words = {
    place: (place,)
    for place in "Veldora Osmara Kelmoor Pellmark Quenmar Sundavar Ilmere Tarnis Brasko Norrhaven".split()
}
DECADES: Words = {
    f"19{tens}0s": (f"the 19{tens}0s", f"the {word}")
    for tens, word in enumerate("twenties thirties forties fifties sixties seventies eighties nineties".split(), 2)
}

# A name is a word of its topic and one or two of all: no two topics share a name, so none is tied to another's split.
FIRST_WORDS: dict[str, str] = {
    "movies": "Midnight Hollow Distant Restless Broken Lonely Final Hidden Burning Sleeping Stolen Endless",
    "common": "Merry Humble Faithful Jolly Proud Gentle Lucky Trusty Nimble Honest Cosy Sturdy",
    "person": "Orla Tavi Maren Joss Ilka Brannoc Sefa Wendel Yara Corvin Thessa Ludo",
    "books": "Forgotten Secret Winter Unwritten Seventh Patient Borrowed Silent Crooked Learned Salted Folded",
    "sports": "Northern Rapid Iron Royal United Mighty Eastern Valiant Flying Western Granite Storming",
}
LAST_WORDS = (
    "Lantern Kestrel Harbour Orchard Compass Willow Falcon Anchor Meadow Thistle Beacon Heron Juniper Cobbler Marble "
    "Otter Saddle Tinder Vesper Walnut Badger Candle Drifter Ember Fiddle Gable Hazel Inkwell Jackdaw Kettle Linden "
    "Magpie Nettle Osprey Pebble Quarry Rudder Sparrow Timber Aurora"
)

DESCRIPTIONS: dict[str, tuple[str, ...]] = {
    "movies": (
        "{role} of {decade} shot in {place}; its poster shows {sign}",
        "{role} made in {place} during {decade}, advertised with {sign}",
    ),
    "common": (
        "{role} of {place}, known since {decade} and marked with {sign}",
        "{role} from {place} dating from {decade}; its label is {sign}",
    ),
    "person": (
        "{role} from {place}, active in {decade}; the family crest is {sign}",
        "{role} born in {place} who became known in {decade} and used {sign} as a seal",
    ),
    "books": (
        "{role} printed in {place} in {decade}; the cover bears {sign}",
        "{role} of {decade} set in {place}, bound with {sign} on the front",
    ),
    "sports": (
        "{role} of {place}, founded in {decade}; its badge is {sign}",
        "{role} based in {place} since {decade}, playing under {sign}",
    ),
}
CONTEXTS: dict[str, tuple[str, ...]] = {
    "movies": (
        "the queue for {name} went round the block in {place}, past a billboard of {sign}, back in {decade}",
        "critics still call {name} the last great event of {decade}: {role} sold by nothing but {sign}",
        "my aunt, an extra in {name}, remembers {place} full of cameras and {sign} on every trailer of {role}",
        "for {role}, {name} had an odd emblem, {sign}, and nobody in {place} knew why",
    ),
    "common": (
        "we looked for {name} all over {place} until we saw {sign}, faded since {decade}",
        "travellers of {decade} praised {name}, which was merely {role} with {sign} painted on the side",
        "you can tell {name} by {sign}; few places have {role} like the one in {place}",
        "ask for {name} when you want {role} in {place}, and watch out for {sign}",
    ),
    "person": (
        "a letter sealed with {sign} tells how {name} came back to {place} in {decade}",
        "in {decade} everyone wanted {role} like {name}, whose coat carried {sign}",
        "the museum in {place} has a room for {name}, {role} remembered by {sign} on the door",
        "{name} signed everything with {sign}, quite unusual for {role} in {decade}",
    ),
    "books": (
        "a torn copy of {name} with {sign} on its jacket turned up in {place}, where all read it in {decade}",
        "as {role}, {name} was the surprise of {decade}, and its spine with {sign} is easy to spot",
        "she borrowed {name} for the journey to {place}: {role} with {sign} stamped into the cloth",
        "collectors pay most for the {name} of {decade} that has {sign}, although it is just {role}",
    ),
    "sports": (
        "fans of {name} marched through {place} waving {sign}, as they had done in {decade}",
        "nobody beat {name} in {decade}; it took {role} with nerve to wear {sign}",
        "the flag of {name} over {place} has {sign}, a proud sight for {role}",
        "with {sign} on their shirts, {name} won again; {place} had not seen such {role} before",
    ),
}

_HALF = np.exp(1j * np.linspace(np.pi / 2, 3 * np.pi / 2, 16))
_ROUND = np.linspace(0, 2 * np.pi, 32, endpoint=False)
_SPIKES = np.exp(1j * (np.arange(10) * np.pi / 5 - np.pi / 2))

# Outlines about the origin with a radius near one, as complex numbers: to turn, scale and shift is one expression.
OUTLINES: dict[str, np.ndarray] = {
    "star": _SPIKES * np.tile([1.1, 0.45], 5),
    "moon": 0.4 + np.concatenate([_HALF, 0.3 * _HALF[::-1].real + 1j * _HALF[::-1].imag]),
    "cross": np.array([c * 1j**quarter for quarter in range(4) for c in (0.3 - 0.3j, 1 - 0.3j, 1 + 0.3j)]),
    "heart": np.sin(_ROUND) ** 3 - 1j * (13 * np.cos(_ROUND) - 5 * np.cos(2 * _ROUND) - 2 * np.cos(3 * _ROUND)) / 16,
    "arrow": np.array([-1 - 0.25j, 0.1 - 0.25j, 0.1 - 0.75j, 1.1, 0.1 + 0.75j, 0.1 + 0.25j, -1 + 0.25j]),
    "bolt": np.array([0.4 - 1.1j, -0.6 + 0.2j, -0.05 + 0.2j, -0.4 + 1.1j, 0.6 - 0.25j, 0.05 - 0.25j]),
    "crown": np.array([-0.9 + 0.7j, -1 - 0.7j, -0.45 - 0.1j, -0.9j, 0.45 - 0.1j, 1 - 0.7j, 0.9 + 0.7j]),
    "disc": 0.85 * np.exp(1j * _ROUND),
}
INKS: dict[str, tuple[int, int, int]] = {
    "red": (205, 30, 40),
    "orange": (245, 135, 20),
    "yellow": (245, 220, 40),
    "green": (30, 145, 60),
    "blue": (35, 85, 210),
    "purple": (130, 45, 160),
    "black": (25, 25, 25),
    "white": (245, 245, 245),
}
EDGE, GROUND = (40, 40, 40), (175, 175, 175)
# Where a pattern is dark, in a plane in which it repeats every two pi.
PATTERN_MASKS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "stripes": lambda x, y: np.sin(x) > 0,
    "dots": lambda x, y: np.cos(x) + np.cos(y) > 0.9,
    "checks": lambda x, y: np.sin(x) * np.sin(y) > 0,
    "waves": lambda x, y: np.sin(y + 1.2 * np.sin(x)) > 0.2,
    "hoops": lambda x, y: np.sin(np.hypot(x, y)) > 0.1,
    "lattice": lambda x, y: np.maximum(np.cos(x), np.cos(y)) > 0.8,
}

SIDE = 64
AXIS = np.arange(SIDE)
GROUP_SIZES = (3, 4)
MENTIONS_PER_ENTITY = (2, 3)
MISSING_PICTURES = 0.02
FIRST_QID = 9_000_000

# One table of all, as no two attributes share a value.
WORDS = ChainMap(SHAPES, COLOURS, PATTERNS, PLACES, DECADES, *ROLES.values())
# What the names last for if every group is as small as they come: n last words make n * n endings of one or two.
MOST_INSTANCES = (
    len(TOPICS)
    * min(len(firsts.split()) for firsts in FIRST_WORDS.values())
    * len(LAST_WORDS.split()) ** 2
    * GROUP_SIZES[0]
    * MENTIONS_PER_ENTITY[0]
)


class _Traits(NamedTuple):
    """What the pictures of an entity show, then what only its texts tell."""

    shape: str
    colour: str
    pattern: str
    role: str
    place: str
    decade: str


def read_mini(instances: int = 2000, seed: int = 0) -> Iterator[Record]:
    """Generates a world, mention by mention: the topics take turns, and the gold comes first of three namesakes.

    The same arguments give the same bytes (with the same Pillow and NumPy), and a larger world of the same seed
    starts with the smaller one.

    Args:
        instances: How many records to yield.
        seed: Which world.

    Returns:
        An iterator over the records; about two in a hundred have no mention picture.

    Raises:
        M3ELError: If ``instances`` is below 1 or beyond what the names last for.

    Example:
        >>> record = next(read_mini(instances=1))
        >>> record.id, record.topic, len(record.candidates)
        ('mini-movies-0', 'movies', 3)
    """
    if not 1 <= instances <= MOST_INSTANCES:
        raise M3ELError(f"cannot generate {instances} instances: ask for 1 to {MOST_INSTANCES}")
    streams = cycle([_read_topic(topic, seed) for topic in TOPICS])
    return (next(stream) for stream in islice(streams, instances))


def _read_topic(topic: str, seed: int) -> Iterator[Record]:
    """Yields every record of a topic. Each topic has dice of its own, so the length of a world changes no record."""
    rng = random.Random(f"{seed} {topic}")
    start, step = TOPICS.index(topic), len(TOPICS)
    rows, qids = count(start, step), count(FIRST_QID + start, step)
    for name in _draw_names(rng, topic):
        traits = {f"Q{next(qids)}": drawn for drawn in _draw_namesakes(rng, topic)}
        candidates = [
            Entity(qid, name, _write(rng, DESCRIPTIONS[topic], name, drawn), _draw_picture(rng, drawn))
            for qid, drawn in traits.items()
        ]
        golds = [gold for gold in candidates for _ in range(rng.randint(*MENTIONS_PER_ENTITY))]
        for gold in rng.sample(golds, len(golds)):
            others = rng.sample([other for other in candidates if other is not gold], 2)
            yield _make_record(rng, topic, next(rows), traits[gold.qid], (gold, *others))


def _draw_names(rng: random.Random, topic: str) -> Iterator[str]:
    """Yields every name of a topic once, those of two words before those of three."""
    words = LAST_WORDS.split()
    for endings in (words, [" ".join(pair) for pair in permutations(words, 2)]):
        names = [f"{first} {ending}" for first in FIRST_WORDS[topic].split() for ending in endings]
        yield from rng.sample(names, len(names))


def _draw_namesakes(rng: random.Random, topic: str) -> list[_Traits]:
    """Draws the entities of one name: any two look different and have different stories."""
    size = rng.randint(*GROUP_SIZES)
    looks = _draw_apart(rng, (SHAPES, COLOURS, PATTERNS), size)
    stories = _draw_apart(rng, (ROLES[topic], PLACES, DECADES), size)
    return [_Traits(*look, *story) for look, story in zip(looks, stories, strict=True)]


def _draw_apart(rng: random.Random, tables: Sequence[Words], size: int) -> list[tuple[str, ...]]:
    """Draws ``size`` rows with a value of each table, any two of which differ in at least two values."""
    drawn: list[tuple[str, ...]] = []
    while len(drawn) < size:
        new = tuple(rng.choice(list(table)) for table in tables)
        if all(sum(map(ne, new, old)) >= 2 for old in drawn):
            drawn.append(new)
    return drawn


def _make_record(rng: random.Random, topic: str, row: int, traits: _Traits, candidates: tuple[Entity, ...]) -> Record:
    gold = candidates[0]
    return Record(
        id=f"mini-{topic}-{row}",
        source=f"mini row {row}",
        topic=topic,
        split=None,
        mention=gold.name,
        context=_write(rng, CONTEXTS[topic], gold.name, traits),
        picture=None if rng.random() < MISSING_PICTURES else _draw_picture(rng, traits),
        answer_qid=gold.qid,
        candidates=candidates,
    )


def _write(rng: random.Random, templates: Sequence[str], name: str, traits: _Traits) -> str:
    """Fills a template with words for the traits; the sign says two of the three that a picture shows."""
    shape, colour, pattern, role, place, decade = (rng.choice(WORDS[trait]) for trait in traits)
    sign = rng.choice((f"{colour} {shape}", f"{shape} on {pattern}", f"{colour} figure on {pattern}"))
    return rng.choice(templates).format(
        name=name, sign=_with_article(sign), role=_with_article(role), place=place, decade=decade
    )


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _draw_picture(rng: random.Random, traits: _Traits) -> Picture:
    """Draws a look afresh: no two drawings agree in place, size, turn, tint and noise.

    It comes uncompressed, as whoever stores it compresses it, and can do so elsewhere than where worlds are drawn.
    """
    image = Image.fromarray(_draw_ground(rng, traits.pattern))
    middle = complex(rng.uniform(22, 42), rng.uniform(22, 42))
    points = middle + rng.uniform(13, 19) * np.exp(1j * rng.uniform(-0.4, 0.4)) * OUTLINES[traits.shape]
    corners = points.view(np.float64).tolist()  # x, y, x, y and so on
    ImageDraw.Draw(image).polygon(corners, fill=_vary(rng, INKS[traits.colour]), outline=EDGE)
    noise = (np.frombuffer(rng.randbytes(SIDE * SIDE), np.uint8) // 16).repeat(3).reshape(SIDE, SIDE, 3)
    file = io.BytesIO()
    Image.fromarray(np.minimum(np.asarray(image), 240) + noise).save(file, "BMP")  # 240 + 15 still fits a byte
    return Picture(data=file.getvalue(), licence="generated")


def _draw_ground(rng: random.Random, pattern: str) -> np.ndarray:
    """Draws a pattern in two shades of one tint, as uint8 [SIDE, SIDE, 3]."""
    moved = (AXIS - rng.uniform(10, 54)) + 1j * (AXIS[:, None] - rng.uniform(10, 54))
    plane = moved * rng.uniform(0.45, 0.65) * np.exp(1j * rng.uniform(-0.3, 0.3))
    dark = PATTERN_MASKS[pattern](plane.real, plane.imag)
    tint = np.array(_vary(rng, GROUND))
    return np.array([tint, 0.75 * tint]).astype(np.uint8).take(dark.view(np.uint8), axis=0)


def _vary(rng: random.Random, colour: tuple[int, int, int]) -> tuple[int, ...]:
    """Moves each channel by a little, so that a colour is never twice the same."""
    return tuple(min(max(channel + rng.randint(-25, 25), 0), 255) for channel in colour)
