"""A 64-bit hash of what a picture looks like: copies of a picture differ in few bits, other pictures in many.

The DCT hash of C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010), known as pHash:
the signs of 8 x 8 low frequencies of a 32 x 32 grey copy. One change: Zauner cuts at the median of the frequencies,
which is near zero, and a picture that is its own mirror image (an emblem, a face, a logo on white) has half of them at
zero but for noise, so that a copy of it flips those bits at random. Here a frequency must rise above a share of their
strength, which noise does not reach.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NEAR_SAME = 6
"""Two pictures whose hashes differ in at most this many of 64 bits count as near-same: resized and recompressed copies
stay within it almost always, and so do few pairs of different pictures. The hash sees no colour: the same drawing in
another colour is near-same."""

_SIDE = 32
_FREQUENCIES = slice(1, 9)  # without the first row and column, as Zauner: they tell brightness and gradients
_RISE = 0.2
_LEAST_STRENGTH = 4.0  # of a picture that varies by one grey level (of 256) in all


def _dct_matrix(size: int) -> NDArray[np.float64]:
    """The orthonormal DCT-II as a matrix ``[frequency, position]``."""
    frequency, position = np.arange(size)[:, None], np.arange(size)[None, :]
    matrix = np.cos(np.pi * (2 * position + 1) * frequency / (2 * size)) * np.sqrt(2 / size)
    matrix[0] /= np.sqrt(2)
    return matrix


_DCT = _dct_matrix(_SIDE)[_FREQUENCIES]


def perceptual_hash(image: Image.Image) -> int | None:
    """Returns the hash, 0 to 2**64 - 1; None for a picture without structure in both directions (one colour, stripes).

    Args:
        image: A decoded picture of any size.
    """
    grey = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    frequencies = (_DCT @ np.asarray(grey, dtype=np.float64) @ _DCT.T).ravel()
    strength = float(np.sqrt(np.mean(frequencies**2)))
    if strength < _LEAST_STRENGTH:
        return None
    return int.from_bytes(np.packbits(frequencies > _RISE * strength).tobytes())


def hash_distance(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Returns in how many of 64 bits hashes differ, element by element."""
    return np.bitwise_count(one ^ other)
