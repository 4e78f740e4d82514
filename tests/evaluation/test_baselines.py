from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Sequence
from typing import Any

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m3el_hf import TASKS, M3ELError
from m3el_hf.data.collator import EntityRow
from m3el_hf.evaluation.baselines import BM25, Chance, ImageHash, StringMatch, baselines
from m3el_hf.evaluation.systems import Row, Scores, System

# Few letters, so that words meet; scripts from the right, marks, emoji, a capital that is longer in lower case.
ALPHABET = "abAB אבب تİß\u0301हिé🙂👩🏽\u200d🚀.,'_1\n\ud800"
TEXTS = st.none() | st.text(st.sampled_from(ALPHABET), max_size=20)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6)


def mentions_of(texts: Sequence[tuple[str | None, str | None]], image: Any = None) -> list[Row]:
    return [{"mention": name, "context": context, "mention_image": image} for name, context in texts]


def entities_of(texts: Sequence[tuple[str | None, str | None]], image: Any = None) -> list[EntityRow]:
    return [EntityRow(f"Q{number}", *text, image) for number, text in enumerate(texts)]


def scored(system: System, mentions: Sequence[Row], entities: Sequence[EntityRow]) -> Scores:
    task = next(task for task in TASKS.values() if system.can_do(task))
    return system.score(system.encode_mentions(mentions), system.encode_entities(entities), [task])[0]


def drawn(*quarters: tuple[int, int, int], size: int = 40) -> dict[str, Any]:
    """A picture of four coloured quarters."""
    picture = Image.fromarray(np.array(quarters, dtype=np.uint8).reshape(2, 2, 3))
    file = io.BytesIO()
    picture.resize((size, size), Image.Resampling.NEAREST).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


RED, BLUE, WHITE, BLACK = (200, 30, 30), (30, 30, 200), (255, 255, 255), (0, 0, 0)

SENTENCES = (
    ("Kansas", "Kansas toured in 1976 with the band."),
    ("Kansas", "the state of the plains, in the middle"),
    ("Kanzas", None),
    (None, None),
    ("", ""),
    ("القاهرة", "عاصمة مصر في الشمال"),
    ("🙂", "🙂 👩🏽\u200d🚀 flew"),
)
KNOWN = (
    ("Kansas", "a band from Topeka that toured in 1976"),
    ("Kansas", "a state of the plains"),
    ("القاهرة", "مدينة في مصر"),
    ("🙂", None),
    (None, "a state, a state, a state"),
    ("", None),
    ("Topeka", "capital of the state"),
)


def everything() -> tuple[list[Row], list[EntityRow]]:
    """Mentions and entities with texts and pictures of all kinds, and without."""
    random = np.random.default_rng(0)
    mentions = [*mentions_of(SENTENCES), *mentions_of(SENTENCES[:3])]
    entities = [*entities_of(KNOWN), *entities_of(KNOWN[::-1])]
    for index in range(0, len(mentions), 2):
        quarters = random.integers(0, 256, (4, 3)).tolist()
        mentions[index] = {**mentions[index], "mention_image": drawn(*quarters)}
    for index in range(0, len(entities), 2):
        entities[index] = entities[index]._replace(image=drawn(*random.integers(0, 256, (4, 3)).tolist()))
    return mentions, entities


SYSTEMS = baselines(everything()[1])
by_name = pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)


# Their interface.


def test_all_baselines_stand_in_the_order_of_the_tables_and_do_what_they_can_read():
    assert {system.name: [name for name, task in TASKS.items() if system.can_do(task)] for system in SYSTEMS} == {
        "chance": list(TASKS),
        "string match": ["t2t", "t2it", "it2t", "it2it"],
        "character match": ["t2t", "t2it", "it2t", "it2it"],
        "BM25": ["t2t", "t2it", "it2t", "it2it"],
        "image hash": ["i2i", "i2it", "it2i", "it2it"],
    }
    names = ["chance", "string match", "character match", "BM25", "image hash"]
    assert [system.name for system in SYSTEMS] == names


@by_name
def test_scores_are_a_finite_table_of_mentions_by_entities(system):
    mentions, entities = everything()
    scores = scored(system, mentions, entities)
    assert scores.shape == (len(mentions), len(entities))
    assert scores.dtype == np.float64
    assert np.isfinite(scores).all()
    assert scored(system, mentions, []).shape == (len(mentions), 0)
    assert scored(system, [], entities).shape == (0, len(entities))


@by_name
def test_permuted_entities_and_mentions_have_permuted_scores(system):
    mentions, entities = everything()
    rows, columns = (
        np.random.default_rng(seed).permutation(len(side)) for seed, side in ((0, mentions), (1, entities))
    )
    permuted = scored(system, [mentions[row] for row in rows], [entities[column] for column in columns])
    assert np.array_equal(permuted, scored(system, mentions, entities)[np.ix_(rows, columns)])


@by_name
@pytest.mark.parametrize("size", [1, 3])
def test_chunks_change_no_bit_of_a_score(system, size):
    mentions, entities = everything()
    chunks = [scored(system, mentions, entities[start : start + size]) for start in range(0, len(entities), size)]
    assert np.array_equal(np.concatenate(chunks, axis=1), scored(system, mentions, entities))
    chunks = [scored(system, mentions[start : start + size], entities) for start in range(0, len(mentions), size)]
    assert np.array_equal(np.concatenate(chunks), scored(system, mentions, entities))


def test_chunks_change_no_bit_of_a_long_sum():
    random = np.random.default_rng(0)
    texts = [(None, " ".join(map(str, random.integers(0, 50, 40)))) for _ in range(220)]
    mentions, entities = mentions_of(texts[:20]), entities_of(texts[20:])
    system = BM25(entities)
    whole = scored(system, mentions, entities)
    assert np.unique(whole).size > 3_000
    for order in (range(200), random.permutation(200)):
        chunks = [
            scored(system, mentions, [entities[index] for index in order[start : start + 7]])
            for start in range(0, 200, 7)
        ]
        assert np.array_equal(np.concatenate(chunks, axis=1), whole[:, order])


@by_name
def test_what_is_encoded_is_indexed_by_rows(system):
    mentions, entities = map(
        lambda encode, side: encode(side), (system.encode_mentions, system.encode_entities), everything()
    )
    rows, columns = np.array([4, 0, 4]), np.array([2, 1])
    assert (len(mentions), len(mentions[rows]), len(entities[columns])) == (10, 3, 2)
    expected = system.compare(mentions, entities)
    assert np.array_equal(system.compare(mentions[rows], entities[columns]), expected[np.ix_(rows, columns)])
    assert np.array_equal(system.compare(mentions[2:4], entities[5:]), expected[2:4, 5:])


@by_name
def test_encoding_leaves_nothing_behind(system):
    before = pickle.dumps(system)
    mentions, entities = everything()
    scored(system, [{**row, "context": "never seen before"} for row in mentions], entities)
    scored(system, mentions, [one._replace(description="never seen before") for one in entities])
    assert pickle.dumps(system) == before


def test_without_entities_nothing_can_be_fitted():
    with pytest.raises(M3ELError, match="there are none: choose a split"):
        baselines([])


def test_entities_may_be_read_but_once():
    mentions, entities = everything()
    for system, same in zip(SYSTEMS, baselines(iter(entities)), strict=True):
        assert np.array_equal(scored(system, mentions, entities), scored(same, mentions, entities))


def test_chance_scores_all_alike():
    assert np.unique(scored(Chance(), *everything())).size == 1


# Strings.


def plain_words(*texts: str | None) -> list[str]:
    return [word for text in texts if text for word in re.findall(r"\w+", text.lower())]


def plain_trigrams(*texts: str | None) -> set[str]:
    words = [f" {word} " for text in texts if text for word in text.lower().split()]
    return {word[start : start + 3] for word in words for start in range(len(word) - 2)}


def plain_dice(one: set[str], other: set[str]) -> float:
    return 2 * len(one & other) / (len(one) + len(other)) if one or other else 0.0


@given(PAIRS, PAIRS)
def test_string_match_is_the_dice_overlap_of_the_sets_of_words(mentions, entities):
    expected = [[plain_dice(set(plain_words(*one)), set(plain_words(*two))) for two in entities] for one in mentions]
    assert scored(StringMatch("token"), mentions_of(mentions), entities_of(entities)).tolist() == expected


@given(PAIRS, PAIRS)
def test_character_match_is_the_dice_overlap_of_the_sets_of_trigrams_within_words(mentions, entities):
    expected = [[plain_dice(plain_trigrams(*one), plain_trigrams(*two)) for two in entities] for one in mentions]
    assert scored(StringMatch("character"), mentions_of(mentions), entities_of(entities)).tolist() == expected


def test_words_count_once_whatever_their_case_and_order():
    mentions = mentions_of([("Kansas", "KANSAS toured, 1976!"), ("Kansas", None)])
    entities = entities_of([("Kansas", "a band (toured in 1976)"), ("kansas", None), ("Łódź", "a town"), ("", None)])
    expected = [[6 / 9, 2 / 4, 0, 0], [2 / 7, 1, 0, 0]]
    assert scored(StringMatch(), mentions, entities).tolist() == expected


def test_characters_stand_misspelling_and_inflection_where_words_do_not():
    mentions = mentions_of([("Constantinopel", None), ("Киева", None)])
    entities = entities_of([("Constantinople", None), ("Киев", None)])
    assert not scored(StringMatch("token"), mentions, entities).any()
    characters = scored(StringMatch("character"), mentions, entities)
    assert characters.diagonal().tolist() == [2 * 11 / 28, 2 * 3 / 9]
    assert characters[0, 1] == characters[1, 0] == 0


@pytest.mark.parametrize("text", ["القاهرة", "ירושלים", "हिन्दी", "東京", "🙂", "👩🏽\u200d🚀", "\ud800"])
def test_text_of_any_script_and_emoji_are_most_like_themselves_by_their_characters(text):
    entities = entities_of([("Kansas", "a state"), (text, None), (None, None)])
    assert scored(StringMatch("character"), mentions_of([(text, None)]), entities).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("system", SYSTEMS[1:4], ids=lambda system: system.name)
def test_no_text_scores_zero(system):
    nothing = [(None, None), ("", ""), (" \n", None)]
    _, entities = everything()
    assert not scored(system, mentions_of(nothing), entities).any()
    assert not scored(system, mentions_of([("Kansas", "a state")]), entities_of(nothing)).any()


@pytest.mark.parametrize("system", SYSTEMS[1:4], ids=lambda system: system.name)
def test_very_long_text_is_scored(system):
    long = " ".join(f"state{number}" for number in range(50_000)) + "x" * 500_000
    scores = scored(
        system, mentions_of([("Kansas", long), ("plains", None)]), entities_of([(long, None), ("plains", long)])
    )
    assert (scores[0] > 0).all() and scores[1, 1] > scores[1, 0] == 0


# BM25.


def textbook(query: list[str], document: list[str], corpus: list[list[str]]) -> float:
    """Robertson and Zaragoza (2009), with Lucene's inverse document frequency, word by word."""
    average = sum(map(len, corpus)) / len(corpus)
    score = 0.0
    for word in query:
        having = sum(word in one for one in corpus)
        times = document.count(word)
        if times:
            rarity = math.log(1 + (len(corpus) - having + 0.5) / (having + 0.5))
            score += rarity * times / (times + 1.5 * (1 - 0.75 + 0.75 * len(document) / average))
    return score


@given(PAIRS, PAIRS, PAIRS)
def test_bm25_is_the_textbooks_formula_also_for_entities_that_it_was_not_fitted_on(mentions, fitted, others):
    corpus = [plain_words(*texts) for texts in fitted]
    entities = [*fitted, *(others if any(corpus) else [])]  # else there is no average length to compare with
    expected = [
        [textbook(plain_words(*mention), plain_words(*texts), corpus) for texts in entities] for mention in mentions
    ]
    found = scored(BM25(entities_of(fitted)), mentions_of(mentions), entities_of(entities))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@settings(max_examples=30)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12), min_size=2, max_size=12))
def test_bm25_is_that_of_the_library_bm25s(corpus):
    library = bm25s.BM25(method="lucene", dtype="float64")
    library.index(corpus, show_progress=False)
    query = list("aabcz")
    entities = entities_of([(None, " ".join(document)) for document in corpus])
    found = scored(BM25(entities), mentions_of([(None, " ".join(query))]), entities)
    np.testing.assert_allclose(found[0], library.get_scores(query), rtol=1e-12)


def test_rare_words_decide_by_bm25():
    entities = entities_of([("one", "a state of plains"), ("two", "a state of bands"), ("three", "a state of towns")])
    system = BM25(entities)
    state, plains = scored(system, mentions_of([(None, "a state of"), (None, "plains")]), entities)
    assert state.max() < plains[0]
    assert np.unique(state).size == 1 and not plains[1:].any()


def test_an_entity_twice_in_the_corpus_counts_twice():
    entities = entities_of([("plains", None), ("state", None), ("state", None)])
    plains, state, _ = scored(BM25(entities), mentions_of([("plains state", None)]), entities)[0]
    assert plains == pytest.approx(math.log(1 + 2.5 / 1.5) / 2.5) and state == pytest.approx(
        math.log(1 + 1.5 / 2.5) / 2.5
    )


def test_a_corpus_without_words_scores_zero():
    entities = entities_of([(None, None), ("", None)])
    assert not scored(BM25(entities), mentions_of([("Kansas", None)]), entities).any()


# Pictures.


def test_image_hash_is_the_cosine_of_small_centred_pictures():
    colours = (RED, BLUE, WHITE, BLACK)
    same, other = drawn(*colours, size=24), drawn(BLUE, RED, BLACK, WHITE)
    opposite = drawn(*(tuple(255 - value for value in colour) for colour in colours))
    entities = [EntityRow("Q", None, None, image) for image in (same, other, opposite, None)]
    scores = scored(ImageHash(), mentions_of([(None, None)], drawn(*colours)), entities)[0]
    one, two = (np.array(quarters, dtype=float).ravel() for quarters in (colours, (BLUE, RED, BLACK, WHITE)))
    one, two = one - one.mean(), two - two.mean()
    assert scores == pytest.approx([1, one @ two / np.linalg.norm(one) / np.linalg.norm(two), -1, 0])


@pytest.mark.parametrize("level", [0, 90, 255])
def test_a_picture_of_one_grey_is_like_no_other(level):
    grey = drawn(*[(level,) * 3] * 4)
    entities = [EntityRow("Q", None, None, image) for image in (grey, drawn(RED, BLUE, WHITE, BLACK))]
    assert scored(ImageHash(), mentions_of([(None, None)], grey), entities).tolist() == [[0, 0]]


def test_pictures_of_one_colour_are_compared_by_their_colour():
    red, dark_red, blue = (drawn(*[colour] * 4) for colour in (RED, (100, 15, 15), BLUE))
    entities = [EntityRow("Q", None, None, image) for image in (dark_red, blue)]
    assert scored(ImageHash(), mentions_of([(None, None)], red), entities)[0] == pytest.approx([1, -0.5])


def test_a_translucent_picture_is_seen_on_white():
    file = io.BytesIO()
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(file, "PNG")
    clear = ImageHash().encode_entities([EntityRow("Q", None, None, {"bytes": file.getvalue()})])
    assert (clear == 255).all()


def test_every_pixel_counts_in_a_thumbnail():
    noise = np.random.default_rng(0).integers(0, 256, (2, 24, 40, 3), dtype=np.uint8)
    files = [io.BytesIO(), io.BytesIO()]
    for pixels, file in zip(noise, files, strict=True):
        Image.fromarray(pixels).save(file, "PNG")
    one, two = noise.reshape(2, 8, 3, 8, 5, 3).mean((2, 4)).reshape(2, -1)
    mention, entity = ({"bytes": file.getvalue()} for file in files)
    found = scored(ImageHash(), mentions_of([(None, None)], mention), [EntityRow("Q", None, None, entity)])
    assert found[0, 0] == pytest.approx(np.corrcoef(one, two)[0, 1], abs=0.01)
