from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from m3el_hf.experiments import jobs
from m3el_hf.experiments.jobs import Job, do


def job(folder: Path, done: list[str], after: Job | None = None) -> Job:
    def make() -> dict[str, Any]:
        done.append(folder.name)
        return {"made": folder.name}

    return Job(folder.name, folder, make, {"of": "a test"}, after)


def test_what_is_done_is_not_done_again(tmp_path):
    done: list[str] = []
    for _ in range(2):
        do([job(tmp_path / "a", done), job(tmp_path / "b", done)], "test")
    assert done == ["a", "b"]
    assert job(tmp_path / "a", done).result() == {"made": "a"}


def test_a_job_waits_for_the_one_that_it_needs(tmp_path):
    done: list[str] = []
    first = job(tmp_path / "first", done)
    do([job(tmp_path / "second", done, first), first], "test")
    assert done == ["first", "second"]


def test_what_broke_off_is_done_again(tmp_path):
    tries: list[int] = []

    def make() -> dict[str, Any]:
        tries.append(1)
        if len(tries) == 1:
            raise KeyboardInterrupt
        return {}

    one = Job("one", tmp_path / "one", make, {})
    with pytest.raises(KeyboardInterrupt):
        do([one], "test")
    assert not one.is_done
    do([one], "test")
    assert one.is_done and len(tries) == 2


def _hold(path: str, holding: Any, release: Any) -> None:
    with FileLock(path):
        holding.set()
        release.wait(20)


def test_what_another_process_is_at_is_left_to_it(tmp_path, monkeypatch):
    """Another process holds the first job; this one does the second meanwhile, and the first once it is free."""
    done: list[str] = []
    first, second = job(tmp_path / "first", done), job(tmp_path / "second", done)
    first.folder.mkdir()
    context = multiprocessing.get_context("spawn")
    holding, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(first.folder / ".lock"), holding, release))
    other.start()
    assert holding.wait(20)
    assert not first.attempt()
    monkeypatch.setattr(jobs, "PAUSE", 0.01)
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: release.set())  # all that is left is held: let go of it
    do([first, second], "test")
    other.join(20)
    assert done == ["second", "first"]
