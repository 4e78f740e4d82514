from __future__ import annotations

import hashlib
import io
import random
import re
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import chain, combinations, islice
from string import Formatter

import numpy as np
import PIL
import pytest
from PIL import Image

from m3el_hf.data import mini
from m3el_hf.data.images import PictureStore
from m3el_hf.data.mini import read_mini
from m3el_hf.data.schema import Entity, Picture, Record
from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TOPICS


@pytest.fixture(scope="module")
def world() -> list[Record]:
    return list(read_mini(instances=400))


def pictures_of(record: Record) -> list[Picture]:
    shown = [candidate.picture for candidate in record.candidates]
    return [picture for picture in (record.picture, *shown) if picture]


def accuracy(world: list[Record], score: Callable[[Record, Entity], float]) -> float:
    """How often the gold scores highest, each tie counted by its probability."""
    hits = []
    for record in world:
        scores = [score(record, candidate) for candidate in record.candidates]
        best = [candidate for candidate, value in zip(record.candidates, scores, strict=True) if value == max(scores)]
        hits.append(sum(candidate.qid == record.answer_qid for candidate in best) / len(best))
    return float(np.mean(hits))


def tokens(text: str | None) -> set[str]:
    return set(re.findall(r"\w+", (text or "").lower()))


def opened(picture: Picture | None) -> Image.Image:
    assert picture is not None and picture.data is not None
    return Image.open(io.BytesIO(picture.data))


def cosine(first: Picture | None, second: Picture | None) -> float:
    """Of the 8 x 8 pixels."""
    small = [np.asarray(opened(picture).resize((8, 8)), dtype=np.float64).ravel() for picture in (first, second)]
    return float(small[0] @ small[1] / np.linalg.norm(small[0]) / np.linalg.norm(small[1]))


def test_same_arguments_give_the_same_world(world):
    assert list(read_mini(instances=400)) == world


def test_a_larger_world_starts_with_the_smaller(world):
    assert list(read_mini(instances=33)) == world[:33]


def digest(parts: Iterable[bytes]) -> str:
    """Of the parts, each behind its length."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()[:24]


def test_worlds_are_still_those_of_the_first_version(world):
    """Also of how often the pictures roll the dice, since the texts after a picture depend on it."""
    texts = (
        repr(value).encode()
        for record in world
        for value in (
            *(
                f"mini-{record.topic}-{record.answer_qid}{record.id[len(f'mini-{record.topic}') :]}",
                record.source,
                record.topic,
                record.split,
                record.mention,
                record.context,
            ),
            *(record.answer_qid, record.difficulty),
            [(candidate.qid, candidate.name, candidate.description) for candidate in record.candidates],
        )
    )
    assert digest(texts) == "2c2a0bc9a7bb1a928af82683"


@pytest.mark.skipif(PIL.__version__ != "13.0.0", reason="the outline of a polygon differs between releases of Pillow")
def test_pictures_are_still_those_of_the_first_version(world):
    shown = ((record.picture, *(candidate.picture for candidate in record.candidates)) for record in world)
    pixels = (b"None" if picture is None else opened(picture).tobytes() for row in shown for picture in row)
    assert digest(pixels) == "0643d18e2f5670cf077bdc83"


def test_pictures_are_stored_as_png(world):
    store = PictureStore()
    for picture in islice(chain.from_iterable(map(pictures_of, world)), 100):
        file = io.BytesIO()
        Image.fromarray(np.asarray(opened(picture))).save(file, "PNG")
        assert store.stored_bytes(picture) == file.getvalue()


@pytest.mark.parametrize("topic", TOPICS)
def test_names_last(topic):
    drawn = list(mini._draw_names(random.Random(0), topic))
    lengths = [len(name.split()) for name in drawn]
    assert lengths == [2] * 480 + [3] * 18_720
    assert len(set(drawn)) == len(drawn)
    assert all(len(set(name.split())) == len(name.split()) for name in drawn)
    smallest = mini.GROUP_SIZES[0] * mini.MENTIONS_PER_ENTITY[0]
    assert mini.MOST_INSTANCES == len(drawn) * len(TOPICS) * smallest >= 100_000


def test_first_words_belong_to_one_topic():
    words = [word for firsts in mini.FIRST_WORDS.values() for word in firsts.split()]
    assert len(set(words)) == len(words)
    assert not set(words) & set(mini.LAST_WORDS.split())


def test_a_world_goes_on_when_the_names_of_two_words_are_used_up(monkeypatch):
    monkeypatch.setattr(mini, "LAST_WORDS", "Lantern Kestrel")  # 24 short names and as many long ones a topic
    names = defaultdict(dict)  # of a topic, as they come
    for record in read_mini(instances=5 * 300):
        names[record.topic][record.mention] = len(record.mention.split())
    for lengths in (list(known.values()) for known in names.values()):
        assert len(lengths) > 24
        assert lengths == [2] * 24 + [3] * (len(lengths) - 24)


def test_a_world_is_never_held():
    tracemalloc.start()
    try:
        for _ in read_mini(instances=100):
            pass
        start, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in read_mini(instances=400):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - start < 2_000_000  # the pictures of 400 rows take 7 MB


def test_another_seed_gives_another_world(world):
    other = list(read_mini(instances=50, seed=1))
    assert not {record.context for record in other} & {record.context for record in world}
    drawn, known = ({p.data for record in records for p in pictures_of(record)} for records in (other, world))
    assert not drawn & known


def test_topics_take_turns(world):
    assert Counter(record.topic for record in world) == dict.fromkeys(TOPICS, 80)


def test_rows_can_be_told_apart(world):
    assert len({record.id for record in world}) == len(world)
    assert world[12].source == "mini row 12"
    assert world[12].id.endswith("-12")
    assert {record.split for record in world} == {None}


def test_gold_comes_first_of_three(world):
    for record in world:
        qids = [candidate.qid for candidate in record.candidates]
        assert len(set(qids)) == len(qids) == 3
        assert record.answer_qid == qids[0]


def test_names_decide_nothing(world):
    for record in world:
        assert {candidate.name for candidate in record.candidates} == {record.mention}
        assert record.mention in record.context


def test_groups_are_closed(world):
    names, topics = defaultdict(set), defaultdict(set)
    for record in world:
        topics[record.mention].add(record.topic)
        for candidate in record.candidates:
            names[candidate.qid].add(record.mention)
    assert all(len(owners) == 1 for owners in (*names.values(), *topics.values()))


def test_entities_are_mentioned_about_equally_often(world):
    mentions = Counter(record.answer_qid for record in world)
    last_names = {record.mention for record in world[-len(TOPICS) :]}  # their groups are cut short
    whole = [record for record in world if record.mention not in last_names]
    assert {mentions[candidate.qid] for record in whole for candidate in record.candidates} == {2, 3}


def test_an_entity_is_the_same_in_every_row(world):
    entities = {candidate.qid: candidate for record in world for candidate in record.candidates}
    assert all(entities[candidate.qid] == candidate for record in world for candidate in record.candidates)
    assert len({candidate.picture.data for candidate in entities.values()}) == len(entities)


def test_pictures_decode(world):
    for record in world:
        for picture in pictures_of(record):
            image = opened(picture)
            image.load()
            assert (image.format, image.mode, image.size) == ("BMP", "RGB", (64, 64))


def test_no_mention_shows_a_picture_of_a_candidate(world):
    shown = {candidate.picture.data for record in world for candidate in record.candidates}
    drawn = [record.picture.data for record in world if record.picture]
    assert not shown & set(drawn)
    assert len(set(drawn)) == len(drawn)


def test_only_some_mentions_lack_a_picture(world):
    missing = sum(record.picture is None for record in world)
    assert 0 < missing < 0.05 * len(world)
    assert all(candidate.picture and candidate.description for record in world for candidate in record.candidates)


def test_pixels_decide_some_rows(world):
    pictured = [record for record in world if record.picture]
    found = accuracy(pictured, lambda record, shown: cosine(record.picture, shown.picture))
    assert 0.55 < found < 0.8


def test_shared_words_decide_some_rows(world):
    found = accuracy(world, lambda record, shown: len(tokens(record.context) & tokens(shown.description)))
    assert 0.6 < found < 0.95


def test_no_text_gives_away_a_qid(world):
    for record in world:
        for text in (record.context, *(candidate.description for candidate in record.candidates)):
            assert not re.search(r"Q\d|[{}]", text)


@pytest.mark.parametrize("topic", TOPICS)
def test_templates_tell_enough(topic):
    told = {"role", "place", "decade"}
    for template in mini.CONTEXTS[topic]:
        fields = {field for _, field, _, _ in Formatter().parse(template) if field}
        assert {"name", "sign"} <= fields
        assert len(fields & told) >= 2
    for template in mini.DESCRIPTIONS[topic]:
        assert {field for _, field, _, _ in Formatter().parse(template) if field} == {"sign", *told}


def test_namesakes_differ_in_pictures_and_in_texts():
    rng = random.Random(0)
    for topic in TOPICS:
        for first, second in combinations(mini._draw_namesakes(rng, topic), 2):
            differ = [a != b for a, b in zip(first, second, strict=True)]
            assert sum(differ[:3]) >= 2
            assert sum(differ[3:]) >= 2


def test_every_value_has_its_own_words_and_drawing():
    tables = (mini.SHAPES, mini.COLOURS, mini.PATTERNS, mini.PLACES, mini.DECADES, *mini.ROLES.values())
    assert len(mini.WORDS) == sum(map(len, tables)), "two attributes share a value"
    words = [word for table in tables for synonyms in table.values() for word in synonyms]
    assert len(set(words)) == len(words), "two values share a word"
    assert mini.OUTLINES.keys() == mini.SHAPES.keys()
    assert mini.INKS.keys() == mini.COLOURS.keys()
    assert mini.PATTERN_MASKS.keys() == mini.PATTERNS.keys()


@pytest.mark.parametrize("instances", [0, -1, mini.MOST_INSTANCES + 1])
def test_an_impossible_size_is_refused_at_once(instances):
    with pytest.raises(M3ELError, match=f"cannot generate {instances} instances: ask for 1 to"):
        read_mini(instances=instances)
