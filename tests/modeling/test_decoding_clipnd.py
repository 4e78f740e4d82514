from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from m3el_hf.modeling import decoding_clipnd
from m3el_hf.modeling.decoding_clipnd import (
    ALLOWED_FORMATS,
    MAX_BYTES,
    MAX_PIXELS,
    UnusableImageError,
    decode_image,
    to_rgb,
)

WHITE = (255, 255, 255)
CORNERS = np.array([[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[9, 9, 9], [90, 90, 90], [200, 200, 0]]], dtype=np.uint8)

quick = settings(deadline=None, max_examples=80, database=None, suppress_health_check=list(HealthCheck))


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def photo(size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Enough detail that a flipped bit lands in real data."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def png(width: int, height: int, depth: int, kind: int, raw: bytes) -> bytes:
    """A PNG written by hand, for what Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def reason(source: bytes | str | Path) -> str:
    with pytest.raises(UnusableImageError) as caught:
        decode_image(source)
    return str(caught.value)


def check_outcome(data: bytes) -> None:
    """A picture in RGB or one line that says why not; pytest fails on whatever else is raised."""
    for short_side in (None, 1):
        try:
            image = decode_image(data, short_side)
        except UnusableImageError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert image.mode == "RGB"
            assert min(image.size) > 0
            image.tobytes()


@pytest.mark.parametrize("form", ALLOWED_FORMATS)
def test_each_allowed_format_decodes(form):
    image = decode_image(encoded(Image.new("RGB", (24, 16), (200, 30, 60)), form))
    assert (image.mode, image.size) == ("RGB", (24, 16))
    assert np.abs(np.asarray(image, dtype=int) - (200, 30, 60)).max() <= 8


@pytest.mark.parametrize("form", ["PPM", "ICO", "PCX", "EPS"])
def test_other_formats_are_refused(form):
    assert "is not a picture in one of the formats JPEG, PNG" in reason(encoded(photo((32, 32)), form))


def test_bytes_and_paths_decode_alike(tmp_path):
    (tmp_path / "picture.JPG").write_bytes(encoded(photo(), "JPEG"))
    images = [
        decode_image(source)
        for source in (encoded(photo(), "JPEG"), tmp_path / "picture.JPG", str(tmp_path / "picture.JPG"))
    ]
    assert images[0].tobytes() == images[1].tobytes() == images[2].tobytes()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, CORNERS),
        (2, CORNERS[:, ::-1]),
        (3, CORNERS[::-1, ::-1]),
        (4, CORNERS[::-1]),
        (5, CORNERS.transpose(1, 0, 2)),
        (6, np.rot90(CORNERS, -1)),
        (7, CORNERS[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90(CORNERS)),
    ],
)
def test_exif_orientation_is_applied_once(orientation, upright, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(CORNERS), form, exif=exif)
    np.testing.assert_array_equal(np.asarray(decode_image(data)), upright)


def test_a_turned_jpeg_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (64, 32), (250, 0, 0))
    image.paste((0, 0, 250), (32, 0, 64, 32))
    turned = decode_image(encoded(image, "JPEG", exif=exif))
    assert turned.size == (32, 64)
    assert turned.getpixel((16, 5))[0] > 200  # the left end is up
    assert turned.getpixel((16, 58))[2] > 200


@given(colour=st.tuples(*[st.integers(0, 255)] * 4), form=st.sampled_from(["PNG", "TIFF"]))
@quick
def test_transparency_lies_on_white(colour, form):
    alpha = colour[3] / 255
    expected = [alpha * channel + (1 - alpha) * 255 for channel in colour[:3]]
    found = decode_image(encoded(Image.new("RGBA", (2, 2), colour), form)).getpixel((1, 1))
    assert np.abs(np.subtract(found, expected)).max() <= 1


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_palette_transparency_lies_on_white(transparency):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([250, 0, 0, 0, 250, 0])
    image.putpixel((1, 0), 1)
    for form in ("PNG", "GIF") if transparency == 0 else ("PNG",):
        decoded = decode_image(encoded(image, form, transparency=transparency))
        assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [WHITE, (0, 250, 0)]


@pytest.mark.parametrize(("mode", "colour"), [("L", 100), ("RGB", (10, 20, 30)), ("1", 0)])
def test_a_transparent_colour_lies_on_white(mode, colour):
    data = encoded(Image.new(mode, (3, 3), colour), transparency=colour)
    assert decode_image(data).getpixel((1, 1)) == WHITE


def test_grey_with_alpha_lies_on_white():
    assert decode_image(encoded(Image.new("LA", (3, 3), (0, 0)))).getpixel((1, 1)) == WHITE
    assert decode_image(encoded(Image.new("LA", (3, 3), (7, 255)))).getpixel((1, 1)) == (7, 7, 7)


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(form):
    red, green, blue = decode_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), form)).getpixel((8, 8))
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize(("form", "dtype"), [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32)])
def test_sixteen_bits_keep_their_shades(form, dtype):
    shades = np.linspace(0, 65535, 64).reshape(8, 8).astype(dtype)
    found = np.asarray(decode_image(encoded(Image.fromarray(shades), form)), dtype=int)
    assert np.abs(found - (shades / 257)[..., None]).max() <= 1.5


def test_sixteen_bit_colour_keeps_its_shades():
    image = decode_image(png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 20000, 40000, 65535)))
    assert image.getpixel((0, 0)) == (78, 156, 255)


def test_fractions_are_refused_and_not_shown_as_black():
    shades = Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4))
    assert "fractions" in reason(encoded(shades, "TIFF"))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_counts(form):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=50)
    assert np.abs(np.subtract(decode_image(data).getpixel((10, 10)), (250, 0, 0))).max() <= 8


def test_nothing_is_empty():
    assert reason(b"") == "is empty (0 bytes)"


def test_an_error_page_is_no_picture():
    page = b"<!DOCTYPE html><html><body>429 Too Many Requests</body></html>"
    assert reason(page).startswith("is not a picture")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_half_a_picture_is_refused(form):
    data = encoded(photo((64, 64)), form)
    assert len(reason(data[: len(data) // 2]).splitlines()) == 1


@pytest.mark.parametrize("side", [8000, 50_000])
def test_a_bomb_is_refused_by_its_declared_size(side):
    assert side**2 > MAX_PIXELS
    assert f"{MAX_PIXELS:,}" in reason(png(side, side, 8, 2, b"")) or "bomb" in reason(png(side, side, 8, 2, b""))


def test_the_cap_is_the_last_size_that_decodes(monkeypatch):
    monkeypatch.setattr(decoding_clipnd, "MAX_PIXELS", 110)
    assert decode_image(encoded(photo((11, 10)))).size == (11, 10)
    assert reason(encoded(photo((11, 11)))) == "has 11 x 11 pixels, over 110"


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_the_cap_is_of_the_whole_picture_and_not_of_the_part_wanted(form, monkeypatch):
    data = encoded(photo((64, 64)), form)
    monkeypatch.setattr(decoding_clipnd, "MAX_PIXELS", 4000)
    with pytest.raises(UnusableImageError, match="has 64 x 64 pixels, over 4,000"):
        decode_image(data, short_side=8)


def smooth(size: tuple[int, int]) -> Image.Image:
    """A picture that looks the same at every size, with a left, a right, an upper and a lower end."""
    across, down = Image.linear_gradient("L").rotate(90).resize(size), Image.linear_gradient("L").resize(size)
    return Image.merge("RGB", (across, down, Image.new("L", size, 90)))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": True}])
@pytest.mark.parametrize(
    ("short_side", "size"), [(122, (500, 243)), (121, (250, 122)), (60, (125, 61)), (30, (63, 31)), (1, (63, 31))]
)
def test_a_large_jpeg_is_decoded_at_a_fraction(mode, options, short_side, size):
    if options.get("exif"):
        exif = Image.Exif()
        exif[0x0112] = 6
        options, size = {"exif": exif}, size[::-1]
    data = encoded(smooth((500, 243)).convert(mode), "JPEG", quality=95, **options)
    found, whole = decode_image(data, short_side=short_side), decode_image(data)
    assert (found.mode, found.size) == ("RGB", size)
    assert min(size) >= short_side
    difference = np.asarray(found.resize(whole.size), dtype=int) - np.asarray(whole, dtype=int)
    assert np.abs(difference).mean() < 4  # of 255; a fraction is rounded up, so a small one is a little stretched


@given(width=st.integers(1, 300), height=st.integers(1, 300), short_side=st.integers(1, 300))
@quick
def test_no_fraction_is_below_what_is_wanted(width, height, short_side):
    found = decode_image(encoded(Image.new("RGB", (width, height)), "JPEG"), short_side=short_side)
    assert min(found.size) >= min(short_side, width, height)
    assert found.width / width == pytest.approx(found.height / height, abs=1 / min(width, height))


@pytest.mark.parametrize("short_side", [None, 10])
def test_inverted_jpeg_inks_keep_their_colours(short_side):
    """Adobe writes 255 minus ink, as CMYK or turned into YCCK; the marker says which."""
    data = encoded(Image.new("CMYK", (160, 160), (0, 255, 255, 0)), "JPEG", quality=95)
    marker = data.index(b"Adobe")
    assert data[marker + 11] == 0
    assert np.abs(np.subtract(decode_image(data, short_side).getpixel((8, 8)), (255, 0, 0))).max() < 8
    # Planes of 255, 0 and 0 would be red 76, green 255 and blue 28 in a JPEG of RGB: in YCCK, so much of each ink.
    ycck = data[: marker + 11] + b"\x02" + data[marker + 12 :]
    assert np.abs(np.subtract(decode_image(ycck, short_side).getpixel((8, 8)), (179, 0, 227))).max() < 8


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_other_formats_come_in_full(form):
    assert decode_image(encoded(photo((90, 80)), form), short_side=8).size == (90, 80)


def test_a_camera_picture_with_a_second_one_behind_is_decoded_at_a_fraction():
    data = encoded(photo((160, 120)), "MPO", save_all=True, append_images=[photo((160, 120))])
    assert decode_image(data, short_side=30).size == (40, 30)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("left", [0.3, 0.7, 0.99])
def test_a_fraction_of_a_truncated_jpeg_is_refused(progressive, left):
    data = encoded(photo((320, 240)), "JPEG", progressive=progressive)
    with pytest.raises(UnusableImageError, match="truncated"):
        decode_image(data[: int(left * len(data))], short_side=1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("absent.png", "is missing"),
        ("file/absent.png", "is missing"),
        ("broken_link.png", "is missing"),
        (".", "is not a file"),
        ("pipe.png", "is not a file"),
        ("huge.png", f"has {2**40:,} bytes, over {MAX_BYTES:,}"),
        ("endless_link.png", "cannot be read ("),
        ("a\0b.png", "cannot be read ("),
        ("\ud800.png", "cannot be read ("),
        ("a" * 5000, "cannot be read ("),
    ],
)
def test_a_path_that_cannot_be_read_is_unusable(tmp_path, name, expected):
    (tmp_path / "file").touch()
    (tmp_path / "broken_link.png").symlink_to("nowhere")
    (tmp_path / "endless_link.png").symlink_to("endless_link.png")
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    for source in (tmp_path / name, f"{tmp_path}/{name}"):
        assert reason(source).startswith(expected)


def test_a_file_that_may_not_be_read_is_unusable(tmp_path):
    path = tmp_path / "picture.png"
    photo().save(path)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert reason(path) == "cannot be read (Permission denied)"


MAGIC = (
    b"",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff\xe0",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"RIFF\x20\0\0\0WEBPVP8 ",
)


@given(magic=st.sampled_from(MAGIC), rest=st.binary(max_size=200))
@quick
def test_nothing_else_escapes_from_random_bytes(magic, rest):
    check_outcome(magic + rest)


DAMAGED = {
    form: encoded(photo(), form, **options)
    for form, options in {"PNG": {}, "JPEG": {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}, "GIF": {}, "TIFF": {}}.items()
}


@pytest.mark.parametrize("form", DAMAGED)
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=8))
@quick
def test_nothing_else_escapes_from_flipped_bits(form, flips):
    data = bytearray(DAMAGED[form])
    for place, bit in flips:
        data[int(place**3 * len(data))] ^= 1 << bit  # more often near the start, where the headers are
    check_outcome(bytes(data))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I", "I;16"])
def test_pictures_in_memory_become_rgb(mode):
    image = to_rgb(Image.new(mode, (5, 4)))
    assert (image.mode, image.size) == ("RGB", (5, 4))


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_pictures_of_sixteen_bits_lose_the_lower_eight(mode):
    shades = np.arange(65536, dtype=">u2" if mode == "I;16B" else "<u2").reshape(256, 256)
    image = Image.frombytes(mode, (256, 256), shades.tobytes())
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[..., 0], shades // 256)


def test_dark_pictures_of_integers_keep_their_shades():
    shades = np.arange(0, 256, dtype=np.int32).reshape(16, 16)
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(shades)))[..., 0], shades)
