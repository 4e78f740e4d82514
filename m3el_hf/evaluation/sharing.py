"""How processes that measure together divide the work, so that any number of them finds the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

Item = TypeVar("Item")


class Share:
    """One process's share.

    Args:
        accelerator: Of several processes; None for a process by itself.
    """

    def __init__(self, accelerator: Accelerator | None) -> None:
        self._is_alone = accelerator is None or accelerator.num_processes == 1
        self._accelerator = accelerator

    @property
    def is_main(self) -> bool:
        """Whether this is the process that speaks."""
        return self._accelerator is None or self._accelerator.is_main_process

    def mine(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every n-th item of n processes. Items are never cut: what is computed together decides the last digits."""
        if self._is_alone or self._accelerator is None:
            return items
        return items[self._accelerator.process_index :: self._accelerator.num_processes]

    def gathered(self, items: list[Item]) -> list[Item]:
        """All processes' items, in every process."""
        return items if self._is_alone else gather_object(items)

    def wait(self) -> None:
        """Returns once all processes are here."""
        if not self._is_alone and self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    @contextmanager
    def folder(self, given: Path | None) -> Iterator[Path]:
        """A folder that all processes see: the one that is given, or one that is gone afterwards."""
        if given is not None:
            yield given
            return
        with TemporaryDirectory(prefix="m3el-hf-") as own:
            [path] = [own] if self._is_alone else broadcast_object_list([own])
            yield Path(path)
            self.wait()  # before the folder that others still read is gone
