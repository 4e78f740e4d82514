from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m3el_hf import M3ELError
from m3el_hf.data.collator import EntityRow, candidates_of, undecoded
from m3el_hf.experiments.conditions import CONDITIONS
from tests.conftest import encoded

Row = dict[str, Any]

MENTION_SHOWN = {"mention", "context", "mention_image"}
ENTITY_SHOWN = {"candidate_names", "candidate_descriptions", "candidate_images"}
CHANGED = {
    "mention-without-picture": {"mention_image"},
    "mention-without-sentence": {"context"},
    "mention-without-name": {"mention", "context"},
    "entity-without-picture": {"candidate_images"},
    "entity-without-description": {"candidate_descriptions"},
    "description-": {"candidate_descriptions"},
    "mention-picture-": {"mention_image"},
    "entity-picture-": {"candidate_images"},
    "distractors-": ENTITY_SHOWN | {"candidate_qids", "image_urls", "licences"},
}
"""The columns that conditions may change, by how their names begin."""

DISTRACTORS = [name for name in CONDITIONS if name.startswith("distractors-")]


def picture(seed: int, size: tuple[int, int] = (40, 30), file: str = "PNG") -> dict[str, Any]:
    """Blocks of many colours."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).resize(size, Image.Resampling.NEAREST).save(buffer, file)
    return {"bytes": buffer.getvalue(), "path": None}


def opened(image: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image["bytes"])), dtype=np.float64)


BROKEN = {"bytes": b"\x89PNG\r\n\x1a\nno picture", "path": None}


def entity(number: int, **changes: Any) -> EntityRow:
    whole = EntityRow(
        f"Q{number}", f"Name {number}", f"the {number}th of the many things that are here", picture(number)
    )
    return whole._replace(**changes)


def row_of(number: int, candidates: list[EntityRow], answer: int = 1, **changes: Any) -> Row:
    columns = [list(column) for column in zip(*candidates, strict=True)]
    names = ("candidate_qids", "candidate_names", "candidate_descriptions", "candidate_images")
    return {
        "id": f"row-{number}",
        "topic": "person",
        "mention": f"Name {number}",
        "context": f"We saw Name {number} there.",
        "mention_image": picture(1000 + number),
        "answer": answer,
        "answer_qid": candidates[answer].qid,
        **dict(zip(names, columns, strict=True)),
        "mention_image_is_gold": False,
        "image_urls": [f"https://example.org/{number}", *(f"https://example.org/{one.qid}" for one in candidates)],
        "licences": [None, *(f"licence of {one.qid}" for one in candidates)],
        **changes,
    }


ROWS = [row_of(n, [entity(3 * n), entity(3 * n + 1), entity(3 * n + 2)], answer=n % 3) for n in range(5)]


def changed(name: str, row: Row, seed: int = 0, rows: list[Row] = ROWS) -> Row:
    return CONDITIONS[name].prepare(rows, seed)(row)


def text_of(description: str, name: str, seed: int = 0) -> str:
    row = row_of(1, [entity(0), entity(1, description=description)])
    return changed(name, row, seed)["candidate_descriptions"][1]


# All conditions.


@pytest.mark.parametrize("name", CONDITIONS)
def test_it_changes_what_it_says_and_nothing_else(name, data):
    allowed = next(columns for begin, columns in CHANGED.items() if name.startswith(begin))
    own = list(undecoded(data["test"]))
    for rows in (ROWS, own):
        before = [repr(row) for row in rows]
        change, seen = CONDITIONS[name].prepare(rows, 0), set()
        for row in rows:
            new = change(row)
            assert new.keys() == row.keys()
            seen |= {column for column in row if new[column] != row[column]}
            assert new["candidate_qids"][row["answer"]] == row["answer_qid"]
            assert len({len(new[column]) for column in ENTITY_SHOWN | {"candidate_qids"}}) == 1
            assert len(set(new["candidate_qids"])) == len(row["candidate_qids"])
        assert seen and seen <= allowed
        assert [repr(row) for row in rows] == before
    assert CONDITIONS[name].name == name and not CONDITIONS[name].about.endswith(".")


@pytest.mark.parametrize("name", CONDITIONS)
def test_the_seed_decides_and_the_order_of_rows_does_not(name):
    some = [changed(name, row) for row in ROWS]
    change = CONDITIONS[name].prepare(ROWS[::-1], 0)
    assert [change(row) for row in ROWS[::-1]][::-1] == some
    draws = {repr([changed(name, row, seed) for row in ROWS]) for seed in range(6)}
    fixed = ("without", "first", "blur", "jpeg", "16", "grey", "like-picture")
    is_fixed = any(word in name for word in fixed) and not name.endswith("-half")
    assert len(draws) == 1 if is_fixed else len(draws) > 1


@pytest.mark.parametrize("name", [name for name in CONDITIONS if name.startswith(("entity", "description"))])
def test_an_entity_is_changed_alike_in_every_row(name):
    shared = [entity(n) for n in range(6)]
    one, other = row_of(1, shared), row_of(2, shared[::-1], answer=3)
    first, second = (
        {candidate.qid: candidate for candidate in candidates_of(changed(name, row))} for row in (one, other)
    )
    assert first == second


@pytest.mark.parametrize("name", CONDITIONS)
def test_what_is_absent_stays_absent(name):
    bare = entity(1, description=None, image=None)
    rows = [
        row_of(1, [entity(0, description=None), bare, entity(2, name=None, description=None)], context=None),
        row_of(2, [entity(3, description=""), entity(4, image=None)], mention_image=None),
        row_of(3, [entity(5), entity(6)], context=None, mention_image=None),
        row_of(4, [entity(7)], answer=0, image_urls=None, licences=None),
    ]
    change = CONDITIONS[name].prepare(rows, 0)
    for row in rows:
        new = change(row)
        for column in MENTION_SHOWN:
            assert row[column] is not None or new[column] is None
        if name not in DISTRACTORS:
            for column in ENTITY_SHOWN:
                pairs = zip(row[column], new[column], strict=True)
                assert all(one is not None or other is None for one, other in pairs)
        assert any(new[column] for column in MENTION_SHOWN)
        assert all(any(one[1:]) for one in candidates_of(new))


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("text", ["مدينة كبيرة في الجنوب قرب البحر الأحمر", "🎸👩‍🚀 🇫🇷", "band", "x", "世界遺産", " "])
def test_any_text_will_do(name, text):
    row = row_of(1, [entity(0, description=text), entity(1, name=text, description=text)], mention=text, context=text)
    new = changed(name, row, rows=[row, *ROWS])
    for one in (new["mention"], new["context"], *new["candidate_names"], *new["candidate_descriptions"]):
        assert one is None or one.encode()
    assert all(any(one[1:]) for one in candidates_of(new))


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_dataset_maps_to_the_same_rows(name, data):
    rows = undecoded(data["test"])
    change = CONDITIONS[name].prepare(rows, 1)
    mapped = rows.map(change, load_from_cache_file=False)
    assert mapped.features == rows.features
    assert list(mapped) == [change(row) for row in rows]


# What is missing.


def test_a_mention_without_its_name_does_not_hold_it_in_the_sentence():
    def sentence(name: str, context: str | None) -> str | None:
        new = changed("mention-without-name", ROWS[0] | {"mention": name, "context": context})
        assert new["mention"] is None
        return new["context"]

    assert sentence("Art", "Art, party art: the ART.") == ", party : the ."
    assert sentence("C++ (language)", "I write C++ (language) daily.") == "I write daily."
    assert sentence("العراق", "سافر إلى والعراق أمس") == "سافر إلى و أمس"
    assert sentence("東京", "私は東京に住む") == "私は に住む"
    assert sentence("Kansas", "Kansas") is None
    assert sentence("Kansas", None) is None


def test_a_side_that_would_have_nothing_left_keeps_what_it_has():
    only_picture = entity(1, name=None, description=None)
    row = row_of(1, [entity(0), only_picture], context=None, mention_image=None)
    assert changed("entity-without-picture", row)["candidate_images"] == [None, only_picture.image]
    assert changed("mention-without-name", row) == row


@pytest.mark.parametrize("name", [name for name in CONDITIONS if name.endswith("-half")])
def test_a_half_is_a_half_of_what_the_whole_changes(name):
    rows = [row_of(n, [entity(0), entity(1), entity(2 + n)]) for n in range(200)]
    whole, half = ([changed(one, row) for row in rows] for one in (name.removesuffix("-half"), name))
    hit = sum(one == row for one, row in zip(half, rows, strict=True))
    if name.startswith("mention"):
        assert 70 < hit < 130
        assert all(new in (row, all_) for new, row, all_ in zip(half, rows, whole, strict=True))
    else:
        column = "candidate_images" if "picture" in name else "candidate_descriptions"
        assert 70 < sum(row[column][2] is None for row in half) < 130


# Descriptions.

WORDS = "the first of many long rivers that run through wide plains to one cold northern sea"


def distance(one: str, other: str) -> int:
    """Insertions, deletions, substitutions, and swaps of neighbours that take one text to the other."""
    table = np.add.outer(np.arange(len(one) + 1), np.arange(len(other) + 1))
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            steps = [table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b)]
            if i > 1 and j > 1 and a == other[j - 2] and b == one[i - 2]:
                steps.append(table[i - 2, j - 2] + 1)
            table[i, j] = min(steps)
    return int(table[-1, -1])


@pytest.mark.parametrize("share", [10, 30])
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), text=st.text(min_size=1, max_size=60))
def test_typos_are_as_many_as_they_say(share, seed, text):
    new = text_of(text, f"description-typos-{share}", seed)
    most = -(-share * len(text) // 100)
    assert abs(len(new) - len(text)) <= most
    assert 0 <= distance(text, new) <= 2 * most  # a swap beside another change may count twice
    assert set(new) <= set(text) and new


def test_of_typos_some_swap_some_drop_and_some_insert():
    news = [text_of(WORDS, "description-typos-30", seed) for seed in range(20)]
    lengths = {len(new) - len(WORDS) for new in news}
    assert min(lengths) < 0 < max(lengths)
    assert any(sorted(text_of("ab", "description-typos-10", seed)) == ["a", "b"] for seed in range(20))
    few, many = (
        np.mean([distance(WORDS, text_of(WORDS, f"description-typos-{share}", seed)) for seed in range(10)])
        for share in (10, 30)
    )
    assert 0.08 * len(WORDS) < few < 0.11 * len(WORDS) < 0.2 * len(WORDS) < many < 0.31 * len(WORDS)


def test_words_are_dropped_shuffled_and_cut_off():
    words = WORDS.split()
    left = text_of(WORDS, "description-words-dropped").split()
    places = [words.index(word) for word in left]
    assert len(left) == len(words) - round(0.3 * len(words)) and places == sorted(places)
    shuffled = text_of(WORDS, "description-words-shuffled").split()
    assert sorted(shuffled) == sorted(words) and shuffled != words
    assert text_of(WORDS, "description-first-8-words") == "the first of many long rivers that run"
    assert text_of(WORDS, "description-first-3-words") == "the first of"
    for name in ("words-dropped", "words-shuffled", "first-8-words", "first-3-words"):
        assert text_of("band", f"description-{name}") == "band"


# Pictures.


def corrupted(name: str, image: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    new = changed(f"entity-picture-{name}", row_of(1, [entity(0), entity(1, image=image)]), seed)
    assert changed(f"mention-picture-{name}", ROWS[0] | {"mention_image": image})["mention_image"] is not None
    return new["candidate_images"][1]


def flat(size: tuple[int, int], colour: tuple[int, int, int] = (200, 100, 50)) -> dict[str, Any]:
    return {"bytes": encoded(Image.new("RGB", size, colour)), "path": None}


CORRUPTIONS = [name.removeprefix("entity-picture-") for name in CONDITIONS if name.startswith("entity-picture-")]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_picture_of_any_kind_is_changed_and_one_that_is_broken_is_not(name):
    assert corrupted(name, BROKEN) == BROKEN
    assert corrupted(name, {"bytes": b"", "path": None}) == {"bytes": b"", "path": None}
    for image in (picture(1), picture(1, (300, 500), "JPEG"), picture(2, (400, 20), "WEBP"), picture(3, (16, 16))):
        new = corrupted(name, image)
        values, before = opened(new), opened(image)
        if not (name == "16-pixels" and min(before.shape[:2]) <= 16):
            assert values.shape != before.shape or not np.array_equal(values, before)
        assert min(values.shape[:2]) <= 224 and Image.open(io.BytesIO(new["bytes"])).mode == "RGB"
    assert opened(corrupted(name, flat((1, 1)))).shape == (1, 1, 3)
    tagged = io.BytesIO()
    Image.new("RGB", (20, 20)).save(tagged, "JPEG", comment=b"the gold", exif=Image.Exif())
    assert b"the gold" not in corrupted(name, {"bytes": tagged.getvalue(), "path": None})["bytes"]


def test_noise_is_as_strong_as_it_says():
    noise = opened(corrupted("noise", flat((200, 200), (128, 128, 128)))) - 128
    assert noise.std() == pytest.approx(0.18 * 255, rel=0.03) and abs(noise.mean()) < 1


def test_blur_spreads_an_edge_by_its_share_of_the_picture():
    """The slope of a blurred step is that of a Gaussian's integral, 1 / (sigma sqrt(2 pi)) of it a pixel."""
    for side in (224, 112):
        image = Image.new("RGB", (side, side))
        image.paste((255, 255, 255), (side // 2, 0, side, side))
        slope = np.diff(opened(corrupted("blur", {"bytes": encoded(image), "path": None}))[side // 2, :, 0]).max()
        sigma = 255 / slope / np.sqrt(2 * np.pi)
        assert sigma == pytest.approx(3 * side / 224, rel=0.1)


def test_jpeg_is_of_quality_10():
    image, buffer = picture(1), io.BytesIO()
    Image.open(io.BytesIO(image["bytes"])).save(buffer, "JPEG", quality=10)
    assert np.array_equal(opened(corrupted("jpeg", image)), opened({"bytes": buffer.getvalue()}))


def test_sixteen_pixels_grey_quarter_and_turn():
    assert opened(corrupted("16-pixels", picture(1, (60, 120)))).shape == (32, 16, 3)
    grey = opened(corrupted("grey", picture(1)))
    assert (grey == grey[..., :1]).all()
    hidden = (opened(corrupted("occluded", flat((80, 40)))) == 128).all(-1)
    assert hidden.mean() == 0.25
    rows, columns = hidden.any(1), hidden.any(0)
    assert hidden.sum() == rows.sum() * columns.sum()
    turns = {corrupted("rotated", picture(1, (50, 50)), seed)["bytes"] for seed in range(8)}
    assert len(turns) == 2
    pixels = Image.open(io.BytesIO(picture(1, (50, 50))["bytes"]))
    expected = [pixels.rotate(angle, Image.Resampling.BICUBIC, fillcolor=(128, 128, 128)) for angle in (15, -15)]
    assert {np.asarray(one).tobytes() for one in expected} == {
        opened({"bytes": turn}).astype(np.uint8).tobytes() for turn in turns
    }


# Distractors.


def others_of(row: Row) -> list[str]:
    return [qid for place, qid in enumerate(row["candidate_qids"]) if place != row["answer"]]


NAMES = ["Kansas", "Kansas City", "Arkansas", "Texas", "Ohio", "Kansai", "مدينة", "🎸"]


def test_distractors_of_like_name_share_words_and_characters_with_the_gold():
    named = [entity(n, name=name) for n, name in enumerate(NAMES)]
    rows = [row_of(1, [named[4], named[0], named[3]]), row_of(2, named[5:] + named[1:3], answer=0)]
    new = changed("distractors-of-like-name", rows[0], rows=rows)
    assert new["candidate_names"] == ["Kansas City", "Kansas", "Arkansas"]
    assert new["candidate_descriptions"][0] == named[1].description
    assert new["image_urls"] == [
        "https://example.org/1",
        *(f"https://example.org/{qid}" for qid in new["candidate_qids"]),
    ]
    assert new["licences"] == [None, *(f"licence of {qid}" for qid in new["candidate_qids"])]


def test_distractors_of_like_picture_look_like_the_gold():
    base = np.random.default_rng(0).integers(60, 190, (8, 8, 3))
    shades = [0, 3, 200, 10, 90]
    pictures = [
        {
            "bytes": encoded(
                Image.fromarray(
                    (base + np.random.default_rng(n).integers(-s, s + 1, base.shape)).clip(0, 255).astype(np.uint8)
                )
            ),
            "path": None,
        }
        for n, s in enumerate(shades)
    ]
    shown = [entity(n, image=image) for n, image in enumerate(pictures)]
    rows = [row_of(1, [shown[2], shown[0], shown[4]]), row_of(2, [shown[1], shown[3]], answer=0)]
    rows.append(row_of(3, [entity(8, image=BROKEN), entity(9, image=None)]))
    assert changed("distractors-of-like-picture", rows[0], rows=rows)["candidate_qids"] == ["Q1", "Q0", "Q3"]
    assert changed("distractors-of-like-picture", rows[2], rows=rows) == rows[2]  # the gold has none
    broken = rows[2] | {"answer": 0, "answer_qid": "Q8"}
    assert changed("distractors-of-like-picture", broken, rows=[*rows, broken]) == broken
    without = rows[0] | {"answer": -1, "answer_qid": "Q404"}
    assert changed("distractors-of-like-picture", without, rows=[*rows, without]) == without


def test_no_distractor_is_known_by_what_it_lacks_while_there_are_others():
    poor = [entity(n, name="Name 20", image=None) for n in range(4)]
    rows = [row_of(1, [entity(20), poor[0], poor[1]], answer=0), row_of(2, [entity(30), entity(31), *poor])]
    for name in DISTRACTORS:
        assert set(others_of(changed(name, rows[0], rows=rows))) == {"Q30", "Q31"}
    row = row_of(3, [entity(20), *poor[:3]], answer=0)
    qids = changed("distractors-of-like-name", row, rows=[*rows, row])["candidate_qids"]
    assert qids[:3] == ["Q20", "Q30", "Q31"] and qids[3] in {one.qid for one in poor}


def test_an_entity_of_the_pool_is_as_some_row_shows_most_of_it():
    less, more, most = (entity(5, name="Name 1", description=text) for text in (None, "b", "a"))
    rows = [
        row_of(1, [entity(0), entity(1)]),
        *(row_of(2 + n, [one, entity(1)]) for n, one in enumerate((less, more, most))),
    ]
    for order in (rows, rows[::-1]):
        new = changed("distractors-of-like-name", rows[0], rows=order)
        assert new["candidate_qids"] == ["Q5", "Q1"] and new["candidate_descriptions"][0] == "a"


def test_random_distractors_are_drawn_from_all_rows_alike():
    rows = [row_of(n, [entity(3 * n + k) for k in range(3)]) for n in range(8)]
    seen = [qid for seed in range(60) for qid in others_of(changed("distractors-at-random", rows[0], seed, rows))]
    counts = [seen.count(f"Q{n}") for n in range(24)]
    assert counts[1] == 0 and sum(counts) == 120
    assert min(counts[:1] + counts[2:]) > 0 and max(counts) < 20


def test_a_pool_that_is_too_small_is_one_line():
    row = row_of(1, [entity(n) for n in range(4)])
    for name in DISTRACTORS:
        with pytest.raises(
            M3ELError, match=r"row row-1 has 4 candidates, more than .* \(3\): give distractors-[^\n]+$"
        ):
            changed(name, row, rows=ROWS[:1])
        assert set(others_of(changed(name, row, rows=[row]))) == {"Q0", "Q2", "Q3"}  # its own are enough
