"""Opening pictures that nobody vouches for. The processor and the dataset builder both do it here."""

from __future__ import annotations

import io
import stat
import warnings
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

ALLOWED_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")
MAX_PIXELS = 60_000_000
MAX_BYTES = 8 * MAX_PIXELS
"""Of a file. Without compression, the largest picture with four channels of 16 bits takes no more."""


class UnusableImageError(ValueError):
    """A picture that cannot be decoded; the message is the reason."""


def decode_image(source: bytes | str | Path, short_side: int | None = None) -> Image.Image:
    """Decodes the first frame of a picture to upright RGB, transparency on white.

    Only `ALLOWED_FORMATS` are tried and nothing above `MAX_PIXELS` is decoded, so that a hostile or broken file costs
    little.

    Args:
        source: The encoded bytes, or the path of the file that holds them.
        short_side: How many pixels of the short side the caller has use for. A larger JPEG is then decoded at a
            half, a quarter or an eighth of its size, never below this side, which takes a fraction of the time; other
            formats have no such way and come in full. None decodes in full.

    Raises:
        UnusableImageError: If it cannot be decoded, for whatever reason; no other exception escapes.
    """
    data = source if isinstance(source, bytes) else read_file(Path(source))
    if not data:
        raise UnusableImageError("is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures and odd metadata; the cap below decides
            with Image.open(io.BytesIO(data), formats=ALLOWED_FORMATS) as image:
                _check_size(image)
                if short_side is not None:
                    image.draft(None, (short_side, short_side))
                return to_rgb(image)
    except UnusableImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise UnusableImageError(f"is not a picture in one of the formats {', '.join(ALLOWED_FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise anything from struct.error to RecursionError on broken files
        raise UnusableImageError(f"cannot be decoded ({type(error).__name__}: {error})") from error


def read_file(path: Path) -> bytes:
    """Returns the bytes of a file that may be anything; never waits for a pipe.

    Raises:
        UnusableImageError: If it is missing, no file, over `MAX_BYTES`, or cannot be read.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise UnusableImageError("is not a file")
        if state.st_size > MAX_BYTES:
            raise UnusableImageError(f"has {state.st_size:,} bytes, over {MAX_BYTES:,}")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UnusableImageError("is missing") from None
    except UnusableImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise UnusableImageError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Turns a picture upright by its EXIF tag and flattens it to RGB, transparency on white.

    A picture that is both already is returned itself, not copied.

    Raises:
        UnusableImageError: If it has no pixels, more than `MAX_PIXELS`, or such as are not of a known range.
    """
    _check_size(image)
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise UnusableImageError("has pixels that are fractions: nothing says which value is white")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.getextrema()[1] > 255):  # type: ignore[operator]
        image = image.convert("I")  # Pillow scales I;16 and this, but not the big-endian I;16B of some TIFF files
        image = image.point(lambda value: value * (1 / 256)).convert("L")  # else Pillow turns all above 255 white
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        canvas.alpha_composite(layer)
        image = canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_size(image: Image.Image) -> None:
    """Refuses what is empty or too large, before it is decoded where it still can."""
    if 0 in image.size:
        raise UnusableImageError("has no pixels")
    if image.width * image.height > MAX_PIXELS:
        raise UnusableImageError(f"has {image.width} x {image.height} pixels, over {MAX_PIXELS:,}")
