"""What several tests share: a generated dataset on disk, tiny models, a Hub in-process, and where real sets may lie."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import DatasetDict, disable_progress_bars, load_dataset
from PIL import Image

from m3el_hf import ClipNDConfig, ClipNDModel, ClipNDProcessor
from m3el_hf.data.collection import Collection, Spool
from m3el_hf.data.images import PictureStore
from m3el_hf.data.rows import RowMaker
from m3el_hf.data.schema import SPLITS
from m3el_hf.data.store import build
from tests.browser import Browser, find_browser
from tests.hub_server import HubServer

REAL_DATA = Path(os.environ.get("M3EL_REAL_DATA", Path(__file__).parents[2] / "shared"))
"""Real sets and reference outputs, where this checkout has them beside it; tests that need them skip elsewhere."""


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
"""Noise, 70 pixels wide and 50 high."""


def encoded(image: Image.Image = PICTURE) -> bytes:
    """The picture as a PNG file's bytes."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def real(name: str) -> Path:
    """The folder or file of a real set, or a skip that says what is missing."""
    path = REAL_DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not here: set M3EL_REAL_DATA to the folder that holds it")
    return path


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_isolated(tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built dataset repository folder of 150 generated instances."""
    output = tmp_path_factory.mktemp("store") / "m3el"
    build("mini", None, output, progress=False, instances=150)
    return output


@pytest.fixture(scope="session")
def data(store: Path) -> DatasetDict:
    """The `all` config of `store`."""
    return load_dataset(str(store))


@pytest.fixture(scope="session")
def processor() -> ClipNDProcessor:
    """A processor with a vocabulary of bytes and a few words."""
    return ClipNDProcessor.tiny(["a band from Kansas known for a red star", "a state of the plains"], vocab_size=600)


@pytest.fixture(params=["clip", "matching"])
def model(request: pytest.FixtureRequest, processor: ClipNDProcessor) -> ClipNDModel:
    """A tiny random model of each head."""
    return tiny_model(processor, request.param)


def tiny_model(processor: ClipNDProcessor, head: str = "clip", seed: int = 0) -> ClipNDModel:
    """A tiny random model, the same for the same seed."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    return ClipNDModel(ClipNDConfig.tiny(len(tokenizer), tokenizer.eos_token_id, width=32, head=head)).eval()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub server in this process, for clients in processes of their own."""
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A browser without a window, or a skip where none is installed."""
    path = find_browser()
    if path is None:
        pytest.skip("neither Chromium nor Chrome is installed: pages are not tried in a browser")
    with Browser(path) as one:
        yield one


def rows_of(collection: Collection, split: str, topic: str | None = None) -> list[dict[str, Any]]:
    """The rows of a split as a build would write them."""
    maker = RowMaker(Spool(collection.folder), PictureStore())
    return [row for piece in collection.pieces(split, topic, size=10**9) for row in maker.rows(piece)]


def entities_of(collection: Collection) -> list[dict[str, Any]]:
    """The entities as a build would write them."""
    maker = RowMaker(Spool(collection.folder), PictureStore())
    pieces = [piece for split in SPLITS for piece in collection.pieces(split, size=10**9)]
    described = [row for piece in pieces for rows in maker.described(piece) for row in rows]
    return described + [row for part in collection.base(size=10**9) for row in maker.base(part)]


def write_release(folder: Path, instances: list[dict[str, Any]], name: str = "person.json", form: str = "json") -> Path:
    """Writes instances in the M3EL release format and a picture for each path they name; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = {
        "json": lambda: json.dumps(instances),
        "jsonl": lambda: "\n".join(json.dumps(one) for one in instances),
        "literal": lambda: repr(instances),
        "literal_lines": lambda: "\n".join(repr(one) for one in instances),
    }[form]()
    (folder / name).write_text(text, encoding="utf-8")
    for number, one in enumerate(instances):
        for shade, entry in enumerate([one, *one.get("candidates", [])]):
            location = (entry.get("image") or [None, None, None])[2]
            if location:
                path = folder / Path(location.lstrip("/")).relative_to(Path(location.lstrip("/")).parts[0])
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 30), (40 * shade % 256, 20 * number % 256, 90)).save(path)
    return folder


def instance(
    number: int = 0, *, topic: str = "person", root: str = "M3EL", images: bool = True, **changes: Any
) -> dict[str, Any]:
    """One instance as the release writes it: the gold Q<number>0 first of three candidates."""

    def image(file: str) -> list[str]:
        folder = f"/{root}/{topic}_candidates_images/Name {number}-Q{number}0"
        return [file, f"https://example.org/{file}", f"{folder}/{file}"] if images else ["", "", ""]

    entry: dict[str, Any] = {
        "Qid": f"Q{number}0",
        "name": f"Name {number}",
        "description": f"the {number}th person",
        "sentence": f"Name {number} went home.\n",
        "image": image(f"mention{number}.png"),
        "candidates": [
            {
                "Qid": f"Q{number}{k}",
                "name": f"Name {number}{'abc'[k]}",
                "description": f"description {number} {k}",
                "image": image(f"Q{number}{k}.png"),
            }
            for k in range(3)
        ],
    }
    return entry | changes
