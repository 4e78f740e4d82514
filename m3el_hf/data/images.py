"""From a picture as a source names it to the bytes that the dataset stores."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections import OrderedDict

from PIL import Image

from m3el_hf.data.schema import Picture
from m3el_hf.errors import M3ELError
from m3el_hf.modeling.decoding_clipnd import ALLOWED_FORMATS, UnusableImageError, decode_image, read_file

SHORT_SIDE = 256
"""Stored pictures are reduced to this short side, in pixels: CLIP's towers read 224 or 336."""

LEAST_SHORT_SIDE = 16
CACHE_BYTES = 1 << 27

_LARGEST_MAPPED = (1 << 25) - (1 << 13)
_ENTRY_BYTES = 300  # about what an entry of the cache takes beside its outcome
_GAP = 2  # decoding at this multiple of the wanted size changes photographs by less than a grey level on average


class PictureStore:
    """Turns pictures into the bytes to store, and remembers the last ones: a candidate's comes back in many rows.

    What is remembered changes how long a call takes and never what it returns.

    Args:
        short_side: Larger pictures are reduced to this short side, in pixels; None keeps the files as they are.
        cache_bytes: How much may be remembered.

    Raises:
        M3ELError: If ``short_side`` is below `LEAST_SHORT_SIDE`.

    Example:
        >>> image = Image.new("RGB", (640, 480))
        >>> file = io.BytesIO()
        >>> image.save(file, "JPEG")
        >>> decode_image(PictureStore(short_side=120).stored_bytes(Picture(data=file.getvalue()))).size
        (160, 120)
    """

    def __init__(self, short_side: int | None = SHORT_SIDE, cache_bytes: int = CACHE_BYTES) -> None:
        if short_side is not None and short_side < LEAST_SHORT_SIDE:
            raise M3ELError(
                f"a short side of {short_side} pixels shows nothing: give at least {LEAST_SHORT_SIDE}, "
                "or keep the originals"
            )
        self._short_side = short_side
        self._cache_bytes = cache_bytes
        self._used = 0
        self._outcomes: OrderedDict[bytes, bytes | str] = OrderedDict()  # the bytes, or why there are none

    def stored_bytes(self, picture: Picture) -> bytes:
        """Returns the picture as it is stored: upright RGB, short side at most ``short_side``.

        A picture that already is so keeps its bytes. Others become JPEG if they were JPEG, else PNG, which adds no
        loss; metadata do not come along. Where the originals are kept, every picture that decodes keeps its bytes.
        The same picture gives the same bytes at every call.

        Raises:
            UnusableImageError: If the picture is absent or cannot be decoded; the message is the reason.
        """
        if picture.flaw is not None:
            raise UnusableImageError(picture.flaw)
        data = picture.data if picture.path is None else read_file(picture.path)
        if data is None:
            raise UnusableImageError("is missing")
        key = hashlib.blake2b(data, digest_size=16).digest()  # a release has the same picture in many folders
        outcome = self._outcomes.get(key)
        if outcome is None:
            outcome = self._convert(data)
            self._remember(key, outcome)
        else:
            self._outcomes.move_to_end(key)
        if isinstance(outcome, str):
            raise UnusableImageError(outcome)
        return outcome

    def _convert(self, data: bytes) -> bytes | str:
        """Returns what to store, or why it cannot be."""
        try:
            if self._short_side is None:
                decode_image(data, short_side=1)  # as broken at an eighth of the size as at the whole
                return data
            return _reduced(data, self._short_side)
        except UnusableImageError as reason:
            return str(reason)

    def _remember(self, key: bytes, outcome: bytes | str) -> None:
        size = len(outcome) + _ENTRY_BYTES
        if size > self._cache_bytes:
            return
        self._outcomes[key] = outcome
        self._used += size
        while self._used > self._cache_bytes:
            _, dropped = self._outcomes.popitem(last=False)  # the one not asked for longest
            self._used -= len(dropped) + _ENTRY_BYTES


def keep_freed_memory() -> None:
    """Makes the C library keep what large pictures free: to get it anew, page by page, takes a quarter of the time.

    glibc maps large blocks one by one until one is freed, and from then on only larger ones (mallopt(3),
    M_MMAP_THRESHOLD); this is the largest that counts. Other libraries do not mind.
    """
    bytes(_LARGEST_MAPPED)


def _reduced(data: bytes, short_side: int) -> bytes:
    image = decode_image(data, _GAP * short_side)
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=ALLOWED_FORMATS) as original:
        orientation = original.getexif().get(0x0112, 1)
        plain = original.format in ("JPEG", "PNG") and original.mode == "RGB"
        plain = plain and orientation == 1 and "transparency" not in original.info
        is_jpeg = original.format in ("JPEG", "MPO")  # MPO: a camera's JPEG with a second one behind it
        size = original.size[::-1] if orientation in range(5, 9) else original.size
    if plain and min(size) <= short_side:
        return data
    return _encode(_reduce(image, size if is_jpeg else image.size, short_side), is_jpeg)


def _reduce(image: Image.Image, size: tuple[int, int], short_side: int) -> Image.Image:
    """Reduces a picture that may have been decoded at a fraction, rounded up, of its true ``size``."""
    ratio = short_side / min(size)
    if ratio >= 1:
        return image
    reduced = (round(size[0] * ratio), round(size[1] * ratio))
    return image.resize(reduced, Image.Resampling.BICUBIC, reducing_gap=3.0)


def _encode(image: Image.Image, is_jpeg: bool) -> bytes:
    image.info = {}  # Pillow would write comments and colour profiles, which may be of the colours before RGB
    buffer = io.BytesIO()
    if is_jpeg:
        image.save(buffer, "JPEG", quality=92)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()
