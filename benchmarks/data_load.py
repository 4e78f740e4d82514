"""What reading a dataset folder costs: bytes read by a task without pictures, and the rate of a streaming epoch.

    python benchmarks/data_load.py [--rows 3000]

Baselines, measured in the same run: the config `all`, `datasets`' own `imagefolder` over the same pictures as files,
and Pillow's decode of them alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from datasets import disable_progress_bars, load_dataset
from PIL import Image

from m3el_hf.data.store import build

EPOCH = """
import json, sys, time
from datasets import load_dataset

def read():
    return int(next(line for line in open("/proc/self/io")).split()[1])

path, config, decode, options = sys.argv[1], sys.argv[2] or None, sys.argv[3] == "decode", json.loads(sys.argv[4])
for _ in range(2):  # the first reads the libraries, too
    before, start = read(), time.perf_counter()
    rows = load_dataset(path, config, split="train", streaming=True, **options)
    rows = rows if decode else rows.decode(False)
    count = pictures = 0
    for row in rows:
        count += 1
        images = [row.get("image"), row.get("mention_image"), *row.get("candidate_images", ())]
        pictures += sum(image is not None for image in images)
print(json.dumps([time.perf_counter() - start, count, pictures, read() - before]))
"""


def main() -> None:
    """Prints every figure with its baseline."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=3000, help="rows of mini")
    options = parser.parse_args()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        built, loose = Path(folder) / "m3el", Path(folder) / "loose"
        build("mini", None, built, progress=False, instances=options.rows)
        write_loose(built, loose)
        everything = epoch("all, pictures as bytes", built, "all")
        text = epoch("t2t", built, "t2t")
        print(
            f"  t2t reads {text / 1e6:.2f} MB, {everything / text:.0f} times less than all ({everything / 1e6:.1f} MB)"
        )
        epoch("i2i, pictures decoded", built, "i2i", decode=True)
        epoch("imagefolder, pictures decoded", "imagefolder", "", decode=True, data_dir=str(loose), drop_labels=True)
        show_decode(sorted(loose.iterdir()))
        epoch("imagefolder, pictures as bytes", "imagefolder", "", data_dir=str(loose), drop_labels=True)


def show_decode(paths: list[Path]) -> None:
    start = time.perf_counter()
    for path in paths:
        Image.open(path).convert("RGB")
    print(f"  {'Pillow decode alone':34}{'':15}{len(paths) / (time.perf_counter() - start):8.0f} pictures/s")


def write_loose(built: Path, folder: Path) -> None:
    """Writes every picture of the training rows as a file, as often as rows show it."""
    folder.mkdir()
    number = 0
    for row in (
        load_dataset(str(built), split="train")
        .with_format("arrow")
        .select_columns(["mention_image", "candidate_images"])[:]
        .to_pylist()
    ):
        for image in (row["mention_image"], *row["candidate_images"]):
            if image is not None:
                (folder / f"{number}.png").write_bytes(image["bytes"])
                number += 1


def epoch(name: str, path: Path | str, config: str, decode: bool = False, **options: object) -> int:
    """Streams the training rows once, in a process of its own, and returns the bytes that it read."""
    arguments = [str(path), config, "decode" if decode else "bytes", json.dumps(options)]
    output = subprocess.run(
        [sys.executable, "-c", EPOCH, *arguments], capture_output=True, text=True, check=True
    ).stdout
    seconds, rows, pictures, read = json.loads(output)
    print(
        f"  {name:34}{rows / seconds:8.0f} rows/s{pictures / seconds:8.0f} pictures/s{read / seconds / 1e6:8.1f} MB/s"
    )
    return int(read)


if __name__ == "__main__":
    main()
