"""Folders that are written whole or not at all, and what a run is continued from."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from m3el_hf.errors import M3ELError, one_line
from m3el_hf.training.arguments import TrainingArguments

STATE = "state.json"
MAY_CHANGE = {
    "output_dir", "resume", "dataloader_num_workers", "save_steps", "save_total_limit", "logging_steps", "report_to",
    "early_stopping_patience", "max_minutes",
}  # fmt: skip
"""Settings that may differ when a run is continued: they change no weight, or are meant to."""


PARTIAL, OLD = ".partial", ".old"
"""What a folder's name ends with while it is written, and while another takes its place."""


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into beside ``folder`` and swaps it in: a kill leaves the old or the new one whole.

    Raises:
        M3ELError: If the disk is full, or cannot be written for another reason; what was there before still is.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    with _explained(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _swap(partial, folder)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Says in one line that a folder could not be written, and makes room again."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(folder.with_name(folder.name + PARTIAL), ignore_errors=True)
        raise M3ELError(
            f"cannot write {folder}: {one_line(error)[:200]}; make room on the disk and continue with --resume: "
            f"{whereabouts(folder.parent)}"
        ) from error


def _swap(partial: Path, folder: Path) -> None:
    """Gives a folder its name once all of it is on the disk, in place of one that has it."""
    for file in partial.rglob("*"):
        _sync(file)
    old = folder.with_name(folder.name + OLD)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(partial, folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def clean(folder: Path) -> None:
    """Removes what a kill left half written in a run's folder, and puts back what it was about to replace."""
    for left in list(folder.iterdir()) if folder.is_dir() else ():
        if not re.fullmatch(rf"(best|last|checkpoint-\d+|log\.jsonl|training\.png)({PARTIAL}|{OLD})", left.name):
            continue
        place = left.with_suffix("")
        if left.suffix == OLD and not place.exists():
            os.rename(left, place)
        elif left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def save_checkpoint(arguments: TrainingArguments, accelerator: Accelerator, state: dict[str, Any]) -> None:
    """Writes ``checkpoint-STEP`` into the run's folder, and then removes all but the newest.

    Args:
        arguments: The run's settings, which say where and how many are kept.
        accelerator: It knows the model, the optimiser and each process's random state.
        state: All else that the run is continued with, as JSON has it; its ``step`` names the checkpoint.

    Raises:
        M3ELError: If it cannot be written; those before are kept.
    """
    folder = Path(arguments.output_dir)
    target = folder / f"checkpoint-{state['step']}"
    partial = target.with_name(target.name + PARTIAL)
    with _explained(target):
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            _swap(partial, target)
    if accelerator.is_main_process:
        for old in _checkpoints(folder)[: -arguments.save_total_limit]:
            gone = old.with_name(old.name + PARTIAL)  # a kill must not leave a half of it under its name
            os.rename(old, gone)
            shutil.rmtree(gone)
    accelerator.wait_for_everyone()


def whereabouts(folder: Path) -> str:
    """Where a run's last good weights lie, in words."""
    saved = newest_checkpoint(folder)
    return f"the last checkpoint is {saved}" if saved else "no checkpoint was written yet"


def check_unused(folder: Path) -> None:
    """Refuses the folder of another run.

    Raises:
        M3ELError: The message says what to do.
    """
    if found := newest_checkpoint(folder):
        raise M3ELError(f"{found} is of an earlier run: continue that with --resume, or choose another --output-dir")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest that was written whole; None if there is none."""
    return max(_checkpoints(folder), key=_step, default=None)


def load_checkpoint(folder: Path, accelerator: Accelerator, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Restores the newest checkpoint and returns its state; None if there is none.

    Args:
        folder: The run's.
        accelerator: It knows the model and the optimiser.
        settings: The run's, which must be those that the checkpoint was made with, but for `MAY_CHANGE`.

    Raises:
        M3ELError: If they are not, or the weights are another model's.
    """
    found = newest_checkpoint(folder)
    if found is None:
        return None
    state = json.loads((found / STATE).read_text(encoding="utf-8"))
    for name, value in settings.items():
        before = state["settings"].get(name)
        if name not in MAY_CHANGE and before != value:
            raise M3ELError(
                f"{found} was made with {name} {before}, and now it is {value}: the run would not be the same; set it "
                "back, or start anew in another output_dir"
            )
    try:
        accelerator.load_state(str(found))
    except (RuntimeError, ValueError, KeyError) as error:
        raise M3ELError(f"{found} holds another model's weights: start anew in another output_dir") from error
    return state


def _checkpoints(folder: Path) -> list[Path]:
    """Those that were written whole, the oldest first."""
    found = (path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _sync(path: Path) -> None:
    """Puts it onto the disk, so that a power cut after the renaming leaves no empty file."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
