from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m3el_hf import ClipNDProcessor
from m3el_hf.modeling.texts_clipnd import CHARACTERS_PER_TOKEN, find, window_start
from tests.conftest import PICTURE


def test_text_is_name_then_detail_on_both_sides(processor):
    expected = processor.tokenizer(["Kansas. a band.", "plains", "star"], padding=True, return_tensors="pt")
    for prepare in (processor.mentions, processor.entities):
        batch = prepare(["Kansas", None, " star "], [" a band. ", "plains", None])
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["attention_mask"], expected["attention_mask"])
        assert batch["has_text"].tolist() == [True, True, True]


def assert_framed(processor: ClipNDProcessor, batch: dict[str, Any]) -> None:
    """Every row is start, tokens, end, padding: CLIP pools at the first end, so none may stand earlier."""
    start, end = processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        real = ids[mask.bool()].tolist()
        assert mask.tolist() == [1] * len(real) + [0] * (len(ids) - len(real))
        assert (real[0], real[-1]) == (start, end)
        assert not {start, end} & set(real[1:-1])


def test_letters_that_end_no_training_word_do_not_end_the_text(processor):
    """The vocabulary of the fixture has learnt neither of these endings."""
    assert_framed(processor, processor.mentions(["Kansas", "Łódź", "7"], ["x q. 1976!", "a z", None]))


def test_a_text_that_spells_a_special_token_is_text(processor):
    tokenizer = processor.tokenizer
    assert_framed(processor, processor.entities(["Kansas"], [f"{tokenizer.eos_token} and {tokenizer.bos_token}"]))


@pytest.mark.parametrize("name", ["Kansas", "a red star", "北京"])
def test_a_context_of_ten_thousand_words_keeps_the_name(processor, name):
    alone = processor.tokenizer(name)["input_ids"][:-1]
    batch = processor.mentions([name], ["word " * 10_000])
    assert batch["input_ids"].shape == (1, processor.max_text_length)
    assert batch["input_ids"][0, : len(alone)].tolist() == alone
    assert batch["input_ids"][0, -1].item() == processor.tokenizer.eos_token_id


@settings(deadline=None, max_examples=40)
@given(
    texts=st.lists(
        st.tuples(st.none() | st.text(max_size=12), st.none() | st.text(max_size=60)), min_size=1, max_size=4
    )
)
def test_any_text_is_prepared_and_only_blanks_are_absent(processor, texts):
    batch = processor.mentions(*zip(*texts, strict=True))
    said = [any(part and part.strip() for part in row) for row in texts]
    assert batch["has_text"].tolist() == said
    assert not batch["has_image"].any()
    if any(said):
        assert batch["input_ids"].shape[0] == len(texts)
        assert batch["input_ids"].shape[1] <= processor.max_text_length
        assert_framed(processor, batch)
    else:
        assert batch["input_ids"] is None and batch["attention_mask"] is None


WORDS = [f"w{number}" for number in range(40)]


def ids_of(processor: ClipNDProcessor, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def said(processor: ClipNDProcessor, name: str | None, context: str) -> str:
    """The one row's text as its tokens spell it."""
    return processor.tokenizer.decode(processor.mentions([name], [context])["input_ids"][0, 1:-1]).strip()


@pytest.mark.parametrize("length", [3, 9, 40])
@settings(deadline=None, max_examples=30)
@given(name=st.text(max_size=12), context=st.text(max_size=200), side=st.sampled_from(["mentions", "entities"]))
def test_what_fits_is_the_whole_text_and_what_does_not_begins_with_the_name(processor, length, name, context, side):
    cut = ClipNDProcessor(processor.image_processor, processor.tokenizer, max_text_length=length)
    name, context = " ".join(name.split()), " ".join(context.split())
    batch = getattr(cut, side)([name, "x"], [context, None])
    found = batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()[1:-1]
    whole = ids_of(processor, ". ".join(part for part in (name, context) if part))
    if len(whole) <= length - 2:
        assert found == whole
    else:
        head = ids_of(processor, name + "." if name and context else name)
        assert found[: len(head)] == head[: length - 2]
        assert len(found) == length - 2 or side == "mentions"


@pytest.mark.parametrize("before", [0, 3, 30, 10_000])
@pytest.mark.parametrize("after", [0, 3, 30, 10_000])
def test_of_a_long_context_the_words_around_the_name_stay(processor, before, after):
    words = [*["plains"] * before, "Topeka", *["star"] * after]
    kept = said(processor, "topeka", " ".join(words)).removeprefix("topeka .").split()
    assert kept.count("topeka") == 1 and set(kept) <= {"plains", "topeka", "star"}
    left, right = kept.index("topeka"), len(kept) - kept.index("topeka") - 1
    if before + after < 7:
        assert (left, right) == (before, after)
    elif min(before, after) >= 30:
        assert min(left, right) >= 3 and abs(left - right) <= 4
    else:
        assert left == before if before < 30 else right == after


@pytest.mark.parametrize(
    ("name", "context", "kept"),
    [
        ("Kansas", f"{' '.join(WORDS)} the art of KANSAS, a band {' '.join(WORDS)}", "the art of kansas, a band"),
        ("art", f"start {' '.join(WORDS)} fine art of the band {' '.join(WORDS)}", "fine art of the"),
        ("北京", f"{' '.join(WORDS)} 我在北京工作 {' '.join(WORDS)}", "我在北京工作"),
        ("C++ (a", f"{' '.join(WORDS)} in C++ (a band) {' '.join(WORDS)}", "in c++ (a band)"),
        ("a   red\nstar", f"{' '.join(WORDS)} of a red\tstar known {' '.join(WORDS)}", "of a red star known"),
        ("Kansas", " ".join(WORDS), "kansas. w0 w1"),
        (None, " ".join(WORDS), "w0 w1"),
    ],
)
def test_the_name_is_found_as_a_word_in_any_case_and_spacing(processor, name, context, kept):
    assert kept.replace(" ", "") in said(processor, name, context).replace(" ", "")


def test_a_window_does_not_begin_within_a_word(processor):
    text = said(processor, "Kansas", f"{'zebra ' * 50}Kansas {'zebra ' * 50}")
    assert set(text.split()[2:-1]) == {"zebra", "kansas"}


@pytest.mark.parametrize("word", ["我们在那里工作", "そこで", "كلمة", "🎸"])
@pytest.mark.parametrize("space", ["", " "])
@pytest.mark.parametrize(("before", "after"), [(200, 0), (200, 200), (0, 200)])
def test_what_stands_before_the_name_stays_in_any_script(processor, word, space, before, after):
    text = said(processor, "topeka", space.join([*[word] * before, "Topeka", *[word] * after]))
    left, right = (part.strip(" .") for part in text.removeprefix("topeka").split("topeka"))
    assert (len(left) >= 2, len(right) >= 2) == (before > 0, after > 0)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("Beyonc\u00e9", "BEYONCE\u0301"),
        ("Beyonce\u0301", "Beyonc\u00e9"),
        ("Beyonce", "Beyonc\u00e9"),
        ("Ho Chi Minh", "H\u1ed3 Ch\u00ed Minh"),
        ("istanbul", "\u0130stanbul"),
        ("\u039f\u0394\u039f\u03a3", "\u03bf\u03b4\u03cc\u03c2"),
    ],
)
def test_the_name_is_found_whatever_its_accents(processor, name, written):
    kept = said(processor, name, f"{'plains ' * 60}{written} star {'plains ' * 60}")
    assert "star" in kept


def test_the_name_is_found_as_a_whole_word_first_and_other_letters_are_others():
    assert find("art", "start art") == 6
    assert find("art", "start") == 2
    assert find("か", "がか") == 1  # voicing is no accent
    assert find("각", "가각") == 1  # nor is a syllable's last letter
    assert find("a.c", "abc a.c") == 4
    assert find("x", "") == find("", "x") == find("x", "y") == 0


@pytest.mark.parametrize(
    ("words", "middle", "start"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 5, 3),
        ([0, 0, 0, 0, 1, 5, 6, 7, 8, 9], 5, 4),
        ([0, 0, 0, 0, 0, 5, 6, 7, 8, 9], 5, 3),  # the word before is longer than the room for it
        ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 5, 3),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 9, 5),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 0, 0),
    ],
)
def test_a_window_has_the_name_in_its_midst_and_begins_with_a_word_where_that_costs_little(words, middle, start):
    assert window_start(middle, 1, 5, words) == start


def test_an_entity_keeps_the_beginning_of_its_description(processor):
    batch = processor.entities(["Kansas"], [f"a band {'of the plains ' * 40} Kansas"])
    assert processor.tokenizer.decode(batch["input_ids"][0]).startswith("<|startoftext|>kansas . a band of the plains")


def test_a_name_beyond_the_limit_is_cut(processor):
    batch = processor.mentions(["star " * 10_000], ["a band " * 10_000])
    assert set(batch["input_ids"][0, 1:-1].tolist()) == set(ids_of(processor, "star"))
    assert batch["input_ids"].shape == (1, processor.max_text_length)


def test_ten_thousand_words_take_little_more_than_a_hundred(processor):
    def seconds(words: int) -> float:
        context = ["plains " * words + "Kansas" + " star" * words] * 20
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            processor.mentions(["Kansas"] * 20, context)
            taken.append(time.perf_counter() - start)
        return min(taken)

    assert CHARACTERS_PER_TOKEN * processor.max_text_length < 10_000
    assert seconds(5_000) < 20 * seconds(50)  # 100 times as long


def test_accents_may_be_written_either_way(processor):
    one, other = processor.mentions(["Beyonc\u00e9"]), processor.mentions(["Beyonce\u0301"])
    assert torch.equal(one["input_ids"], other["input_ids"])


@pytest.mark.parametrize("text", ["\0", "a\x00b\x1b[31m", "\ud83d half a character", "\u202e\u200b", "\x7f\x85\xa0"])
def test_control_characters_and_broken_ones_are_text(processor, text):
    for batch in (processor.mentions([text], [text]), processor.entities(["Kansas"], [text * 3000])):
        assert batch["has_text"].tolist() == [True]
        assert_framed(processor, batch)


@pytest.mark.parametrize("wrong", [7, float("nan"), b"Kansas", ["Kansas"]])
def test_what_is_no_text_is_refused_by_its_row(processor, wrong):
    with pytest.raises(TypeError, match=rf"^row 1: a text must be a string or None, not {type(wrong).__name__}$"):
        processor.mentions(["a", "b"], ["a", wrong])


@pytest.mark.parametrize("length", [76, 77])
def test_a_text_fills_the_model_s_positions_and_no_more(processor, length):
    prepare = ClipNDProcessor(processor.image_processor, processor.tokenizer, max_text_length=length).mentions
    assert prepare(["star"], ["plains " * 100])["input_ids"].shape == (1, length)
    with pytest.raises(
        ValueError, match="^max_text_length is 78, but the tokenizer's model takes no more than 77 tokens"
    ):
        ClipNDProcessor(processor.image_processor, processor.tokenizer, max_text_length=78)


@pytest.mark.parametrize("length", [2, 0, -1])
def test_a_length_that_leaves_no_text_is_refused(processor, length):
    with pytest.raises(ValueError, match="max_text_length must be 3 or more"):
        ClipNDProcessor(processor.image_processor, processor.tokenizer, max_text_length=length)


def test_tiny_learns_words_and_keeps_the_special_tokens_last():
    processor = ClipNDProcessor.tiny(["zebra zebra zebra"], vocab_size=520, image_size=32)
    tokenizer = processor.tokenizer
    assert len(processor.mentions(["zebra"])["input_ids"][0]) == 3
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(tokenizer) - 2, len(tokenizer) - 1)
    assert processor.pixel_values(PICTURE).shape == (3, 32, 32)


@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_no_text_ends_before_its_end(processor, text):
    # CLIP pools at the first end-of-text token, and that is the unknown token too.
    for spelled in (text, f"{text} <|endoftext|> {text}"):
        ids = processor.mentions(["Kansas"], [spelled])["input_ids"][0].tolist()
        assert ids.index(processor.tokenizer.eos_token_id) == len(ids) - 1


def test_the_same_texts_make_the_same_vocabulary():
    """Pairs of equal count must not be learnt in an order by chance: seeds would not repeat, and processes differ."""
    texts = ["a band from Kansas known for a red star", "a state of the plains"]
    made = [ClipNDProcessor.tiny(texts, vocab_size=600).tokenizer.get_vocab() for _ in range(20)]
    assert all(one == made[0] for one in made)
