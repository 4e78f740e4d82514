"""A release in the M3EL format and what is built of it, for the tests of the build."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from m3el_hf.data.store import build
from tests.conftest import instance, write_release

FILES = {
    "person": 24,  # no splits
    "books_train": 4,
    "books_validation": 2,
    "books_test": 3,
}


def release(folder: Path) -> Path:
    for name, size in FILES.items():
        topic = name.partition("_")[0]
        start = 100 * list(FILES).index(name)
        rows = [instance(start + number, topic=topic, root="DiffMEL", difficulty="hard") for number in range(size)]
        rows[1] |= {"image": ["", "", ""]}
        write_release(folder, rows, f"{name}.json")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release(tmp_path_factory.mktemp("source") / "release")


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("built") / "m3el"
    build("m3el", source, output, progress=False)
    return output


def contents(folder: Path) -> dict[str, str]:
    """Every file with a digest of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
