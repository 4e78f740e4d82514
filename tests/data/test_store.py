from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, load_dataset

from m3el_hf.data import rows as rows_module
from m3el_hf.data import store as store_module
from m3el_hf.data.configs import CONFIGS
from m3el_hf.data.rows import Collection, collect
from m3el_hf.data.schema import ENTITY_FEATURES, ROW_FEATURES, SPLITS
from m3el_hf.data.store import build
from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TASKS
from tests.conftest import instance, write_release

ROOT = Path(__file__).parents[2]
FILES = {
    "person": 24,  # no splits
    "books_train": 4,
    "books_validation": 2,
    "books_test": 3,
}

READ_WITHOUT_THE_PACKAGE = """
import json, sys
sys.modules["m3el_hf"] = None  # importing it is an ImportError from here on
from datasets import Image, List, disable_progress_bars, load_dataset, load_dataset_builder

disable_progress_bars()
folder, configs = sys.argv[1], sys.argv[2:]
found = {}
for config in configs:
    data = load_dataset(folder, config) if config != "default" else load_dataset(folder)
    builder = load_dataset_builder(folder, None if config == "default" else config)
    files = [file.removeprefix(folder) for files in builder.config.data_files.values() for file in files]
    splits = {}
    for split, rows in data.items():
        decoded = rows[0]
        for column, feature in rows.features.items():
            if isinstance(feature, Image):
                rows = rows.cast_column(column, Image(decode=False))
            if isinstance(feature, List) and isinstance(feature.feature, Image):
                rows = rows.cast_column(column, List(Image(decode=False)))
        splits[split] = {
            "rows": json.loads(json.dumps(list(rows), default=lambda data: data.hex())),
            "features": {name: str(feature) for name, feature in data[split].features.items()},
            "pictures": sum(hasattr(one, "convert") for value in decoded.values()
                            for one in (value if isinstance(value, list) else [value])),
        }
    found[config] = {"splits": splits, "files": files}
print(json.dumps(found))
"""


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


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split, straight from the reader; files are read in the order of their names."""
    collection = collect("m3el", source)
    return {
        split: [row for topic in sorted(collection.topics) for row in collection.rows(split, topic)] for split in SPLITS
    }


@pytest.fixture(scope="module")
def elsewhere(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process that cannot import this package reads of the folder, by config."""
    home = tmp_path_factory.mktemp("home")
    configs = ["default", "all", "person", "books", *TASKS, "entities"]
    process = subprocess.run(
        [sys.executable, "-c", READ_WITHOUT_THE_PACKAGE, str(built), *configs],
        cwd=home,
        env=os.environ | {"HF_HOME": str(home), "HF_DATASETS_CACHE": str(home / "datasets"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def plain(value: Any) -> Any:
    """As JSON carries it."""
    return json.loads(json.dumps(value, default=bytes.hex))


def described(features: Features) -> dict[str, str]:
    """The columns and their types; Parquet files keep an order of their own."""
    return {name: str(feature) for name, feature in features.items()}


def contents(folder: Path) -> dict[str, str]:
    """Every file with a digest of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_nothing_loads(folder: Path) -> None:
    """Neither the folder nor what stands in it is taken for a dataset."""
    for one in (folder, *folder.iterdir()):
        with pytest.raises((FileNotFoundError, ValueError)):
            load_dataset(str(one))


@pytest.mark.parametrize("config", ["default", "all"])
def test_everything_loads_without_the_package(elsewhere, expected, config):
    found = elsewhere[config]["splits"]
    assert {split: one["rows"] for split, one in found.items()} == plain(expected)
    assert all(one["features"] == described(ROW_FEATURES) for one in found.values())


@pytest.mark.parametrize("topic", ["person", "books"])
def test_a_topic_loads_without_the_package(elsewhere, expected, topic):
    found = elsewhere[topic]["splits"]
    assert {split: one["rows"] for split, one in found.items()} == {
        split: [row for row in plain(rows) if row["topic"] == topic] for split, rows in expected.items()
    }


@pytest.mark.parametrize("task", TASKS)
def test_a_task_loads_without_the_package_and_shows_nothing_else(elsewhere, expected, task):
    found = elsewhere[task]["splits"]
    assert {split: one["rows"] for split, one in found.items()} == {
        split: [{column: row[column] for column in TASKS[task].columns} for row in plain(rows)]
        for split, rows in expected.items()
    }
    assert all(one["features"] == described(CONFIGS[task].features) for one in found.values())


@pytest.mark.parametrize("task", TASKS)
def test_pictures_decode_without_the_package(elsewhere, task):
    pictures = elsewhere[task]["splits"]["train"]["pictures"]
    assert pictures == TASKS[task].mention.has_image + 3 * TASKS[task].candidate.has_image


def test_no_picture_has_a_path(elsewhere):
    for row in (row for split in elsewhere["all"]["splits"].values() for row in split["rows"]):
        for image in (row["mention_image"], *row["candidate_images"]):
            assert image is None or (image["path"] is None and image["bytes"])
    for row in elsewhere["entities"]["splits"]["train"]["rows"]:
        assert row["image"]["path"] is None


def test_entities_load_once_each_without_the_package(elsewhere, source):
    found = elsewhere["entities"]["splits"]
    assert list(found) == ["train"]
    assert found["train"]["rows"] == plain(list(collect("m3el", source).entities()))
    assert found["train"]["features"] == described(ENTITY_FEATURES)
    qids = [row["qid"] for row in found["train"]["rows"]]
    assert len(qids) == len(set(qids)) == 3 * sum(FILES.values())


def test_text_alone_reads_the_text_files_alone(elsewhere):
    assert all(file.startswith("/text/") for file in elsewhere["t2t"]["files"])
    assert all(file.startswith("/data/") for task in TASKS if task != "t2t" for file in elsewhere[task]["files"])


def test_the_text_files_hold_the_same_rows_without_pictures(built):
    texts = sorted((built / "text").rglob("*.parquet"))
    assert texts
    for text in texts:
        full = pq.read_table(built / "data" / text.relative_to(built / "text"))
        table = pq.read_table(text)
        assert table.column_names == [
            name for name in ROW_FEATURES if name not in ("mention_image", "candidate_images")
        ]
        assert table.to_pylist() == full.select(table.column_names).to_pylist()
        assert not any(pa.types.is_binary(kind) or pa.types.is_struct(kind) for kind in table.schema.types)


def test_a_folder_streams(built, expected):
    rows = list(load_dataset(str(built), "t2t", split="test", streaming=True))
    assert [row["id"] for row in rows] == [row["id"] for row in expected["test"]]


def test_the_same_input_gives_the_same_bytes(built, source, tmp_path):
    build("m3el", source, tmp_path / "again", progress=False)
    assert contents(tmp_path / "again") == contents(built)


def test_another_seed_gives_other_bytes(built, source, tmp_path):
    build("m3el", source, tmp_path / "other", progress=False, seed=1)
    assert contents(tmp_path / "other") != contents(built)


def test_shards_join_to_the_same_rows(built, source, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "ROWS_PER_SHARD", 7)
    monkeypatch.setattr(store_module, "ROWS_PER_GROUP", 3)
    build("m3el", source, tmp_path / "m3el", progress=False)
    names = [path.name for path in sorted((tmp_path / "m3el" / "data" / "person").glob("train-*"))]
    assert names == [f"train-{shard:05d}-of-00003.parquet" for shard in range(3)]
    for config in ("all", "t2t", "entities"):
        sharded, whole = load_dataset(str(tmp_path / "m3el"), config), load_dataset(str(built), config)
        assert {split: rows.with_format("arrow")[:].to_pylist() for split, rows in sharded.items()} == {
            split: rows.with_format("arrow")[:].to_pylist() for split, rows in whole.items()
        }


def test_a_build_reports_what_was_missing(source, tmp_path):
    broken = tmp_path / "release"
    shutil.copytree(source, broken)
    picture = broken / "books_candidates_images" / "Name 100-Q1000" / "Q1001.png"
    picture.write_bytes(b"")
    collection = build("m3el", broken, tmp_path / "m3el", progress=False)
    assert collection.report.unusable_images == {str(picture): "is empty (0 bytes)"}
    rows = load_dataset(str(tmp_path / "m3el"), "books", split="train")
    assert sum(image is None for row in rows for image in row["candidate_images"]) == 1


def interrupt_row(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Interrupts while the row of this number is made."""

    def install(monkeypatch: pytest.MonkeyPatch) -> None:
        made = iter(range(number))
        whole = rows_module.make_row

        def make_row(*args: Any) -> dict[str, Any]:
            if next(made, None) is None:
                raise KeyboardInterrupt
            return whole(*args)

        monkeypatch.setattr(rows_module, "make_row", make_row)

    return install


def interrupt_entities(monkeypatch: pytest.MonkeyPatch) -> None:
    def entities(self: Collection) -> Iterator[dict[str, Any]]:
        yield {"qid": "Q1", "name": "one", "description": None, "image": None}
        raise KeyboardInterrupt

    monkeypatch.setattr(Collection, "entities", entities)


def interrupt(name: str, owner: Any = store_module, after: int = 0) -> Callable[[pytest.MonkeyPatch], None]:
    """Interrupts instead of a call of a function, when it has been called ``after`` times."""

    def install(monkeypatch: pytest.MonkeyPatch) -> None:
        calls = iter(range(after))
        whole = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return whole(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    return install


INTERRUPTS = {
    "first row": interrupt_row(0),
    "some row": interrupt_row(20),
    "last row": interrupt_row(sum(FILES.values()) - 1),
    "entities": interrupt_entities,
    "card": interrupt("render_dataset_card"),
    "rename": interrupt("rename", os),
}


@pytest.mark.parametrize("moment", INTERRUPTS)
def test_an_interrupted_build_leaves_nothing_that_loads(source, built, tmp_path, monkeypatch, moment):
    output = tmp_path / "m3el"
    with monkeypatch.context() as patch:
        INTERRUPTS[moment](patch)
        with pytest.raises(KeyboardInterrupt):
            build("m3el", source, output, progress=False)
    assert not output.exists()
    assert_nothing_loads(tmp_path)
    build("m3el", source, output, progress=False)
    assert contents(output) == contents(built)
    assert [path.name for path in tmp_path.iterdir()] == ["m3el"]


@pytest.mark.parametrize("moment", INTERRUPTS)
def test_an_interrupted_replacement_keeps_what_was_there(source, built, tmp_path, monkeypatch, moment):
    output = tmp_path / "m3el"
    shutil.copytree(built, output)
    with monkeypatch.context() as patch:
        INTERRUPTS[moment](patch)
        with pytest.raises(KeyboardInterrupt):
            build("m3el", source, output, progress=False, seed=1, overwrite=True)
    assert contents(output) == contents(built)
    build("m3el", source, output, progress=False, seed=1, overwrite=True)
    assert contents(output) != contents(built)
    assert [path.name for path in tmp_path.iterdir()] == ["m3el"]


def interrupt_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupts the first removal of a folder that holds something, when half of it is gone."""

    def remove(folder: Path, **_: Any) -> None:
        if files := sorted(path for path in folder.rglob("*") if path.is_file()):
            for path in files[::2]:
                path.unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", remove)


REPLACEMENTS = {"second rename": interrupt("rename", os, after=1), "removal": interrupt_removal}


@pytest.mark.parametrize("moment", REPLACEMENTS)
def test_half_of_a_replaced_folder_never_loads(source, built, tmp_path, monkeypatch, moment):
    output = tmp_path / "m3el"
    build("m3el", source, output, progress=False, seed=1)
    with monkeypatch.context() as patch:
        REPLACEMENTS[moment](patch)
        with pytest.raises(KeyboardInterrupt):
            build("m3el", source, output, progress=False, overwrite=True)
    assert not output.exists() or contents(output) == contents(built)
    build("m3el", source, output, progress=False, overwrite=True)
    assert contents(output) == contents(built)


BUILD_TWICE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from m3el_hf.data import rows
from m3el_hf.data.store import build

source, first, second = map(Path, sys.argv[1:])
build("m3el", source, first, progress=False)
made, whole = iter(range(20)), rows.make_row
rows.make_row = lambda *args: whole(*args) if next(made, None) is not None else os.kill(os.getpid(), signal.SIGKILL)
build("m3el", source, second, progress=False)
"""


def test_a_killed_build_leaves_nothing_that_loads(source, built, tmp_path):
    (tmp_path / "second").mkdir()
    paths = [source, tmp_path / "first" / "m3el", tmp_path / "second" / "m3el"]
    process = subprocess.run(
        [sys.executable, "-c", BUILD_TWICE_AND_DIE, *map(str, paths)],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert contents(paths[1]) == contents(built)  # another process, the same bytes
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["m3el.partial"]
    assert_nothing_loads(tmp_path / "second")
    build("m3el", source, paths[2], progress=False)
    assert contents(paths[2]) == contents(built)
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["m3el"]


def test_an_existing_folder_is_not_replaced_unasked(source, built, tmp_path):
    output = tmp_path / "m3el"
    shutil.copytree(built, output)
    with pytest.raises(M3ELError, match=r"exists already: pass --overwrite to replace it, or choose another --output$"):
        build("m3el", source, output, progress=False, seed=1)
    assert contents(output) == contents(built)
    build("m3el", source, output, progress=False, seed=1, overwrite=True)
    assert contents(output) != contents(built)


def test_a_folder_that_was_not_built_is_never_replaced(source, tmp_path):
    (tmp_path / "README.md").write_text("# somebody's own work")
    with pytest.raises(M3ELError, match="is no built dataset and is not replaced"):
        build("m3el", source, tmp_path, progress=False, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_an_unusable_source_leaves_an_existing_folder_alone(built, tmp_path):
    output = tmp_path / "m3el"
    shutil.copytree(built, output)
    with pytest.raises(M3ELError, match="no such folder"):
        build("m3el", tmp_path / "absent", output, progress=False, overwrite=True)
    assert contents(output) == contents(built)
    assert [path.name for path in tmp_path.iterdir()] == ["m3el"]


@pytest.mark.parametrize("output", ["", ".."])
def test_the_source_is_never_overwritten(source, tmp_path, output):
    copy = tmp_path / "inner" / "release"
    shutil.copytree(source, copy)
    with pytest.raises(M3ELError, match="holds the source: choose another --output"):
        build("m3el", copy, copy / output, progress=False, overwrite=True)
    assert contents(copy) == contents(source)


def test_a_generated_store_loads(store):
    data = load_dataset(str(store))
    assert sum(map(len, data.values())) == 150
    assert {row["topic"] for row in load_dataset(str(store), "sports", split="train").select_columns("topic")} == {
        "sports"
    }
