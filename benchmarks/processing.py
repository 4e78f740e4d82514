"""What preparing a picture costs beside plain Pillow and NumPy: decode, resize, crop, to floats, normalise.

Once from JPEG files' bytes, and once from pictures that are decoded already, where nothing hides the rest.

    python benchmarks/processing.py [--pictures 40] [--repeats 7] [--side 224]

Baselines, measured in the same run, in turns: the same steps written out with Pillow and NumPy, and
`CLIPImageProcessorPil`. It also checks that all three give the same pixels.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

from m3el_hf import ClipNDProcessor

Picture = bytes | Image.Image
Way = Callable[[Picture], Tensor]

SIZES = ((320, 240), (640, 480), (1600, 1200))
"""A thumbnail, the usual picture of a data set, a photograph; of each as many as cost about the same."""


def main() -> None:
    """Prints pictures a second of each way, and their ratio to plain Pillow, for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=40, help="of the smallest size; fewer of the larger ones")
    parser.add_argument("--repeats", type=int, default=7, help="the best of these counts")
    parser.add_argument("--side", type=int, default=224, help="of the prepared picture, in pixels")
    options = parser.parse_args()
    torch.set_num_threads(1)
    processor = ClipNDProcessor.tiny(["a picture"], image_size=options.side)
    clip = processor.image_processor
    ways: dict[str, Way] = {
        "Pillow and NumPy": lambda picture: plain(picture, clip),
        "ClipNDProcessor": processor.pixel_values,
        "CLIPImageProcessorPil": lambda picture: by_clip(picture, clip),
    }
    for size in SIZES:
        number = max(2, options.pictures * SIZES[0][0] * SIZES[0][1] // (size[0] * size[1]))
        pictures = [jpeg(size, seed) for seed in range(number)]
        for name, way in ways.items():
            apart = max((way(one) - by_clip(one, clip)).abs().max().item() for one in pictures)
            assert apart <= 1e-6, f"{name} is {apart} from CLIPImageProcessorPil"
        for kind, given in (("JPEGs", pictures), ("decoded pictures", [opened(one) for one in pictures])):
            rates = in_turns(ways, given, options.repeats)
            print(f"{number} {kind} of {size[0]} x {size[1]} to {options.side} x {options.side}, one thread")
            for name, rate in rates.items():
                print(f"  {name:24}{rate:8.0f} pictures/s{rate / rates['Pillow and NumPy']:8.2f} times plain Pillow's")


def opened(picture: Picture) -> Image.Image:
    return Image.open(io.BytesIO(picture)).convert("RGB") if isinstance(picture, bytes) else picture


def plain(picture: Picture, clip: CLIPImageProcessorPil) -> Tensor:
    """The steps as one would write them down; the baseline."""
    image = opened(picture)
    side, short = clip.crop_size.height, min(image.size)
    image = image.resize(tuple(int(side * edge / short) for edge in image.size), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
    pixels = (pixels - np.float32(clip.image_mean)) / np.float32(clip.image_std)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def by_clip(picture: Picture, clip: CLIPImageProcessorPil) -> Tensor:
    return torch.from_numpy(clip(opened(picture), return_tensors="np")["pixel_values"][0])


def jpeg(size: tuple[int, int], seed: int) -> bytes:
    """A photograph's like: soft shapes and some grain."""
    random = np.random.default_rng(seed)
    shapes = Image.fromarray(random.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8))
    grain = random.integers(-6, 7, (size[1], size[0], 3))
    pixels = np.clip(np.asarray(shapes.resize(size, Image.Resampling.BICUBIC)) + grain, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=87)
    return file.getvalue()


def in_turns(ways: dict[str, Way], pictures: Sequence[Picture], repeats: int) -> dict[str, float]:
    """Pictures a second of each way, at its best; the ways take turns, so that what else runs slows all alike."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            for one in pictures:
                way(one)
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: len(pictures) / seconds for name, seconds in best.items()}


if __name__ == "__main__":
    main()
