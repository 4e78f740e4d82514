"""How fast a raw release becomes a dataset folder, in how much memory, how large it is, and how much of it is new.

    python benchmarks/data_build.py [--rows 1500] [--memory-rows 5000 20000]

The release is generated: mini's rows with 640 x 480 JPEG pictures. Baselines, measured in the same run on the same
pictures: Pillow's decode alone, which no build can beat on one core, and the way that `datasets` offers, `imagefolder`
written to Parquet, which copies pictures without looking at them. How much of a new version, with 1 % more rows, the
Hub would have to store is estimated by cutting files as it does: into pieces of about 64 kB that end where their bytes
say so.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import load_dataset
from datasets.table import embed_table_storage
from PIL import Image

from m3el_hf.data.mini import read_mini
from m3el_hf.data.schema import Picture
from m3el_hf.data.store import build

SIZE = (640, 480)


def main() -> None:
    """Prints every figure with its baseline."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1500, help="rows of the release")
    parser.add_argument(
        "--memory-rows", type=int, nargs="*", default=[5000, 20000], help="rows of mini to measure memory at"
    )
    options = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        measure_speed(Path(folder), options.rows)
        for rows in options.memory_rows:
            measure_memory(Path(folder), rows)


def measure_speed(folder: Path, rows: int) -> None:
    release = folder / "release"
    write_release(release, rows)
    pictures = sorted(release.rglob("*.jpg"))
    size = sum(path.stat().st_size for path in pictures)
    print(f"release: {rows} rows, {4 * rows} pictures named, {len(pictures)} JPEG of {SIZE[0]} x {SIZE[1]}")
    shown = {"pictures": len(pictures), "size": size}
    decode = timed(partial(decode_all, pictures))
    show("Pillow decode alone", decode, **shown)
    show("imagefolder to Parquet, no decode", timed(partial(imagefolder, release, folder)), **shown)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for processes in (1, 2) * 3:  # in turns, as other work on the machine comes and goes
        options = {"num_proc": processes, "progress": False, "overwrite": True}
        seconds[processes].append(timed(partial(build, "m3el", release, folder / f"built{processes}", **options)))
        name = f"build, processes: {processes}"
        show(name, seconds[processes][-1], rows=rows, processes=processes, **shown)
    one, two = (min(found) for found in seconds.values())
    print(
        f"  at best: one process takes {one / decode:.2f} times Pillow's decode; "
        f"two are {one / two:.2f} times as fast ({os.cpu_count()} CPUs)"
    )
    build("m3el", release, folder / "originals", short_side=None, progress=False)
    for name in ("built1", "originals"):
        show_size(name, folder / name)
    show_update(release, folder / "built1")


def write_release(folder: Path, rows: int) -> None:
    """Writes mini in the release format, each picture once, as photographs are: large JPEG."""
    instances: dict[str, list[dict[str, Any]]] = {}
    for number, record in enumerate(read_mini(rows)):
        images = folder / f"{record.topic}_candidates_images"
        images.mkdir(parents=True, exist_ok=True)
        candidates = [
            {
                "Qid": one.qid,
                "name": one.name,
                "description": one.description,
                "image": write_picture(images / f"{one.qid}.jpg", one.picture),
            }
            for one in record.candidates
        ]
        instances.setdefault(record.topic or "", []).append(
            {
                "Qid": record.answer_qid,
                "name": record.mention,
                "sentence": record.context,
                "image": write_picture(images / f"mention{number}.jpg", record.picture),
                "candidates": candidates,
            }
        )
    for topic, found in instances.items():
        (folder / f"{topic}.json").write_text(json.dumps(found))


def write_picture(path: Path, picture: Picture | None) -> list[str]:
    if picture is None or picture.data is None:
        return ["", "", ""]
    if not path.exists():
        Image.open(io.BytesIO(picture.data)).convert("RGB").resize(SIZE, Image.Resampling.BICUBIC).save(
            path, quality=90
        )
    return [path.name, "", f"/M3EL/{path.parent.name}/{path.name}"]


def decode_all(paths: list[Path]) -> None:
    for path in paths:
        Image.open(path).convert("RGB")


def imagefolder(release: Path, folder: Path) -> None:
    rows = load_dataset(
        "imagefolder", data_dir=str(release), split="train", drop_labels=True, cache_dir=str(folder / "cache")
    )
    rows.with_format("arrow").map(embed_table_storage, batched=True).to_parquet(str(folder / "imagefolder.parquet"))


def timed(action: Any) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def show(name: str, seconds: float, *, pictures: int, size: int, rows: int | None = None, processes: int = 1) -> None:
    rate = f"{rows / seconds:8.0f} rows/s" if rows else " " * 15
    a_core = pictures / seconds / processes
    print(f"  {name:36}{seconds:7.1f} s{rate}{a_core:8.0f} pictures/s a core{size / seconds / 1e6:8.1f} MB/s")


def show_size(name: str, built: Path) -> None:
    """The rows' files against each distinct picture once, and against each row with pictures of its own."""
    stored = sum(path.stat().st_size for path in (built / "data").rglob("*.parquet"))
    unique: dict[int, int] = {}
    named = 0
    for split in load_dataset(str(built), cache_dir=str(built.parent / "cache")).values():
        for row in split.with_format("arrow").select_columns(["mention_image", "candidate_images"])[:].to_pylist():
            for image in (row["mention_image"], *row["candidate_images"]):
                if image is not None:
                    unique[hash(image["bytes"])] = len(image["bytes"])
                    named += len(image["bytes"])
    total = sum(unique.values())
    print(
        f"  {name}: data/ is {stored / 1e6:.1f} MB, {stored / total:.2f} times its distinct pictures; "
        f"with pictures stored in every row it would be {named / total:.2f} times"
    )


def show_update(release: Path, built: Path) -> None:
    """What of a version would be new to a store that has the one without every hundredth row."""
    older = release.parent / "older"
    shutil.copytree(release, older)
    for path in older.glob("*.json"):
        rows = json.loads(path.read_text())
        path.write_text(json.dumps([row for number, row in enumerate(rows) if number % 100 != 50]))
    build("m3el", older, release.parent / "built_older", progress=False)
    known, pieces = pieces_of(release.parent / "built_older"), pieces_of(built)
    new = sum(size for digest, size in pieces.items() if digest not in known)
    total = sum(pieces.values())
    print(f"  with 1 % more rows, {new / total:.1%} of {total / 1e6:.1f} MB are new to a store with the older version")


def pieces_of(folder: Path) -> dict[bytes, int]:
    """The sizes of the distinct pieces of all files, cut by a gear hash over 64 bytes."""
    gear = np.random.default_rng(0).integers(0, 2**64, 256, dtype=np.uint64)
    pieces = {}
    for path in folder.rglob("*.parquet"):
        data = path.read_bytes()
        values = gear[np.frombuffer(data, np.uint8)]
        rolling = np.zeros_like(values)
        for age in range(64):
            rolling[age:] += values[: len(values) - age] << np.uint64(age)
        start = 0
        for end in [*(np.flatnonzero(rolling >> np.uint64(48) == 0) + 1).tolist(), len(data)]:
            if end - start >= 8192 or end == len(data):
                pieces[hashlib.sha256(data[start:end]).digest()] = end - start
                start = end
    return pieces


def measure_memory(folder: Path, rows: int) -> None:
    """Peak resident memory of a build of mini in a process of its own."""
    code = f"""
import time
from pathlib import Path
from m3el_hf.data.store import build
start = time.perf_counter()
build("mini", None, Path({str(folder / f"mini{rows}")!r}), progress=False, instances={rows})
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(time.perf_counter() - start, int(peak.split()[1]) / 1024)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, peak = map(float, output.split())
    print(f"mini, {rows} rows: {rows / seconds:.0f} rows/s, peak resident memory {peak:.0f} MB")


if __name__ == "__main__":
    main()
