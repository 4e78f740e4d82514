"""From a picture as a source names it to the bytes that the dataset stores."""

from __future__ import annotations

import io
import stat
import warnings
from functools import lru_cache
from pathlib import Path

from PIL import Image

from m3el_hf.data.schema import Picture
from m3el_hf.modeling.decoding_clipnd import ALLOWED_FORMATS, UnusableImageError, decode_image

SHORT_SIDE = 256
"""Stored pictures are reduced to this short side, in pixels: CLIP's towers read 224 or 336."""


def stored_bytes(picture: Picture) -> bytes:
    """Returns the picture as it is stored: upright RGB, short side at most `SHORT_SIDE`; the same bytes at every call.

    A picture that already is so keeps its bytes. Others become JPEG if they were JPEG, else PNG, which adds no loss.

    Raises:
        UnusableImageError: If the picture is absent or cannot be decoded; the message is the reason.
    """
    if picture.flaw is not None:
        raise UnusableImageError(picture.flaw)
    return _stored_bytes(picture, None if picture.path is None else _version(picture.path))


def _version(path: Path) -> tuple[int, int]:
    """What changes when the file does."""
    try:
        state = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UnusableImageError("is missing") from None
    except (OSError, ValueError) as error:
        raise UnusableImageError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(state.st_mode):
        raise UnusableImageError("is not a file")
    return state.st_mtime_ns, state.st_size


@lru_cache(maxsize=1024)  # a candidate's picture comes back in many rows
def _stored_bytes(picture: Picture, version: tuple[int, int] | None) -> bytes:
    data = picture.data
    if data is None:
        if picture.path is None:
            raise UnusableImageError("is missing")
        try:
            data = picture.path.read_bytes()
        except OSError as error:
            raise UnusableImageError(f"cannot be read ({error.strerror or error})") from error
    image = decode_image(data)
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=ALLOWED_FORMATS) as original:
        kept = original.format in ("JPEG", "PNG") and original.mode == "RGB" and original.size == image.size
        kept = kept and original.getexif().get(0x0112, 1) == 1 and "transparency" not in original.info
        is_jpeg = original.format in ("JPEG", "MPO")  # MPO: a camera's JPEG with a second one behind it
    if kept and min(image.size) <= SHORT_SIDE:
        return data
    return _encode(_reduce(image), is_jpeg)


def _reduce(image: Image.Image) -> Image.Image:
    ratio = SHORT_SIDE / min(image.size)
    if ratio >= 1:
        return image
    size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def _encode(image: Image.Image, is_jpeg: bool) -> bytes:
    buffer = io.BytesIO()
    if is_jpeg:
        image.save(buffer, "JPEG", quality=92)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()
