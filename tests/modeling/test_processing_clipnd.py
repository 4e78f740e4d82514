from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m3el_hf import ClipNDProcessor

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


# What is absent.


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


@pytest.mark.parametrize("wrong", [7, 1.5, [PICTURE], np.zeros((4, 4, 3)), object()])
def test_what_cannot_be_a_picture_is_refused_by_its_type(processor, wrong):
    with pytest.raises(TypeError, match=rf"a picture must be .* not {type(wrong).__name__}$"):
        processor.mentions(images=[wrong])


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
    assert "\n" not in message
    assert str(wrong) in message if isinstance(wrong, str | Path) else "picture" in message


# Saving and loading.


def test_a_saved_processor_prepares_the_same(processor, tmp_path):
    saved = ClipNDProcessor(processor.image_processor, processor.tokenizer, max_text_length=9)
    saved.save_pretrained(tmp_path)
    loaded = ClipNDProcessor.from_pretrained(tmp_path)
    assert loaded.max_text_length == 9
    arguments = (
        ["Kansas", None, "北京"],
        ["a band known for a red star of the plains", "", "x"],
        [PICTURE, None, None],
    )
    one, other = saved.mentions(*arguments), loaded.mentions(*arguments)
    assert one["input_ids"].shape == (3, 9)
    assert all(torch.equal(one[name], other[name]) for name in one)


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
