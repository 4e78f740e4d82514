"""Runs jobs and kills the process when a function is called for the n-th time."""

from __future__ import annotations

import os
import pkgutil
import signal
import sys

from tests.training.jobs import main


def kill_at(name: str, number: int) -> None:
    place, _, attribute = name.rpartition(".")
    owner, calls = pkgutil.resolve_name(place), 0
    wrapped = getattr(owner, attribute)

    def counted(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return wrapped(*arguments, **options)

    setattr(owner, attribute, counted)


if __name__ == "__main__":
    kill_at(sys.argv[2], int(sys.argv[3]))
    main(sys.argv[1])
