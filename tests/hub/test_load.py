"""Built datasets that the real clients load from the Hub, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3el_hf.data.store import build
from tests.hub_server import HubServer, hub_environment, run_python

SET = "user/m3el"
PRELUDE = """
from datasets import disable_progress_bars
from m3el_hf import M3ELError, load_m3el
from m3el_hf.sources import load_built

disable_progress_bars()

def table(rows):
    return rows.with_format("arrow")[:].to_pylist()

def mistake(**arguments):
    try:
        load_m3el(**arguments)
    except M3ELError as error:
        return str(error)
    raise AssertionError("it was loaded")

"""


def run(code: str, environment: dict[str, str]) -> None:
    run_python(PRELUDE + code, environment)


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two versions of one dataset."""
    folder = tmp_path_factory.mktemp("builds")
    for number, instances in enumerate((40, 60)):
        build("mini", None, folder / str(number), progress=False, instances=instances)
    return [folder / "0", folder / "1"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def publish(hub: HubServer, folder: Path) -> None:
    hub.create(SET, "dataset").commit(files_of(folder))


def downloads(hub: HubServer) -> set[str]:
    """The data files that were fetched."""
    fetched = (request for request in hub.requests if request.startswith("GET ") and request.endswith(".parquet"))
    return {request.split("/", 6)[-1] for request in fetched}


@pytest.mark.parametrize("view", [{}, {"config": "books"}, {"config": "books", "task": "t2t"}])
def test_only_the_files_of_the_split_that_is_asked_for_are_downloaded(hub, builds, tmp_path, view):
    publish(hub, builds[0])
    folder, topic = "text" if "task" in view else "data", view.get("config", "*")
    run(
        f"""
assert mistake(data_dir={SET!r}, split="dev") == "no split 'dev' in {SET}: it has train, validation, test"
""",
        hub_environment(hub.url, tmp_path),
    )
    assert not downloads(hub)
    run(
        f"""
there, here = (load_m3el(data_dir=source, split="test", **{view}) for source in ({SET!r}, {str(builds[0])!r}))
assert table(there) == table(here)
assert there.column_names == here.column_names
""",
        hub_environment(hub.url, tmp_path),
    )
    expected = {path.relative_to(builds[0]).as_posix() for path in builds[0].glob(f"{folder}/{topic}/test-*.parquet")}
    assert downloads(hub) == expected


def test_each_revision_is_loaded_as_it_was_pushed(hub, builds, tmp_path):
    run(
        f"""
from pathlib import Path
from m3el_hf.hub.push import push_folder

builds = {[str(folder) for folder in builds]}
first, second = (
    push_folder(Path(folder), {SET!r}, repo_type="dataset", tag=tag).revision
    for folder, tag in zip(builds, ("v1.0", None))
)
for revision, build in (("v1.0", 0), (None, 1), ("main", 1), (first, 0), (second, 1)):
    expected = load_m3el(data_dir=builds[build])
    found = load_m3el(data_dir={SET!r}, revision=revision)
    assert {{split: table(rows) for split, rows in found.items()}} == {{
        split: table(rows) for split, rows in expected.items()
    }}
    streamed = load_m3el("t2t", data_dir={SET!r}, revision=revision, streaming=True, split="train")
    assert list(streamed) == list(load_m3el("t2t", data_dir=builds[build], split="train"))
    assert streamed.column_names == load_m3el("t2t", data_dir=builds[build], split="train").column_names
assert mistake(data_dir={SET!r}, revision="v2.0") == (
    "{SET} cannot be fetched: the repository has no such revision"
)
assert mistake(data_dir={SET!r}, seed=3) == (
    "{SET} was built with seed 0: leave seed out, or build it again with --seed 3"
)
""",
        hub_environment(hub.url, tmp_path),
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_the_rows_are_of_the_commit_of_the_manifest(hub, builds, tmp_path, monkeypatch, streaming):
    publish(hub, builds[0])
    head = hub.repository(SET, "dataset").resolve("main")
    take_failure = hub.take_failure

    def push_in_between(request: str) -> int | None:
        if "/resolve/" in request and hub.repository(SET, "dataset").resolve("main") is head:
            hub.repository(SET, "dataset").commit(files_of(builds[1]))
        return take_failure(request)

    monkeypatch.setattr(hub, "take_failure", push_in_between)
    run(
        f"""
found = load_m3el("t2t", data_dir={SET!r}, split="train", streaming={streaming})
assert list(found) == list(load_m3el("t2t", data_dir={str(builds[0])!r}, split="train"))
""",
        hub_environment(hub.url, tmp_path),
    )
    assert hub.repository(SET, "dataset").resolve("main") is not head


def test_what_was_loaded_once_is_loaded_offline(hub, builds, tmp_path):
    publish(hub, builds[0])
    environment = hub_environment(hub.url, tmp_path / ".cache")
    loads = f"""
assert load_m3el(data_dir={SET!r}, split="test").num_rows == load_m3el(data_dir={str(builds[0])!r})["test"].num_rows
assert load_built({SET!r}, "entities")["train"].num_rows
"""
    run(loads, environment)
    hub.requests.clear()
    run(
        f"""{loads}
reason = "HF_HUB_OFFLINE is set, and not all of it is in the cache"
assert mistake(data_dir={SET!r}) == "{SET} cannot be fetched: " + reason
assert mistake(data_dir={SET!r}, streaming=True) == "{SET} cannot be loaded: " + reason
""",
        environment | {"HF_HUB_OFFLINE": "1"},
    )
    assert not hub.requests


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, "no such repository on the Hub, or no access to it: check the name, or run `hf auth login`"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, and not all of it is in the cache"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hub cannot be reached, and not all of it is in the cache"),
    ],
)
def test_a_repository_that_cannot_be_had_is_explained(hub, tmp_path, variables, says):
    run(
        f"""
import time
from m3el_hf.sources import load_model
from m3el_hf.training.start import start_model

time.sleep = lambda seconds: None  # the client tries again and again
says = {says!r}
for load, problem in (
    (lambda: load_m3el(data_dir="user/none"), "cannot be fetched"),
    (lambda: load_built("user/none"), "cannot be fetched"),
    (lambda: load_model("user/none"), "cannot be loaded as a model"),
    (lambda: start_model("user/none", "clip", None), None),
):
    try:
        load()
    except M3ELError as error:
        wanted = f"user/none {{problem}}: {{says}}" if problem else f"cannot start from user/none: {{says}}"
        assert str(error) == wanted, error
    else:
        raise AssertionError("it was loaded")
""",
        hub_environment(hub.url, tmp_path) | variables,
    )


def test_a_repository_that_was_not_built_is_explained(hub, builds, tmp_path):
    hub.create(SET, "dataset").commit({"data/person/train-0.parquet": b"", "README.md": b"# Another"})
    run(
        f"""
says = "{SET} is no dataset that m3el-hf data build wrote: it has no manifest.json"
assert mistake(data_dir={SET!r}) == says
try:
    load_built({SET!r})
except M3ELError as error:
    assert str(error) == says
else:
    raise AssertionError("it was loaded")
""",
        hub_environment(hub.url, tmp_path),
    )


def test_a_version_on_the_hub_gives_its_splits_and_only_text_is_fetched(hub, builds, tmp_path):
    publish(hub, builds[0])
    run(
        f"""
from pathlib import Path
from m3el_hf.data.store import build

manifest = build("mini", None, Path({str(tmp_path / "new")!r}), previous={SET!r}, progress=False, instances=60, seed=3)
assert (manifest.previous["name"], manifest.previous["rows"]) == ({SET!r}, 40), manifest.previous
splits = [
    {{row["mention"] + row["context"]: split for split, rows in load_m3el(data_dir=one).items() for row in rows}}
    for one in ({str(builds[0])!r}, {str(tmp_path / "new")!r})
]
assert splits[0].items() <= splits[1].items()
""",
        hub_environment(hub.url, tmp_path),
    )
    assert {name.split("/")[0] for name in downloads(hub)} == {"text"}
