from __future__ import annotations

import io
import os
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m3el_hf.data.images import SHORT_SIDE, stored_bytes
from m3el_hf.data.schema import Picture
from m3el_hf.modeling.decoding_clipnd import UnusableImageError, decode_image

quick = settings(deadline=None, max_examples=25, database=None)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def stored(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(stored_bytes(Picture(data=data))))


def reason(picture: Picture) -> str:
    with pytest.raises(UnusableImageError) as caught:
        stored_bytes(picture)
    return str(caught.value)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_small_plain_picture_keeps_its_bytes(form, tmp_path):
    data = encoded(Image.new("RGB", (300, SHORT_SIDE), (9, 99, 199)), form)
    (tmp_path / "picture").write_bytes(data)
    assert stored_bytes(Picture(data=data)) == data
    assert stored_bytes(Picture(path=tmp_path / "picture")) == data


@given(
    size=st.tuples(st.integers(1, 700), st.integers(1, 700)),
    mode=st.sampled_from(["RGB", "RGBA", "L", "P"]),
    form=st.sampled_from(["JPEG", "PNG", "BMP", "WEBP"]),
)
@quick
def test_what_is_stored_is_rgb_with_a_bounded_short_side(size, mode, form):
    if form == "JPEG" and mode in ("RGBA", "P"):
        mode = "L"
    image = stored(encoded(Image.new(mode, size), form))
    image.load()
    assert image.mode == "RGB"
    assert image.format == ("JPEG" if form == "JPEG" else "PNG")
    if min(size) <= SHORT_SIDE:
        assert image.size == size
    else:
        assert min(image.size) == SHORT_SIDE
        assert max(image.size) == pytest.approx(max(size) * SHORT_SIDE / min(size), abs=0.5)


def test_stored_pictures_are_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    for size in ((20, 30, 3), (20, 20, 3)):
        pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        image = stored(encoded(Image.fromarray(pixels), "PNG", exif=exif))
        assert 0x0112 not in image.getexif()
        np.testing.assert_array_equal(np.asarray(image), np.rot90(pixels, -1))


@pytest.mark.parametrize("form", ["BMP", "GIF", "TIFF", "WEBP"])
def test_other_formats_are_stored_without_loss(form):
    pixels = np.random.default_rng(0).integers(0, 2, (20, 30, 1), dtype=np.uint8).repeat(3, axis=2) * 255
    data = encoded(Image.fromarray(pixels), form, **({"lossless": True} if form == "WEBP" else {}))
    np.testing.assert_array_equal(np.asarray(stored(data)), pixels)


def test_a_transparent_picture_is_flattened():
    colour = (10, 20, 30)
    assert stored(encoded(Image.new("RGB", (4, 4), colour), "PNG", transparency=colour)).getpixel((0, 0)) == (255,) * 3


@pytest.mark.parametrize(("form", "tolerance"), [("PNG", 1), ("JPEG", 3)])
def test_a_reduced_picture_looks_the_same(form, tolerance):
    noise = np.random.default_rng(0).integers(0, 256, (70, 90), dtype=np.uint8)  # grey: JPEG keeps less of the hue
    image = Image.fromarray(noise).convert("RGB").resize((900, 700), Image.Resampling.BICUBIC)
    small = stored(encoded(image, form)).resize((180, 140))
    difference = np.asarray(small, dtype=int) - np.asarray(image.resize((180, 140)), dtype=int)
    assert np.abs(difference).mean() < tolerance


def test_every_call_gives_the_same_bytes(tmp_path):
    data = encoded(Image.radial_gradient("L").resize((600, 500)), "JPEG")
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(data)
    pictures = [Picture(data=data), Picture(path=tmp_path / "a"), Picture(path=tmp_path / "b", url="elsewhere")]
    assert len({stored_bytes(picture) for picture in pictures}) == 1


def test_a_stored_picture_is_stored_unchanged():
    once = stored_bytes(Picture(data=encoded(Image.new("RGBA", (800, 600)), "PNG")))
    assert stored_bytes(Picture(data=once)) == once


def test_a_replaced_file_is_read_again(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(Image.new("RGB", (8, 8), (1, 2, 3)), "PNG"))
    assert decode_image(stored_bytes(Picture(path=path))).getpixel((0, 0)) == (1, 2, 3)
    path.write_bytes(encoded(Image.new("RGB", (8, 8), (3, 2, 1)), "PNG"))
    os.utime(path, ns=(10**18, 10**18))  # a clock may be too coarse to tell
    assert decode_image(stored_bytes(Picture(path=path))).getpixel((0, 0)) == (3, 2, 1)


def test_a_jpeg_with_a_second_picture_stays_jpeg():
    image = Image.new("RGB", (30, 20), (9, 99, 199))
    data = encoded(image, "MPO", save_all=True, append_images=[image])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert stored(data).format == "JPEG"


@given(cut=st.floats(0, 1), flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), max_size=4))
@quick
def test_a_damaged_picture_is_stored_whole_or_unusable(cut, flips):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a title"
    damaged = bytearray(encoded(Image.radial_gradient("L").resize((40, 40)), "JPEG", exif=exif))
    for place, bit in flips:
        damaged[int(place**3 * len(damaged))] ^= 1 << bit
    data = bytes(damaged[: len(damaged) - int(cut**4 * 100)])
    with warnings.catch_warnings(action="error"):  # none is for the reader of a build's output
        try:
            decode_image(stored_bytes(Picture(data=data)))
        except UnusableImageError as error:
            assert len(str(error).splitlines()) == 1


def test_a_removed_file_is_missing(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(Image.new("RGB", (8, 8)), "PNG"))
    stored_bytes(Picture(path=path))
    path.unlink()
    assert reason(Picture(path=path)) == "is missing"


def test_a_picture_that_is_nowhere_is_missing(tmp_path):
    (tmp_path / "file").write_text("")
    for picture in (Picture(), Picture(url="u"), Picture(path=tmp_path / "no"), Picture(path=tmp_path / "file/no")):
        assert reason(picture) == "is missing"


def test_a_picture_with_a_flaw_is_never_opened(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(Image.new("RGB", (8, 8)), "PNG"))
    assert reason(Picture(path=path, flaw="lies outside")) == "lies outside"


@pytest.mark.parametrize("name", [".", "a\0b", "\ud800", "a" * 5000])
def test_a_hostile_path_is_unusable(tmp_path, name):
    assert len(reason(Picture(path=Path(f"{tmp_path}/{name}"))).splitlines()) == 1


def test_a_pipe_is_not_waited_for(tmp_path):
    path = tmp_path / "picture.png"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.open("wb").close())  # lets a reader end, so that none hangs here
    writer.start()
    try:
        assert reason(Picture(path=path)) == "is not a file"
    finally:
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        writer.join()
        os.close(reader)


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", encoded(Image.new("RGB", (90, 90)), "PNG")[:-40]])
def test_a_broken_picture_is_unusable(data, tmp_path):
    (tmp_path / "picture.png").write_bytes(data)
    assert reason(Picture(data=data)) == reason(Picture(path=tmp_path / "picture.png"))
