from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, load_dataset
from filelock import FileLock
from PIL import Image

from m3el_hf.data import shards as shards_module
from m3el_hf.data import store as store_module
from m3el_hf.data.builder import load_m3el
from m3el_hf.data.collection import Piece, collect
from m3el_hf.data.configs import select
from m3el_hf.data.manifest import Manifest
from m3el_hf.data.readers import READERS
from m3el_hf.data.rows import REMOVED, SAME_FILE, RowMaker
from m3el_hf.data.schema import ENTITY_FEATURES, ROW_FEATURES, SPLITS, Reader
from m3el_hf.data.store import build
from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TASKS
from tests.conftest import entities_of, instance, rows_of, write_release

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
    assert all(one["features"] == described(select(task).features) for one in found.values())


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
    assert manifest.unusable_images == {str(picture.relative_to(broken)): "is empty (0 bytes)"}
    rows = load_dataset(str(tmp_path / "m3el"), "books", split="train")
    assert sum(image is None for row in rows for image in row["candidate_images"]) == 1


def interrupt_row(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Interrupts while the row of this number is made."""

    def install(monkeypatch: pytest.MonkeyPatch) -> None:
        made = iter(range(number))
        whole = RowMaker.rows

        def rows(self: RowMaker, piece: Piece) -> Iterator[dict[str, Any]]:
            for row in whole(self, piece):
                if next(made, None) is None:
                    raise KeyboardInterrupt
                yield row

        monkeypatch.setattr(RowMaker, "rows", rows)

    return install


def interrupt_entities(monkeypatch: pytest.MonkeyPatch) -> None:
    def described(self: RowMaker, piece: Piece) -> Iterator[list[dict[str, Any]]]:
        yield [{"qid": "Q1", "name": "one", "description": None, "image": None}]
        raise KeyboardInterrupt

    monkeypatch.setattr(RowMaker, "described", described)


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


def test_what_was_there_comes_back_if_it_was_moved_away_only(source, built, tmp_path, monkeypatch):
    output = tmp_path / "m3el"
    shutil.copytree(built, output)
    with monkeypatch.context() as patch:
        interrupt("rename", os, after=1)(patch)
        with pytest.raises(KeyboardInterrupt):
            build("m3el", source, output, progress=False, seed=1, overwrite=True)
    assert not output.exists()
    with pytest.raises(M3ELError, match="no such folder"):
        build("m3el", tmp_path / "mistyped", output, progress=False)
    assert contents(output) == contents(built)


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
from m3el_hf.data import rows, shards, store

source, first, second = map(Path, sys.argv[1:])
store.build("m3el", source, first, progress=False)
made, whole = iter(range(20)), rows.RowMaker._linking_row
rows.RowMaker._linking_row = lambda *args: (
    whole(*args) if next(made, None) is not None else os.kill(os.getpid(), signal.SIGKILL)
)
shards.ROWS_PER_SHARD = 5
store.build("m3el", source, second, progress=False)
"""


def test_a_killed_build_goes_on_where_it_was(source, built, tmp_path, monkeypatch):
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
    done = {path.stem for path in (tmp_path / "second" / "m3el.partial" / ".reports").iterdir()}
    assert done
    written = watch_shards(monkeypatch)
    monkeypatch.setattr(shards_module, "ROWS_PER_SHARD", 5)
    build("m3el", source, paths[2], progress=False)
    assert written
    assert done.isdisjoint(written)
    build("m3el", source, tmp_path / "whole", progress=False)
    assert contents(paths[2]) == contents(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["m3el"]


KILLED_WITH_PROCESSES = """
import os, signal, sys, time
from multiprocessing import active_children
from pathlib import Path
from threading import Thread
from m3el_hf.data import store

def kill():
    while not any(Path(sys.argv[2] + ".partial", ".reports").glob("*")):
        time.sleep(0.01)
    print(*(child.pid for child in active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    Thread(target=kill, daemon=True).start()
    store.build("m3el", Path(sys.argv[1]), Path(sys.argv[2]), progress=False, num_proc=2)
    time.sleep(60)
"""


def test_a_killed_build_leaves_no_process_behind(source, built, tmp_path):
    script, output = tmp_path / "script.py", tmp_path / "m3el"
    script.write_text(KILLED_WITH_PROCESSES)
    process = subprocess.run(
        [sys.executable, str(script), str(source), str(output)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert process.returncode == -signal.SIGKILL
    workers = [Path("/proc", pid) for pid in process.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(worker.exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(worker.exists() for worker in workers)
    build("m3el", source, output, progress=False, num_proc=2, overwrite=True)
    assert contents(output) == contents(built)


def watch_shards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are written from now on."""
    written: list[str] = []
    whole = shards_module.Writer.write

    def write(self: Any, shard: Any, advance: Any) -> None:
        written.append(shard.name)
        whole(self, shard, advance)

    monkeypatch.setattr(shards_module.Writer, "write", write)
    return written


@pytest.mark.parametrize("change", ["source", "seed", "short side", "previous"])
def test_what_was_finished_of_other_input_is_done_again(source, tmp_path, monkeypatch, change):
    release = tmp_path / "release"
    shutil.copytree(source, release)
    options: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        interrupt("render_dataset_card")(patch)
        with pytest.raises(KeyboardInterrupt):
            build("m3el", release, tmp_path / "m3el", progress=False)
    if change == "previous":
        build("m3el", release, tmp_path / "old", progress=False, seed=9)
        options = {"previous": tmp_path / "old"}
    elif change == "source":
        path = release / "person.json"
        path.write_text(path.read_text().replace("Name 3 went home", "Name 3 went away"))
    else:
        options = {"seed": 1} if change == "seed" else {"short_side": 16}
    build("m3el", release, tmp_path / "m3el", progress=False, **options)
    build("m3el", release, tmp_path / "fresh", progress=False, **options)
    assert contents(tmp_path / "m3el") == contents(tmp_path / "fresh")


def test_two_processes_write_the_same_bytes(source, tmp_path, monkeypatch):
    built = [tmp_path / "one", tmp_path / "two"]
    for number, output in enumerate(built, 1):
        build("m3el", source, output, progress=False, num_proc=number)
    assert contents(built[0]) == contents(built[1])


def test_no_process_is_no_way_to_build(source, tmp_path):
    with pytest.raises(M3ELError, match="^0 processes cannot build anything"):
        build("m3el", source, tmp_path / "m3el", progress=False, num_proc=0)


def test_a_second_build_into_the_same_folder_waits_for_nobody(source, tmp_path):
    (tmp_path / "m3el.partial").mkdir()
    with (
        FileLock(tmp_path / "m3el.partial" / ".lock"),
        pytest.raises(M3ELError, match="another build is writing .*m3el.partial: wait for it"),
    ):
        build("m3el", source, tmp_path / "m3el", progress=False)


BUILD_ON_A_FULL_DISK = """
import os, resource, sys
from multiprocessing import active_children
from pathlib import Path
from m3el_hf.data import store
from m3el_hf.errors import M3ELError

def fill():  # no file grows beyond this
    for pid in (os.getpid(), *(child.pid for child in active_children())):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (24_000, 24_000))

def write(*args, whole=store.Workers.write):
    fill()
    whole(*args)

if __name__ == "__main__":
    output, moment, processes = sys.argv[1:]
    store.Workers.write = write
    if moment == "reading":
        fill()
    try:
        store.build("mini", None, Path(output), progress=False, instances=90, num_proc=int(processes))
    except M3ELError as error:
        print(error)
"""


@pytest.mark.parametrize(("moment", "processes"), [("reading", 1), ("writing", 1), ("writing", 2)])
def test_a_full_disk_is_told_and_nothing_finished_is_lost(tmp_path, moment, processes):
    output, script = tmp_path / "m3el", tmp_path / "script.py"
    script.write_text(BUILD_ON_A_FULL_DISK)
    process = subprocess.run(
        [sys.executable, str(script), str(output), moment, str(processes)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.stdout == (
        f"{output}.partial cannot be written (File too large): "
        "mend that and run the same command again, what is finished is kept\n"
    ), process.stderr
    assert not output.exists()
    build("mini", None, output, progress=False, instances=90)
    assert sum(map(len, load_dataset(str(output)).values())) == 90


BUILD_AS_NOBODY = """
import os, sys
from pathlib import Path
from m3el_hf.cli import main
from m3el_hf.data import store

os.seteuid(65534)  # root may write anywhere
sys.exit(main(["data", "build", "--reader", "mini", "--output", sys.argv[1]]))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can run a build as somebody else")
def test_a_folder_without_write_permission_is_told(tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        process = subprocess.run(
            [sys.executable, "-c", BUILD_AS_NOBODY, f"{folder}/m3el"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert os.listdir(folder) == []
    assert process.returncode == 2
    assert process.stderr == (
        f"m3el-hf: {folder}/m3el.partial cannot be written (Permission denied): "
        "mend that and run the same command again, what is finished is kept\n"
    )


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


def test_the_rows_of_an_earlier_version_keep_their_splits(tmp_path):
    """Splits change with the seed, but not those of a previous version's rows; topics, order and number may change."""
    rows = [instance(number, images=False) for number in range(60)]
    write_release(tmp_path / "old", rows[:40])
    write_release(tmp_path / "new", rows[::-1])
    old = build("m3el", tmp_path / "old", tmp_path / "v1", progress=False)
    build("m3el", tmp_path / "new", tmp_path / "v2", progress=False, seed=5, previous=tmp_path / "v1")
    splits = [
        {row["answer_qid"]: split for split, one in load_dataset(str(tmp_path / name)).items() for row in one}
        for name in ("v1", "v2")
    ]
    assert len(splits[0]) == old.total == 40
    assert len(splits[1]) == 60
    assert splits[0].items() <= splits[1].items()
    assert {split for qid, split in splits[1].items() if qid not in splits[0]} == set(SPLITS)


def test_splits_of_an_earlier_version_are_not_the_sources_own(tmp_path):
    folder = write_release(tmp_path / "release", [instance(number, images=False) for number in range(20)])
    build("m3el", folder, tmp_path / "v1", progress=False)
    manifest = build("m3el", folder, tmp_path / "v2", progress=False, previous=tmp_path / "v1")
    assert not manifest.released_splits


def test_a_previous_version_must_be_a_built_one(source, tmp_path):
    with pytest.raises(M3ELError, match="is no built dataset: build it first"):
        build("m3el", source, tmp_path / "m3el", progress=False, previous=source)


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
