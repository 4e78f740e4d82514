from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from m3el_hf import ClipNDProcessor
from tests.conftest import PICTURE, encoded


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


def test_a_bomb_is_refused_unread_in_pil_too(processor, tmp_path):
    Image.new("1", (8000, 8000)).save(tmp_path / "bomb.png")
    lazy = Image.open(tmp_path / "bomb.png")
    for wrong in (lazy, tmp_path / "bomb.png", (tmp_path / "bomb.png").read_bytes()):
        with pytest.raises(ValueError, match="^row 1: .* has 8000 x 8000 pixels, over 60,000,000$"):
            processor.mentions(images=[None, wrong])
    assert lazy._im is None


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "I;16"])
def test_a_picture_is_left_as_it_was_given(processor, mode):
    image = Image.new(mode, (70, 50), 5)
    before = image.copy()
    processor.pixel_values(image)
    assert image == before


def test_a_thread_of_a_picture_is_refused_before_it_fills_the_memory(processor):
    with pytest.raises(ValueError, match="^row 0: a picture of 20000000 x 1 is too long and thin"):
        processor.mentions(images=[Image.new("L", (20_000_000, 1))])


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "I", "I;16", "I;16B"]
)
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
    "address",
    [
        *("https://example.org/a.png", {"bytes": None, "path": "https://example.org/a.png"}, "s3://a/b.png"),
        f"data:image/png;base64,{'A' * 5000}",
    ],
)
def test_an_address_is_refused_with_what_to_do(processor, address):
    with pytest.raises(
        ValueError, match="is an address: download the picture and pass its bytes or its path"
    ) as raised:
        processor.pixel_values(address)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("wrong", [7, 1.5, [PICTURE], bytearray(b"GIF"), {"bytes": [1]}["bytes"], object()])
def test_what_cannot_be_a_picture_is_refused_by_its_type(processor, wrong):
    with pytest.raises(TypeError, match=rf"a picture must be .* not {type(wrong).__name__}$"):
        processor.mentions(images=[wrong])


@pytest.mark.parametrize("size", [(64, 64), (50, 70), (641, 480)])
def test_an_array_has_the_pixels_that_clip_gives_it(processor, size):
    array = np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    expected = torch.as_tensor(processor.image_processor(array, return_tensors="np")["pixel_values"][0])
    assert torch.equal(processor.pixel_values(array), expected)


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
    broken, closed = Image.open(io.BytesIO(encoded()[:-2000])), PICTURE.copy()
    closed.close()
    for wrong in (broken, closed, Image.new("RGB", (0, 5)), Image.new("F", (4, 4)), np.zeros((0, 4), np.uint8)):
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
        "a\nb.png",
        "Kansas " * 1000,
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
    assert len(message) < 400
    assert f"the file {str(wrong)[:200]!r}"[:-1] in message if isinstance(wrong, str | Path) else "picture" in message
