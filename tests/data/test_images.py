from __future__ import annotations

import io
import os
import sys
import threading
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m3el_hf.data import images
from m3el_hf.data.images import LEAST_SHORT_SIDE, SHORT_SIDE, PictureStore
from m3el_hf.data.schema import Picture
from m3el_hf.errors import M3ELError
from m3el_hf.modeling.decoding_clipnd import UnusableImageError, decode_image

quick = settings(deadline=None, max_examples=25, database=None)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def stored_bytes(picture: Picture, short_side: int | None = SHORT_SIDE) -> bytes:
    return PictureStore(short_side).stored_bytes(picture)


def stored(data: bytes, short_side: int | None = SHORT_SIDE) -> Image.Image:
    return Image.open(io.BytesIO(stored_bytes(Picture(data=data), short_side)))


def photo(size: tuple[int, int]) -> Image.Image:
    """Noise of every size, the finer the weaker, as in photographs."""
    dice, pixels, cell, strength = np.random.default_rng(0), np.full(size[::-1], 128.0), max(size) // 4, 60.0
    while cell >= 1:
        noise = dice.uniform(-1, 1, (size[1] // cell + 2, size[0] // cell + 2)).astype(np.float32)
        pixels += strength * np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC))
        cell, strength = cell // 2, 0.6 * strength
    return Image.fromarray(np.stack([pixels, 0.8 * pixels, 255 - pixels], -1).clip(0, 255).astype(np.uint8))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What is decoded from here on."""
    seen: list[bytes] = []

    def decode(data: bytes, short_side: int | None = None) -> Image.Image:
        seen.append(data)
        return decode_image(data, short_side)

    monkeypatch.setattr(images, "decode_image", decode)
    return seen


def reason(picture: Picture, store: PictureStore | None = None) -> str:
    with pytest.raises(UnusableImageError) as caught:
        (store or PictureStore()).stored_bytes(picture)
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
    short_side=st.integers(LEAST_SHORT_SIDE, 400),
)
@quick
def test_what_is_stored_is_rgb_with_a_bounded_short_side(size, mode, form, short_side):
    if form == "JPEG" and mode in ("RGBA", "P"):
        mode = "L"
    image = stored(encoded(Image.new(mode, size), form), short_side)
    image.load()
    assert image.mode == "RGB"
    assert image.format == ("JPEG" if form == "JPEG" else "PNG")
    if min(size) <= short_side:
        assert image.size == size
    else:
        assert min(image.size) == short_side
        assert max(image.size) == pytest.approx(max(size) * short_side / min(size), abs=0.5)


@pytest.mark.parametrize(
    ("form", "size", "short_side", "expected"),
    [
        ("PNG", (20_000, 100), 256, (20_000, 100)),
        ("PNG", (20_000, 100), 16, (3200, 16)),
        ("JPEG", (20_000, 100), 256, (20_000, 100)),
        ("JPEG", (20_000, 100), 16, (3200, 16)),
        ("JPEG", (16_000, 1100), 256, (3724, 256)),
        ("TIFF", (1, 20_000), 16, (1, 20_000)),
        ("GIF", (17, 20_000), 16, (16, 18_824)),
    ],
)
def test_a_very_long_picture_keeps_its_shape(form, size, short_side, expected):
    assert stored(encoded(Image.new("RGB", size, (9, 99, 199)), form), short_side).size == expected


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_looks_as_if_decoded_in_full(orientation, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo((1500, 1201)), "JPEG", quality=85, exif=exif)
    seen = []

    def decode(*arguments) -> Image.Image:
        seen.append(decode_image(*arguments))
        return seen[-1]

    monkeypatch.setattr(images, "decode_image", decode)
    quick_one = stored(data)
    assert sorted(seen[0].size) == [601, 750]
    monkeypatch.setattr(images, "decode_image", lambda data, _: decode_image(data))
    full = stored(data)
    assert quick_one.size == full.size == ((320, 256) if orientation == 1 else (256, 320))
    difference = np.asarray(quick_one, dtype=int) - np.asarray(full, dtype=int)
    assert np.abs(difference).mean() < 1
    assert 10 * np.log10(255**2 / (difference**2).mean()) > 42


@pytest.mark.parametrize("short_side", [-1, 0, LEAST_SHORT_SIDE - 1])
def test_too_small_a_short_side_is_refused(short_side):
    with pytest.raises(M3ELError, match=f"a short side of {short_side} pixels shows nothing: give at least 16"):
        PictureStore(short_side)


def originals() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = photo((600, 400))
    return {
        "large JPEG": encoded(image, "JPEG"),
        "turned JPEG": encoded(image, "JPEG", exif=exif),
        "JPEG of inks": encoded(image.convert("CMYK"), "JPEG"),
        "animation": encoded(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        "palette": encoded(image.quantize(9), "PNG", transparency=0),
        "TIFF": encoded(image, "TIFF"),
    }


@pytest.mark.parametrize("name", originals())
def test_originals_are_kept_as_they_are(name, tmp_path):
    data = originals()[name]
    (tmp_path / "picture").write_bytes(data)
    assert stored_bytes(Picture(data=data), short_side=None) == data
    assert stored_bytes(Picture(path=tmp_path / "picture"), short_side=None) == data
    assert stored_bytes(Picture(data=data)) != data
    broken = data[: len(data) // 2]
    assert reason(Picture(data=broken), PictureStore(None)) == reason(Picture(data=broken))


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


def test_no_metadata_come_along():
    """A comment may name the gold; a colour profile of inks or greys is wrong for RGB."""
    image = Image.new("CMYK", (20, 20))
    for form in ("JPEG", "TIFF"):
        found = stored(encoded(image, form, icc_profile=b"profile of inks", comment=b"Q42"))
        assert not found.info.keys() & {"icc_profile", "comment"}


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
    store, path = PictureStore(), tmp_path / "picture.png"
    path.write_bytes(b"<html>429</html>")
    assert "is not a picture" in reason(Picture(path=path), store)
    for time, colour in enumerate([(1, 2, 3), (3, 2, 1)]):
        path.write_bytes(encoded(Image.new("RGB", (8, 8), colour), "PNG"))
        os.utime(path, ns=(10**18 + time, 10**18 + time))  # a clock may be too coarse to tell
        assert decode_image(store.stored_bytes(Picture(path=path))).getpixel((0, 0)) == colour


def test_a_picture_in_many_rows_is_decoded_once(tmp_path, monkeypatch):
    seen, store = counted(monkeypatch), PictureStore()
    good, broken = encoded(photo((600, 500)), "JPEG"), b"<html>404</html>"
    (tmp_path / "good").write_bytes(good)
    (tmp_path / "broken").write_bytes(broken)
    for _ in range(3):
        assert store.stored_bytes(Picture(path=tmp_path / "good")) == store.stored_bytes(Picture(data=good))
        assert reason(Picture(path=tmp_path / "broken"), store) == reason(Picture(data=broken), store)
    assert Counter(seen) == {good: 1, broken: 1}  # whether as a file or as data


def kept(number: int, extra: int = 20_000) -> Picture:
    """A picture that is stored as it is, of about ``extra`` bytes: Pillow passes over what follows a PNG's end."""
    return Picture(data=encoded(Image.new("RGB", (4, 4), (number, 0, 0)), "PNG") + bytes(extra))


def test_what_is_remembered_is_bounded_in_bytes(monkeypatch):
    seen, store = counted(monkeypatch), PictureStore(cache_bytes=70_000)
    for number in (0, 1, 2, 0, 3):  # three fit; 1 has waited longest when 3 comes
        store.stored_bytes(kept(number))
    assert len(seen) == 4
    for number, is_decoded in ((3, False), (0, False), (2, False), (1, True), (3, True)):
        before = len(seen)
        store.stored_bytes(kept(number))
        assert (len(seen) > before) == is_decoded, number


def test_what_never_fits_drives_out_nothing(monkeypatch):
    seen, store = counted(monkeypatch), PictureStore(cache_bytes=70_000)
    for picture in (kept(0), kept(1, extra=100_000), kept(0)):
        assert store.stored_bytes(picture) == picture.data
    assert len(seen) == 2


def test_many_broken_pictures_do_not_fill_the_memory():
    store = PictureStore(cache_bytes=50_000)
    for number in range(200):
        reason(Picture(data=b"%d" % number), store)
    assert 0 < len(store._outcomes) <= 50_000 // 300


def test_a_picture_that_was_reduced_is_not_held():
    store, data = PictureStore(), encoded(photo((600, 500)), "PNG")
    before = sys.getrefcount(data)
    store.stored_bytes(Picture(data=data))
    assert sys.getrefcount(data) == before


@given(order=st.lists(st.integers(0, 5), max_size=20), cache_bytes=st.sampled_from([0, 2500, 10**6]))
@quick
def test_what_is_remembered_changes_no_bytes(order, cache_bytes):
    pictures = [Picture(data=encoded(photo((40 + 10 * n, 60)), "JPEG" if n % 2 else "BMP")) for n in range(5)]
    pictures.append(Picture(data=b"none"))
    store = PictureStore(LEAST_SHORT_SIDE, cache_bytes)
    for number in order:
        if number == 5:
            assert reason(pictures[5], store) == reason(pictures[5])
        else:
            assert store.stored_bytes(pictures[number]) == stored_bytes(pictures[number], LEAST_SHORT_SIDE)


@given(
    magic=st.sampled_from(
        [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"RIFF\x20\0\0\0WEBP"]
    ),
    rest=st.binary(max_size=200),
    short_side=st.sampled_from([None, LEAST_SHORT_SIDE, SHORT_SIDE]),
)
@quick
def test_any_bytes_are_stored_or_unusable(magic, rest, short_side):
    try:
        data = stored_bytes(Picture(data=magic + rest), short_side)
    except UnusableImageError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert decode_image(data).mode == "RGB"


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
    store = PictureStore()
    path.write_bytes(encoded(Image.new("RGB", (8, 8)), "PNG"))
    store.stored_bytes(Picture(path=path))
    path.unlink()
    assert reason(Picture(path=path), store) == "is missing"


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
