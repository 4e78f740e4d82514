from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, load_dataset
from PIL import Image

from m3el_hf.data import shards as shards_module
from m3el_hf.data.builder import load_m3el
from m3el_hf.data.collection import collect
from m3el_hf.data.configs import select
from m3el_hf.data.manifest import Manifest, read_unusable_images
from m3el_hf.data.readers import READERS
from m3el_hf.data.rows import REMOVED, SAME_FILE
from m3el_hf.data.schema import ENTITY_FEATURES, ROW_FEATURES, SPLITS, Reader
from m3el_hf.data.store import build
from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TASKS
from tests.conftest import entities_of, instance, rows_of, write_release
from tests.data.conftest import FILES, contents

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


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split, straight from the reader; files are read in the order of their names."""
    collection = collect("m3el", source)
    return {
        split: [row for topic in sorted(collection.topics) for row in rows_of(collection, split, topic)]
        for split in SPLITS
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
    assert all(one["features"] == described(select(task).features) for one in found.values())


@pytest.mark.parametrize("task", TASKS)
def test_no_task_shows_a_qid(elsewhere, expected, task):
    """Not in an id, a path or any other text: ``answer`` alone, which is the label, tells the gold."""
    for split, rows in expected.items():
        shown = elsewhere[task]["splits"][split]["rows"]
        for row, one in zip(rows, shown, strict=True):
            assert row["id"] == one["id"]
            assert not any(qid in json.dumps(one) for qid in row["candidate_qids"])


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
    expected = plain(entities_of(collect("m3el", source)))
    assert sorted(found["train"]["rows"], key=lambda row: row["qid"]) == sorted(expected, key=lambda row: row["qid"])
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


def test_a_folder_that_was_built_again_is_read_again(tmp_path):
    """`datasets` knows a local folder by its name and its card alone."""
    for number in range(2):
        folder = write_release(tmp_path / str(number), [instance(number, images=False)])
        build("m3el", folder, tmp_path / "m3el", progress=False, overwrite=True)
        for rows in (load_dataset(str(tmp_path / "m3el")), load_m3el(task="t2t", data_dir=tmp_path / "m3el")):
            assert rows["train"][0]["mention"] == f"Name {number}"


def test_another_seed_gives_other_bytes(built, source, tmp_path):
    build("m3el", source, tmp_path / "other", progress=False, seed=1)
    assert contents(tmp_path / "other") != contents(built)


def test_what_the_shards_count_is_added_up(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "ROWS_PER_SHARD", 3)
    rows = [instance(number) for number in range(10)]
    for row in rows[:7]:
        row["image"] = row["candidates"][0]["image"]  # the gold's own file
    folder = write_release(tmp_path / "release", rows)
    manifest = build("m3el", folder, tmp_path / "m3el", progress=False, protocol="deleaked")
    assert manifest.counts[SAME_FILE] == 7
    assert manifest.counts[REMOVED] == 7
    assert f"({7} rows;" in (tmp_path / "m3el" / "README.md").read_text(encoding="utf-8")


def test_shards_join_to_the_same_rows(built, source, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "ROWS_PER_SHARD", 7)
    monkeypatch.setattr(shards_module, "ROWS_PER_GROUP", 3)
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
    manifest = build("m3el", broken, tmp_path / "m3el", progress=False)
    assert manifest == Manifest.load(tmp_path / "m3el")
    assert manifest.unusable_image_count == 1
    assert read_unusable_images(tmp_path / "m3el") == {str(picture.relative_to(broken)): "is empty (0 bytes)"}
    rows = load_dataset(str(tmp_path / "m3el"), "books", split="train")
    assert sum(image is None for row in rows for image in row["candidate_images"]) == 1


def test_no_process_is_no_way_to_build(source, tmp_path):
    with pytest.raises(M3ELError, match="^0 processes cannot build anything"):
        build("m3el", source, tmp_path / "m3el", progress=False, num_proc=0)


def test_a_lost_row_is_noticed(source, tmp_path, monkeypatch):
    whole = READERS["m3el"].records

    def lossy(folder: Path | None, report: Any) -> Iterator[Any]:
        records = whole(folder, report)
        next(records)  # read, neither passed on nor reported
        yield from records

    monkeypatch.setitem(READERS, "m3el", Reader("lossy", lossy))
    with pytest.raises(RuntimeError, match="33 instances read, but 32 written and 0 skipped"):
        build("m3el", source, tmp_path / "m3el", progress=False)


def test_a_picture_in_many_rows_is_stored_once(tmp_path):
    """Rows of a group stand together, and a row group's dictionary holds each picture once."""
    rows = [instance(0) | {"sentence": f"Sentence {number}."} for number in range(90)]
    write_release(tmp_path / "release", rows[:1])
    noise = Image.frombytes("RGB", (96, 96), random.Random(0).randbytes(96 * 96 * 3))
    for path in (tmp_path / "release").rglob("*.png"):
        noise.rotate(len(path.name)).save(path)
    (tmp_path / "release" / "person.json").write_text(json.dumps(rows))
    build("m3el", tmp_path / "release", tmp_path / "m3el", progress=False)
    stored = sum(path.stat().st_size for path in (tmp_path / "m3el" / "data").rglob("*.parquet"))
    unique = sum(path.stat().st_size for path in (tmp_path / "release").rglob("*.png"))
    assert stored < 1.3 * unique + 20_000  # 90 rows of four pictures would be 90 times as much


def test_row_groups_are_bounded_by_their_pictures(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "BYTES_PER_GROUP", 600)
    build("m3el", source, tmp_path / "m3el", progress=False)
    for path in (tmp_path / "m3el" / "data" / "person").glob("*.parquet"):
        metadata = pq.read_metadata(path)
        sizes = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
        assert max(sizes) <= 3


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
    with pytest.raises(M3ELError, match="is no built dataset and is never replaced"):
        build("m3el", source, tmp_path, progress=False, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_an_empty_folder_is_filled(source, built, tmp_path):
    build("m3el", source, tmp_path, progress=False)
    assert contents(tmp_path) == contents(built)


def test_what_lies_in_the_source_is_not_written(source):
    with pytest.raises(M3ELError, match="lies in the source, which is only read: choose another --output"):
        build("m3el", source, source / "m3el", progress=False)


def test_a_source_that_cannot_be_read_is_not_the_outputs_fault(source, tmp_path, monkeypatch):
    def refuse(folder: Path, report: Any) -> Iterator[Any]:
        raise PermissionError(13, "Permission denied", str(folder / "person.json"))
        yield

    monkeypatch.setitem(READERS, "m3el", replace(READERS["m3el"], records=refuse))
    with pytest.raises(M3ELError, match="person.json cannot be read .Permission denied.: fix that"):
        build("m3el", source, tmp_path / "m3el", progress=False)


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


def test_pictures_stand_in_the_files_as_they_are(source, built):
    """So the Hub finds those that it has already, whatever stands around them."""
    data = b"".join(path.read_bytes() for path in (built / "data").rglob("*.parquet"))
    pictures = {path.read_bytes() for path in source.rglob("*.png")}
    assert len(pictures) > 20
    assert all(picture in data for picture in pictures)


def test_most_of_a_changed_file_is_what_it_was(tmp_path):
    """Pages of long texts end where the texts say so, not after so many bytes: else all that follow would differ."""
    draw = random.Random(0)
    rows = [instance(number, images=False, sentence=draw.randbytes(10_000).hex()) for number in range(90)]
    files = []
    for version in range(2):
        rows[3]["sentence"] += "one more word" * 99 * version
        folder = write_release(tmp_path / str(version), rows, "person_train.json")
        build("m3el", folder, tmp_path / f"built{version}", progress=False)
        (file,) = (tmp_path / f"built{version}" / "text").rglob("*.parquet")
        files.append(file.read_bytes())
    old, new = files
    known = {old[start : start + 32] for start in range(len(old))}
    pieces = [new[start : start + 32] for start in range(0, len(new), 32)]
    assert sum(piece in known for piece in pieces) > 0.3 * len(pieces)


def test_a_built_folder_is_no_source(built, tmp_path):
    with pytest.raises(M3ELError, match="is a built dataset: pass the folder of the raw release"):
        build("m3el", built, tmp_path / "m3el", progress=False)


def test_a_name_that_load_dataset_takes_for_a_pattern_is_refused(source, tmp_path):
    with pytest.raises(M3ELError, match="which load_dataset takes for a pattern"):
        build("m3el", source, tmp_path / "m3el[1]", progress=False)
