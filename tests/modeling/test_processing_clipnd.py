from __future__ import annotations

import io
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, List, load_dataset
from datasets import Image as ImageColumn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil

from m3el_hf import ClipNDProcessor
from m3el_hf.modeling.processing_clipnd import CHARACTERS_PER_TOKEN
from tests.hub_server import hub_environment, run_python

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


def encoded(image: Image.Image = PICTURE) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# Text.


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


@pytest.mark.parametrize("text", ["\0", "a\x00b\x1b[31m", "\ud83d half a character", "\u202e\u200b", "\x7f\x85\xa0"])
def test_control_characters_and_broken_ones_are_text(processor, text):
    for batch in (processor.mentions([text], [text]), processor.entities(["Kansas"], [text * 3000])):
        assert batch["has_text"].tolist() == [True]
        assert_framed(processor, batch)


@pytest.mark.parametrize("wrong", [7, float("nan"), b"Kansas", ["Kansas"]])
def test_what_is_no_text_is_refused_by_its_row(processor, wrong):
    with pytest.raises(TypeError, match=rf"^row 1: a text must be a string or None, not {type(wrong).__name__}$"):
        processor.mentions(["a", "b"], ["a", wrong])


@pytest.mark.parametrize("length", [2, 0, -1])
def test_a_length_that_leaves_no_text_is_refused(processor, length):
    with pytest.raises(ValueError, match="max_text_length must be 3 or more"):
        ClipNDProcessor(processor.image_processor, processor.tokenizer, max_text_length=length)


# Templates.


def test_a_template_says_what_an_entity_s_text_is_made_of(processor):
    names, descriptions = ["Kansas", "Kansas", None, None], ["a band", None, "a band", None]
    for template, names_shown, descriptions_shown in [
        ("ND", names, descriptions),
        ("N", names, None),
        ("D", None, descriptions),
    ]:
        expected = processor.entities(names_shown, descriptions_shown)
        chosen = ClipNDProcessor(processor.image_processor, processor.tokenizer, template=template)
        for batch in (processor.entities(names, descriptions, template=template), chosen.entities(names, descriptions)):
            assert all(
                batch[key] is None if one is None else torch.equal(batch[key], one) for key, one in expected.items()
            )
    assert processor.entities(names, descriptions, template="D")["has_text"].tolist() == [True, False, True, False]
    assert processor.entities(["Kansas"], template="D")["input_ids"] is None


def test_each_row_may_have_its_template(processor):
    templates = ["ND", "N", "D", "D"]
    batch = processor.entities(["Kansas"] * 4, ["a band"] * 3 + [None], template=templates)
    expected = processor.entities(["Kansas", "Kansas", None, None], ["a band", None, "a band", None])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert batch["has_text"].tolist() == [True, True, True, False]


@pytest.mark.parametrize("wrong", ["DN", "", "nd", None, 3])
def test_an_unknown_template_is_refused(processor, wrong):
    with pytest.raises(ValueError, match=f"^a template must be one of N, D, ND, not {wrong!r}$"):
        ClipNDProcessor(processor.image_processor, processor.tokenizer, template=wrong)
    with pytest.raises(ValueError, match=f"^row 1: a template must be one of N, D, ND, not {wrong!r}$"):
        processor.entities(["a", "b"], template=["N", wrong])


def test_templates_must_be_as_many_as_rows(processor):
    with pytest.raises(ValueError, match="a list of templates must have one for each row: 1 for 2 rows"):
        processor.entities(["a", "b"], template=["N"])


# Rows of a dataset.


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert {key for key, value in one.items() if value is not None} == {
        key for key, value in other.items() if value is not None
    }
    assert all(torch.equal(value, other[key]) for key, value in one.items() if value is not None)


def test_rows_of_a_linking_set_are_mentions(processor, data):
    rows = data["train"]
    raw = rows.cast_column("mention_image", ImageColumn(decode=False)).cast_column(
        "candidate_images", List(ImageColumn(decode=False))
    )
    batch = rows[:8]
    expected = processor.mentions(batch["mention"], batch["context"], batch["mention_image"])
    for one in (batch, raw[:8]):
        assert_same(processor.from_rows(one, side="mention"), expected)


def test_a_column_that_a_task_hides_is_absent(processor, store):
    for task, text, image in [("t2t", True, False), ("i2t", False, True)]:
        batch = load_dataset(str(store), task, split="test")[:4]
        prepared = processor.from_rows(batch, side="mention")
        assert ("input_ids" in prepared, "pixel_values" in prepared) == (text, image)
        assert not prepared["has_image" if text else "has_text"].any()


def test_rows_of_the_entities_are_entities(processor, store):
    batch = load_dataset(str(store), "entities", split="train")[:8]
    expected = processor.entities(batch["name"], batch["description"], batch["image"])
    assert_same(processor.from_rows(batch, side="entity"), expected)


def test_datasets_can_prepare_its_rows(processor, data):
    rows = data["test"].select(range(6))
    expected = processor.from_rows(rows[:], side="mention")
    prepare = lambda batch: processor.from_rows(batch, side="mention")  # noqa: E731
    assert_same(rows.with_transform(prepare)[:], expected)
    assert torch.equal(rows.with_transform(prepare)[2]["pixel_values"], expected["pixel_values"][2])
    mapped = rows.map(prepare, batched=True, remove_columns=rows.column_names).with_format("torch")
    assert_same(mapped[:], expected)
    texts = Dataset.from_dict({"mention": ["Kansas", None], "context": [None, "a band"]})
    assert texts.with_transform(prepare)[1]["has_text"]
    assert texts.map(prepare, batched=True)["has_text"][:] == [True, True]


def test_from_rows_says_what_it_needs(processor):
    with pytest.raises(ValueError, match="^side must be 'mention' or 'entity', not 'candidate'$"):
        processor.from_rows({"mention": ["a"]}, side="candidate")
    with pytest.raises(
        ValueError,
        match="^side 'entity' is prepared of the columns name, description, image; the batch has mention, id$",
    ):
        processor.from_rows({"mention": ["a"], "id": ["1"]}, side="entity")
    with pytest.raises(TypeError, match="must be lists, an entry a row; one is a string$"):
        processor.from_rows({"mention": "Kansas", "context": None}, side="mention")
    with pytest.raises(ValueError, match="^row 1: .*must be"):
        processor.from_rows({"mention_image": [None, np.zeros(3)]}, side="mention")


# Threads.


def test_threads_get_what_one_alone_gets(processor):
    calls = [
        (
            ["Kansas"] * (1 + k % 5),
            ["of the plains " * (k % 40)] * (1 + k % 5),
            [PICTURE if k % 3 else None] * (1 + k % 5),
        )
        for k in range(60)
    ]
    expected = [processor.mentions(*call) for call in calls]
    fresh = pickle.loads(pickle.dumps(processor))  # a tokenizer whose settings no call has touched yet
    fresh.tokenizer.backend_tokenizer.enable_truncation(5)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for one, other in zip(pool.map(lambda call: fresh.mentions(*call), calls), expected, strict=True):
                assert_same(one, other)


# What is absent.


@pytest.mark.parametrize("wrong", [PICTURE, {"bytes": b""}, Path("a.png"), b"a"])
def test_one_picture_in_place_of_a_list_is_refused(processor, wrong):
    with pytest.raises(TypeError, match=f"must be lists, an entry a row; one is a {type(wrong).__name__}$"):
        processor.mentions(images=wrong)


def test_no_rows_at_all_are_no_rows(processor):
    batch = processor.mentions([], [], [])
    assert batch["has_text"].shape == batch["has_image"].shape == (0,)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"names": ["a"], "images": []},
        {"names": ["a"], "contexts": ["a", "b"]},
        {"names": ["a"], "contexts": ["a"], "images": [None, None]},
    ],
)
def test_lists_must_be_of_one_length(processor, arguments):
    with pytest.raises(ValueError, match="must be lists of one length: names"):
        processor.mentions(**arguments)


def test_nothing_at_all_is_marked_absent(processor):
    for arguments in ({"names": [None, ""]}, {"images": [None, None]}, {"names": ["\n", " "], "contexts": ["", None]}):
        batch = processor.mentions(**arguments)
        assert batch["has_text"].tolist() == batch["has_image"].tolist() == [False, False]
        assert batch["input_ids"] is batch["attention_mask"] is batch["pixel_values"] is None


def test_a_missing_picture_leaves_the_others_where_they_are(processor):
    batch = processor.entities(["a", "b", "c"], images=[None, PICTURE, None])
    assert batch["has_image"].tolist() == [False, True, False]
    assert torch.equal(batch["pixel_values"][1], processor.pixel_values(PICTURE))


# Pictures.


def test_a_picture_has_the_same_pixels_however_it_is_given(processor, tmp_path):
    path = tmp_path / "one.png"
    path.write_bytes(encoded())
    expected = processor.pixel_values(PICTURE)
    assert expected.shape == (3, 64, 64) and expected.dtype == torch.float32
    given = [
        encoded(),
        path,
        str(path),
        {"bytes": encoded(), "path": None},
        {"bytes": None, "path": str(path)},
        {"bytes": encoded(), "path": "not looked at.png"},
        np.asarray(PICTURE),
        np.asarray(PICTURE)[:, ::-1][:, ::-1],
        np.asarray(PICTURE.convert("RGBA")),
        Image.open(path),
        expected,
    ]
    for one in given:
        assert torch.equal(processor.pixel_values(one), expected)
    batch = processor.mentions(images=[PICTURE, *given])
    assert all(torch.equal(pixels, expected) for pixels in batch["pixel_values"])


def test_pixels_are_resized_cropped_and_normalised_as_clip_does(processor):
    columns = np.zeros((64, 128, 3), dtype=np.uint8)
    columns[:, 32:96] = (255, 128, 0)
    pixels = processor.pixel_values(Image.fromarray(columns))
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    for channel, value in enumerate((255, 128, 0)):
        expected = (value / 255 - mean[channel]) / std[channel]
        assert torch.allclose(pixels[channel], torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 64, "width": 48}},
        {"size": {"shortest_edge": 65}, "crop_size": {"height": 31, "width": 40}},
        {"size": {"height": 33, "width": 64}, "do_center_crop": False, "resample": 2},
        {"do_resize": False, "do_rescale": False, "image_mean": [1, 2, 3], "image_std": [4, 5, 6]},
        {"do_normalize": False},
    ],
)
def test_pixels_are_those_of_clip_s_image_processor(processor, settings):
    square = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    by_clip = CLIPImageProcessorPil(**square | settings)
    ours = ClipNDProcessor(by_clip, processor.tokenizer)
    random = np.random.default_rng(0)
    for size in [(1, 1), (300, 2), (2, 301), (64, 64), (63, 65), (50, 70), (641, 480), (333, 1000)]:
        noise = Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        for mode in ["RGB", "L", "1", "P", "CMYK", "YCbCr"]:
            image = noise.convert(mode)
            expected = torch.as_tensor(by_clip(image, return_tensors="np")["pixel_values"][0])
            found = ours.pixel_values(image)
            assert found.dtype == torch.float32 and torch.equal(found, expected), (size, mode)


@pytest.mark.parametrize(
    "settings", [{"do_center_crop": False}, {"size": {"shortest_edge": 9, "longest_edge": 20}, "do_center_crop": True}]
)
def test_settings_that_are_not_clip_s_are_refused(processor, settings):
    image_processor = CLIPImageProcessorPil(**{"size": {"shortest_edge": 64}} | settings)
    with pytest.raises(ValueError, match="^the image processor"):
        ClipNDProcessor(image_processor, processor.tokenizer).pixel_values(PICTURE)


def test_a_thread_of_a_picture_is_refused_before_it_fills_the_memory(processor):
    with pytest.raises(ValueError, match="^row 0: a picture of 20000000 x 1 is too long and thin"):
        processor.mentions(images=[Image.new("L", (20_000_000, 1))])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
@pytest.mark.parametrize("size", [(1, 1), (300, 2), (64, 64)])
def test_any_mode_and_shape_of_picture_gives_the_same_shape_of_pixels(processor, mode, size):
    pixels = processor.pixel_values(Image.new(mode, size))
    assert pixels.shape == (3, 64, 64) and pixels.isfinite().all()


def test_transparency_lies_on_white_and_exif_turns_upright(processor):
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    white = processor.pixel_values(Image.new("RGB", (64, 64), "white"))
    assert torch.equal(processor.pixel_values(clear), white)
    turned = PICTURE.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    assert torch.equal(processor.pixel_values(turned), processor.pixel_values(PICTURE))


@pytest.mark.parametrize(
    "address", ["https://example.org/a.png", {"bytes": None, "path": "https://example.org/a.png"}, "s3://a/b.png"]
)
def test_an_address_is_refused_with_what_to_do(processor, address):
    with pytest.raises(ValueError, match="is an address: download the picture and pass its bytes or its path"):
        processor.pixel_values(address)


@pytest.mark.parametrize("wrong", [7, 1.5, [PICTURE], bytearray(b"GIF"), {"bytes": [1]}["bytes"], object()])
def test_what_cannot_be_a_picture_is_refused_by_its_type(processor, wrong):
    with pytest.raises(TypeError, match=rf"a picture must be .* not {type(wrong).__name__}$"):
        processor.mentions(images=[wrong])


def test_an_array_may_be_grey(processor):
    grey = PICTURE.convert("L")
    assert torch.equal(processor.pixel_values(np.asarray(grey)), processor.pixel_values(grey))


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4, 3), np.uint16),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.array(None),
    ],
)
def test_an_array_of_other_numbers_or_another_shape_is_refused(processor, wrong):
    with pytest.raises(ValueError, match=rf"^row 1: .*must be uint8 \[H, W\].*not {wrong.dtype} \[.*\]$"):
        processor.mentions(images=[None, wrong])


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3, 8, 8), torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(64, 64)]
)
def test_a_tensor_must_be_prepared_pixels(processor, wrong):
    with pytest.raises(ValueError, match=r"^row 0: a tensor must be what pixel_values returns, .*\[3, 64, 64\], not"):
        processor.mentions(images=[wrong, PICTURE])


def test_a_pil_picture_that_is_broken_or_empty_is_refused(processor):
    broken = Image.open(io.BytesIO(encoded()[:-2000]))
    for wrong in (broken, Image.new("RGB", (0, 5)), Image.new("F", (4, 4)), np.zeros((0, 4), np.uint8)):
        with pytest.raises(ValueError, match=r"^row 2: a picture given as (PIL|an array) (has|cannot be)") as raised:
            processor.entities(images=[None, PICTURE, wrong])
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"not a picture",
        encoded()[:60],
        {"bytes": b"GIF89a"},
        {"bytes": None, "path": None},
        {},
        "nowhere.png",
        Path("nowhere.png"),
        "a\0b.png",
        "",
    ],
)
def test_what_cannot_be_decoded_is_one_line_that_names_it(processor, wrong):
    with pytest.raises(ValueError) as raised:
        processor.mentions(names=["a"], images=[wrong])
    message = str(raised.value)
    assert message.startswith("row 0: ") and "\n" not in message
    assert str(wrong) in message if isinstance(wrong, str | Path) else "picture" in message


# Saving and loading.


def test_a_saved_processor_prepares_the_same(processor, tmp_path):
    saved = ClipNDProcessor(processor.image_processor, processor.tokenizer, max_text_length=9, template="D")
    saved.save_pretrained(tmp_path)
    loaded = ClipNDProcessor.from_pretrained(tmp_path)
    assert (loaded.max_text_length, loaded.template) == (9, "D")
    arguments = (
        ["Kansas", None, "北京"],
        ["a band known for a red star of the plains", "", "x"],
        [PICTURE, None, None],
    )
    one, other = saved.mentions(*arguments), loaded.mentions(*arguments)
    assert one["input_ids"].shape == (3, 9)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("package", [True, False])
def test_auto_classes_load_it_with_and_without_the_package(processor, tmp_path, package):
    ClipNDProcessor(processor.image_processor, processor.tokenizer, template="N").save_pretrained(tmp_path / "saved")
    (tmp_path / "one.png").write_bytes(encoded())
    expected = processor.entities(["Kansas"], ["a band"], [PICTURE], template="N")
    done = run_python(
        f"""
        import sys
        if {package}:
            import m3el_hf
        else:
            sys.modules["m3el_hf"] = None
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
        batch = processor.entities(["Kansas"], ["a band"], [{str(tmp_path / "one.png")!r}])
        print(processor.template, batch["input_ids"].tolist(), batch["pixel_values"].sum().item())
        """,
        hub_environment("http://127.0.0.1:9", tmp_path / "home"),  # nothing listens at the discard port
    )
    assert done.stdout.split("\n")[0] == f"N {expected['input_ids'].tolist()} {expected['pixel_values'].sum().item()}"


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
