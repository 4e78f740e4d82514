from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from PIL import Image

import m3el_hf
from m3el_hf.data import builder as builder_module
from m3el_hf.data.builder import M3EL, load_m3el
from m3el_hf.data.configs import select
from m3el_hf.data.store import build
from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TASKS
from tests.conftest import instance, write_release


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "release"
    write_release(folder, [instance(number) for number in range(20)])
    for number, split in enumerate(("train", "test")):
        rows = [instance(100 * number + 100 + row, topic="books", images=False) for row in range(3)]
        write_release(folder, rows, f"books_{split}.json")
    return folder


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("built") / "m3el"
    build("m3el", source, output, progress=False)
    return output


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A release to change."""
    return write_release(tmp_path / "release", [instance(number) for number in range(12)])


def undecoded(rows: Dataset) -> list[dict[str, Any]]:
    return rows.with_format("arrow")[:].to_pylist()


def rows_of(release: Path, cache: Path, config: str = "all", **options: Any) -> dict[str, list[dict[str, Any]]]:
    data = load_m3el(config, data_dir=release, cache_dir=cache, **options)
    return {split: sorted(undecoded(rows), key=lambda row: row["id"]) for split, rows in data.items()}


@pytest.mark.parametrize("config", ["all", "person", "books", "i2t", "t2t", "it2it", "entities"])
def test_rows_are_those_of_the_published_folder(source, built, tmp_path, config):
    raw = load_m3el(config, data_dir=source, cache_dir=tmp_path)
    published = load_dataset(str(built), config)
    assert isinstance(raw, DatasetDict)
    assert raw.keys() == published.keys()
    key = "qid" if config == "entities" else "id"
    for split, rows in raw.items():
        assert rows.features == published[split].features == select(config).features
        found, expected = ({row[key]: row for row in undecoded(one)} for one in (rows, published[split]))
        assert found == expected
        assert len(found) == len(rows) == len(published[split])


def test_everything_is_the_default_and_the_package_offers_it(release, tmp_path):
    assert m3el_hf.load_m3el is load_m3el
    data = load_m3el(data_dir=str(release), cache_dir=str(tmp_path / "cache"))
    assert sum(map(len, data.values())) == 12
    assert isinstance(data["train"][0]["mention_image"], Image.Image)


def test_one_split_is_one_dataset(source, tmp_path):
    rows = load_m3el("books", data_dir=source, split="test", cache_dir=tmp_path)
    assert isinstance(rows, Dataset)
    assert rows["id"][:] == ["books_test-0", "books_test-1", "books_test-2"]


def test_a_second_call_reads_nothing(release, tmp_path, monkeypatch):
    first = rows_of(release, tmp_path)
    monkeypatch.setattr(builder_module, "collect", lambda *args, **kwargs: pytest.fail("read again"))
    assert rows_of(release, tmp_path) == first


def test_the_seed_counts(release, tmp_path):
    assert rows_of(release, tmp_path, seed=0) != rows_of(release, tmp_path, seed=1)
    assert rows_of(release, tmp_path, seed=0) == rows_of(release, tmp_path / "other", seed=0)


def test_a_changed_text_changes_the_rows(release, tmp_path):
    before = rows_of(release, tmp_path)
    path = release / "person.json"
    state = path.stat()
    path.write_text(path.read_text().replace("Name 3 went home", "Name 3 went away"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # as an unpacked archive has it
    assert path.stat().st_size == state.st_size
    contexts = [
        {row["context"] for rows in one.values() for row in rows} for one in (before, rows_of(release, tmp_path))
    ]
    assert contexts[1] - contexts[0] == {"Name 3 went away."}
    assert contexts[0] - contexts[1] == {"Name 3 went home."}


def test_a_changed_picture_changes_the_rows(release, tmp_path):
    before = rows_of(release, tmp_path)
    path = release / "person_candidates_images" / "Name 3-Q30" / "mention3.png"
    Image.new("RGB", (40, 30), (1, 2, 3)).save(path)
    after = rows_of(release, tmp_path)
    changed = [
        new["id"]
        for split in before
        for old, new in zip(before[split], after[split], strict=True)
        if old["mention_image"] != new["mention_image"]
    ]
    assert changed == ["person-3"]


def test_an_added_picture_and_an_added_file_change_the_rows(release, tmp_path):
    path = release / "person_candidates_images" / "Name 3-Q30" / "mention3.png"
    data = path.read_bytes()
    path.unlink()
    missing = rows_of(release, tmp_path, "i2t")
    path.write_bytes(data)
    found = rows_of(release, tmp_path, "i2t")
    assert [sum(row["mention_image"] is None for rows in one.values() for row in rows) for one in (missing, found)] == [
        1,
        0,
    ]
    write_release(release, [instance(50, topic="books")], "books_test.json")
    assert sum(map(len, rows_of(release, tmp_path, "i2t").values())) == 13


def mistake(**arguments: Any) -> str:
    with pytest.raises(M3ELError) as caught:
        load_m3el(**arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_an_unknown_config_is_a_mistake(release, tmp_path):
    message = mistake(config="music", data_dir=release, cache_dir=tmp_path)
    assert message.startswith("unknown config 'music': choose one of all, movies")
    for reader in ("m3el", "wikidiverse-candidates"):
        assert "'a/b'" in mistake(config="a/b", data_dir=release, reader=reader, cache_dir=tmp_path)


@pytest.fixture
def passages(tmp_path: Path) -> Path:
    """A release of WikiDiverse with candidates, in two topics that M³EL has not."""
    folder = tmp_path / "wikidiverse"
    folder.mkdir()
    wiki = "https://en.wikipedia.org/wiki/"
    for split in ("train", "test"):
        rows = [
            [
                f"{split} {k}",
                "",
                "Lions",
                "Org",
                "",
                "",
                f"{wiki}Lions_{k}",
                [f"{wiki}Lions_{k}", f"{wiki}Lion"],
                topic,
                0,
                5,
            ]
            for topic in ("Politics", "Crime")
            for k in range(3)
        ]
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("task", [None, "t2t"])
def test_the_topics_of_another_source_are_read_raw(passages, tmp_path, task):
    build("wikidiverse-candidates", passages, tmp_path / "built", progress=False)
    raw, built = (
        load_m3el("politics", task=task, data_dir=folder, reader="wikidiverse-candidates", cache_dir=tmp_path / "cache")
        for folder in (passages, tmp_path / "built")
    )
    assert {split: rows["topic"][:] for split, rows in raw.items()} == {
        "train": ["politics"] * 3,
        "test": ["politics"] * 3,
    }
    assert rows_by_split(raw) == rows_by_split(built)


def test_a_topic_that_another_source_has_not_is_a_mistake_that_names_the_present(passages, tmp_path):
    message = mistake(config="Politics", data_dir=passages, reader="wikidiverse-candidates", cache_dir=tmp_path)
    assert message == f"{passages} has no Politics rows: it has crime, politics"


def test_a_mistaken_topic_of_m3el_is_told_before_anything_is_read(release, tmp_path, monkeypatch):
    monkeypatch.setattr(builder_module, "collect", lambda *args, **kwargs: pytest.fail("read"))
    monkeypatch.setattr(builder_module, "fingerprint", lambda folder: pytest.fail("looked through"))
    message = mistake(config="persn", data_dir=release, cache_dir=tmp_path)
    assert message.startswith("unknown config 'persn': choose one of all, movies, common, person, books, sports, t2t")


def test_a_missing_folder_is_a_mistake(tmp_path):
    message = mistake(config="person", data_dir=tmp_path / "absent", cache_dir=tmp_path)
    assert message.startswith(f"no such folder: {tmp_path / 'absent'}; pass a folder")


def test_a_folder_without_topics_is_a_mistake(tmp_path):
    (tmp_path / "music.json").write_text("[]")
    assert "holds no M3EL file" in mistake(data_dir=tmp_path, cache_dir=tmp_path / "cache")


def test_an_absent_topic_is_a_mistake_that_names_the_present(release, tmp_path):
    message = mistake(config="sports", data_dir=release, cache_dir=tmp_path)
    assert message == f"{release} has no sports rows: it has person"


@pytest.mark.parametrize("split", ["validation", "dev"])
def test_an_absent_split_is_a_mistake_that_names_the_present(source, tmp_path, split):
    message = mistake(config="books", data_dir=source, split=split, cache_dir=tmp_path)
    assert message == f"no split {split!r} in {source}: it has train, test"


def test_an_unusable_release_is_a_mistake(tmp_path):
    (tmp_path / "person.json").write_text(json.dumps([instance(0, Qid="")]))
    assert "none of them usable" in mistake(data_dir=tmp_path, cache_dir=tmp_path / "cache")


def test_a_mistake_is_not_remembered(tmp_path):
    (tmp_path / "person.json").write_text("nonsense")
    assert "is neither JSON" in mistake(data_dir=tmp_path, cache_dir=tmp_path / "cache")
    write_release(tmp_path, [instance(0)])
    assert len(load_m3el(data_dir=tmp_path, split="train", cache_dir=tmp_path / "cache")) == 1


def test_the_builder_itself_asks_for_the_folder(tmp_path):
    with pytest.raises(M3ELError, match="data_dir is not set"):
        M3EL(config_name="person", cache_dir=str(tmp_path)).download_and_prepare()


def test_the_builder_streams(release, tmp_path):
    rows = M3EL(config_name="t2t", data_dir=str(release), cache_dir=str(tmp_path)).as_streaming_dataset(split="train")
    assert {row["topic"] for row in rows} == {"person"}


def rows_by_split(data: Any) -> dict[str, list[dict[str, Any]]]:
    """Rows with pictures as bytes, whether they stream or not."""
    return {
        split: list(rows.decode(False) if hasattr(rows, "decode") else undecoded(rows)) for split, rows in data.items()
    }


@pytest.mark.parametrize("task", ["t2t", "i2it"])
def test_a_topic_is_read_as_a_task_sees_it_raw_and_built_streaming_and_not(source, built, tmp_path, task):
    expected = {
        split: [{name: row[name] for name in TASKS[task].columns} for row in rows]
        for split, rows in rows_by_split(load_dataset(str(built), "books")).items()
    }
    assert {split: len(rows) for split, rows in expected.items()} == {"train": 3, "test": 3}
    for folder in (source, built):
        for streaming in (False, True):
            data = load_m3el("books", task=task, data_dir=folder, cache_dir=tmp_path, streaming=streaming)
            assert rows_by_split(data) == expected
    assert isinstance(load_m3el("books", data_dir=built, streaming=True)["train"], IterableDataset)


@pytest.mark.parametrize("view", [{"config": "all"}, {"config": "it2it"}, {"config": "books", "task": "i2t"}])
def test_the_columns_stand_in_one_order_raw_and_built_streaming_and_not(source, built, tmp_path, view):
    expected = list(select(view["config"], view.get("task")).features)
    assert len(expected) > 4
    for folder in (source, built):
        for streaming in (False, True):
            rows = load_m3el(**view, data_dir=folder, split="train", cache_dir=tmp_path, streaming=streaming)
            assert rows.column_names == list(next(iter(rows))) == expected
    if "task" not in view:
        assert load_dataset(str(built), view["config"], split="train").column_names == expected


def test_two_processes_read_the_same_rows(source, tmp_path, monkeypatch):
    monkeypatch.setattr(builder_module, "_PIECE", 4)
    one, two = (rows_of(source, tmp_path / str(number), num_proc=number) for number in (1, 2))
    assert one == two


def test_the_deleaked_protocol_goes_through(release, tmp_path):
    path = release / "person_candidates_images" / "Name 3-Q30"
    (path / "mention3.png").write_bytes((path / "Q30.png").read_bytes())
    for protocol, missing in (("as_released", 0), ("deleaked", 1)):
        rows = rows_of(release, tmp_path, protocol=protocol)
        assert sum(row["mention_image"] is None for one in rows.values() for row in one) == missing


def test_candidates_and_knowledge_bases_have_different_configs(release, tmp_path):
    message = mistake(config="mentions", data_dir=release, cache_dir=tmp_path)
    assert message.startswith("unknown config 'mentions': choose one of all, movies, ")
    message = mistake(config="all", data_dir=release, reader="mimic", cache_dir=tmp_path)
    assert message == "unknown config 'all': choose one of mentions, entities"


def test_a_built_folder_has_its_own_configs(built):
    message = mistake(config="mentions", data_dir=built)
    assert message.startswith("unknown config 'mentions': choose one of all, person, books, t2t")
    assert mistake(config="sports", data_dir=built).startswith(
        "unknown config 'sports': choose one of all, person, books, "
    )


@pytest.mark.parametrize(
    ("name", "built_with", "asked"),
    [("reader", "m3el", "mimic"), ("seed", 0, 5), ("protocol", "as_released", "deleaked")],
)
def test_a_built_folder_has_its_own_settings(built, name, built_with, asked):
    message = mistake(data_dir=built, **{name: asked})
    assert message == (
        f"{built} was built with {name} {built_with}: leave {name} out, or build it again with --{name} {asked}"
    )
    assert len(load_m3el("books", data_dir=built, split="test", **{name: built_with})) == 3


def test_a_seed_of_0_is_asked_for_too(source, tmp_path):
    build("m3el", source, tmp_path / "m3el", seed=5, progress=False)
    assert "was built with seed 5" in mistake(data_dir=tmp_path / "m3el", seed=0)


def test_what_is_not_asked_for_is_the_default(release, tmp_path):
    assert rows_of(release, tmp_path, reader="m3el", seed=0, protocol="as_released") == rows_of(release, tmp_path)


@pytest.mark.parametrize("folder", ["source", "built"])
def test_a_folder_has_no_revisions(folder, request):
    place = request.getfixturevalue(folder)
    message = mistake(data_dir=place, revision="v1.0")
    assert message == f"{place} is a folder, and only a repository on the Hub has revisions: leave 'v1.0' out"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reader": "csv"}, "unknown reader 'csv': choose one of m3el, "),
        ({"protocol": "clean"}, "unknown protocol 'clean': choose one of as_released, deleaked"),
        ({"task": "t2x"}, "unknown task 't2x': choose one of t2t"),
    ],
)
def test_a_mistaken_argument_is_named(release, tmp_path, arguments, message):
    assert mistake(data_dir=release, cache_dir=tmp_path, **arguments).startswith(message)


REGISTERED = """
import json, sys
from datasets import disable_progress_bars, load_dataset
import m3el_hf

disable_progress_bars()
m3el_hf.register_dataset()
release, cache = sys.argv[1:]
rows = load_dataset("m3el", "person", data_dir=release, cache_dir=cache)
stream = load_dataset("m3el", "t2t", data_dir=release, split="train", streaming=True, seed=3)
print(json.dumps([{split: one["id"][:] for split, one in rows.items()}, [row["id"] for row in stream]]))
"""


REGISTERED_WITH_TOPICS = """
import sys
from datasets import disable_progress_bars, load_dataset
import m3el_hf

disable_progress_bars()
m3el_hf.register_dataset()
release, built, cache = sys.argv[1:]
options = dict(data_dir=release, cache_dir=cache, reader="wikidiverse-candidates")
assert load_dataset("m3el", "politics", **options, task="t2t", split="test")["topic"][:] == ["politics"] * 3
assert load_dataset("m3el", **options, split="test").num_rows == 6
for options in ({"name": "politics", "data_dir": release}, {"name": "person", "data_dir": built}):
    try:
        load_dataset("m3el", **options, cache_dir=cache)
    except m3el_hf.M3ELError as error:
        print(error)
"""


def test_a_registered_builder_reads_other_sources_and_refuses_built_folders(passages, built, tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", REGISTERED_WITH_TOPICS, str(passages), str(built), str(tmp_path / "cache")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    unknown, refused = process.stdout.splitlines()
    assert unknown.startswith("unknown config 'politics': choose one of all, movies")
    assert refused == (
        f"{built} is a built dataset, no raw release: load it with m3el_hf.load_m3el('person', data_dir={str(built)!r})"
    )


def test_a_registered_builder_reads_a_raw_release_by_name(release, tmp_path):
    found = []
    for _ in range(2):
        process = subprocess.run(
            [sys.executable, "-c", REGISTERED, str(release), str(tmp_path / "cache")],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stderr
        found.append(json.loads(process.stdout.splitlines()[-1]))
        write_release(
            release, [instance(number) for number in range(13)]
        )  # it is read again, though its name is the same
    for (rows, stream), size in zip(found, (12, 13), strict=True):
        folder = write_release(tmp_path / f"copy{size}", [instance(number) for number in range(size)])
        assert rows == {
            split: one["id"][:] for split, one in load_m3el("person", data_dir=folder, cache_dir=tmp_path).items()
        }
        assert stream == load_m3el("t2t", data_dir=folder, seed=3, split="train", cache_dir=tmp_path)["id"][:]


def test_what_a_raw_release_loses_is_said(tmp_path, caplog):
    rows = [instance(0), instance(1, Qid=""), instance(2)]
    folder = write_release(tmp_path / "raw", rows)
    next(folder.rglob("mention0.png")).write_bytes(b"")
    datasets.utils.logging.enable_propagation()
    load_m3el(data_dir=folder, cache_dir=tmp_path / "cache")
    assert "1 of 3 instances are skipped, such as: person.json row 1: has no gold (field Qid)" in caplog.text
    assert "1 pictures cannot be had and are null, such as: " in caplog.text
    datasets.utils.logging.disable_propagation()


@pytest.mark.parametrize("raw", [True, False])
def test_a_part_of_a_split_is_read_as_datasets_does(source, built, tmp_path, raw):
    options = {"data_dir": source if raw else built, "cache_dir": tmp_path}
    whole = load_m3el(**options)
    part = load_m3el(split="train[:3]+test[1:]", **options)
    assert part["id"] == [*whole["train"]["id"][:3], *whole["test"]["id"][1:]]
    assert "'train[:3]' cannot be streamed" in mistake(split="train[:3]", streaming=True, **options)
    assert "split is ['train']: pass one" in mistake(split=["train"], **options)
