from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps

from m3el_hf.data.perceptual import NEAR_SAME, hash_distance, perceptual_hash
from m3el_hf.modeling.decoding_clipnd import decode_image
from tests.conftest import real


def scene(seed: int, size: tuple[int, int] = (200, 160)) -> Image.Image:
    """A picture of soft blots."""
    blots = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    return Image.fromarray(blots).resize(size, Image.Resampling.BICUBIC)


def emblem(seed: int) -> Image.Image:
    """A drawing on white that is its own mirror image, as logos and faces are."""
    draws = np.random.default_rng(seed)
    image = Image.new("RGB", (128, 128), "white")
    canvas = ImageDraw.Draw(image)
    for _ in range(5):
        left, top, bottom = draws.integers(4, 60), draws.integers(4, 100), draws.integers(8, 60)
        colour = tuple(int(one) for one in draws.integers(0, 200, 3))
        canvas.ellipse((left, top, 127 - left, min(124, top + bottom)), fill=colour)
    return Image.blend(image, ImageOps.mirror(image), 0.5)


def copy(image: Image.Image, scale: float, quality: int) -> Image.Image:
    """The same picture, resized and compressed."""
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return decode_image(buffer.getvalue())


def apart(one: Image.Image, other: Image.Image) -> int:
    hashes = [perceptual_hash(image) for image in (one, other)]
    assert None not in hashes
    first, second = (np.array([found], dtype=np.uint64) for found in hashes)
    return int(hash_distance(first, second)[0])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(0.4, 2.0),
    quality=st.integers(40, 95),
    draw=st.sampled_from([scene, emblem]),
)
def test_a_resized_and_recompressed_copy_is_near_same(seed, scale, quality, draw):
    image = draw(seed)
    assert apart(image, copy(image, scale, quality)) <= NEAR_SAME


def test_different_pictures_are_far_apart():
    hashes = np.array([perceptual_hash(scene(seed)) for seed in range(120)], dtype=np.uint64)
    distances = hash_distance(hashes[:, None], hashes[None, :])[np.triu_indices(len(hashes), 1)]
    assert distances.min() > NEAR_SAME
    assert 24 < np.median(distances) < 36


def test_brightness_and_contrast_hardly_matter():
    image = scene(3)
    dull = image.point([round(60 + value * 0.5) for value in range(256)] * 3)
    assert apart(image, dull) <= 2


def test_colour_is_not_seen():
    grey = scene(5).convert("L")
    assert apart(ImageOps.colorize(grey, "black", "orange"), ImageOps.colorize(grey, "black", "skyblue")) <= 2


def test_a_mirrored_picture_is_another():
    assert apart(scene(7), ImageOps.mirror(scene(7))) > NEAR_SAME


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (3, 500)])
def test_a_picture_of_one_colour_has_no_hash(size):
    assert perceptual_hash(Image.new("RGB", size, (200, 30, 30))) is None


def test_stripes_have_no_hash():
    stripes = np.repeat(np.array([0, 255] * 4, dtype=np.uint8), 16)
    assert perceptual_hash(Image.fromarray(np.tile(stripes, (100, 1)))) is None


def test_the_hash_has_64_bits_and_is_the_same_at_every_call():
    found = perceptual_hash(scene(1))
    assert found == perceptual_hash(scene(1))
    assert 0 < found < 2**64


def test_real_drawings_of_two_foundries_are_mostly_not_near_same_but_copies_are():
    folder = real("data/emoji")
    instances = json.loads((folder / "common_validation.json").read_text(encoding="utf-8"))

    def picture(entry) -> Image.Image:
        return decode_image(folder / "/".join(entry["image"][2].strip("/").split("/")[1:]))

    golds, others, copies = [], [], []
    for one in instances:
        mention = picture(one)
        for candidate in one["candidates"]:
            shown = picture(candidate)
            if perceptual_hash(mention) is not None and perceptual_hash(shown) is not None:
                (golds if candidate["Qid"] == one["Qid"] else others).append(apart(mention, shown))
        if perceptual_hash(mention) is not None:
            copies += [apart(mention, copy(mention, scale, quality)) for scale, quality in ((1, 30), (0.5, 75))]
    golds, others, copies = (np.array(found) <= NEAR_SAME for found in (golds, others, copies))
    assert golds.mean() < 0.12
    assert others.mean() < 0.02
    assert copies.mean() > 0.98
