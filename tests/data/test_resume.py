"""Killed, interrupted, out of space: a build that is started again ends with the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from filelock import FileLock

from m3el_hf.data import shards as shards_module
from m3el_hf.data import store as store_module
from m3el_hf.data.collection import Piece
from m3el_hf.data.rows import RowMaker
from m3el_hf.data.store import build
from m3el_hf.errors import M3ELError
from tests.data.conftest import FILES, contents

ROOT = Path(__file__).parents[2]


def assert_nothing_loads(folder: Path) -> None:
    """Neither the folder nor what stands in it is taken for a dataset."""
    for one in (folder, *folder.iterdir()):
        with pytest.raises((FileNotFoundError, ValueError)):
            load_dataset(str(one))


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


@pytest.mark.parametrize("change", ["source", "seed", "short side", "previous", "software"])
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
    elif change == "software":
        monkeypatch.setattr(store_module, "version", lambda package: "another")
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
        "fix that and run the same command again, what is finished is kept\n"
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
        "fix that and run the same command again, what is finished is kept\n"
    )
