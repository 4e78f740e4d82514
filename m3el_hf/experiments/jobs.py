"""Work that is done once: each piece has a folder, and several processes divide what is left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

DONE = "done.json"

PAUSE = 1.0
"""Seconds between two looks at what other processes are doing."""


@dataclass(frozen=True)
class Job:
    """A piece of work.

    Attributes:
        name: What it is, for people.
        folder: Where its result lies.
        make: Does it, writes into the folder, and returns what `DONE` shall say.
        about: What decides the result, for `DONE`.
        after: The job that must be done before; None for none.
    """

    name: str
    folder: Path
    make: Callable[[], dict[str, Any]]
    about: dict[str, Any]
    after: Job | None = None

    @property
    def is_done(self) -> bool:
        """Whether the result is there."""
        return (self.folder / DONE).is_file()

    def attempt(self) -> bool:
        """Does it unless it is done; False if another process is at it, or it must wait for another job."""
        if self.is_done:
            return True
        if self.after is not None and not self.after.is_done:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        try:
            if not self.is_done:
                self._do()
        finally:
            lock.release()
        return True

    def _do(self) -> None:
        began = time.monotonic()
        result = {"about": self.about, "result": self.make(), "seconds": time.monotonic() - began}
        partial = self.folder / f"{DONE}.partial"
        partial.write_text(json.dumps(result, indent=1, default=str), encoding="utf-8")
        partial.replace(self.folder / DONE)

    def result(self) -> dict[str, Any]:
        """What ``make`` returned when it was done."""
        found: dict[str, Any] = json.loads((self.folder / DONE).read_text(encoding="utf-8"))["result"]
        return found


def do(jobs: Sequence[Job], title: str) -> None:
    """Does all jobs, in their order where nothing speaks against it, and waits for those that other processes do."""
    with tqdm(total=len(jobs), desc=title, unit=" jobs") as bar:
        waiting = list(jobs)
        while waiting:
            left = []
            for job in waiting:
                if not job.is_done:
                    bar.set_postfix_str(job.name)
                if job.attempt():
                    bar.update()
                else:
                    left.append(job)
            if len(left) == len(waiting):
                bar.set_postfix_str(f"another process is at {left[0].name}")
                time.sleep(PAUSE)
            waiting = left
        bar.set_postfix_str("")
