"""What a run writes down: losses, rates and memory by step, as lines and as a plot."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.gathering import total
from m3el_hf.training.objective import TrainingBatch

LINES, PLOT = "log.jsonl", "training.png"


class TrainingLog:
    """Collects figures and writes them into ``output_dir``, and to a tracker if one is asked for.

    Args:
        arguments: The run's settings.
        accelerator: It knows the trackers.
    """

    def __init__(self, arguments: TrainingArguments, accelerator: Accelerator) -> None:
        self._folder, self._accelerator = Path(arguments.output_dir), accelerator
        self._clear()
        if arguments.report_to != "none":
            accelerator.init_trackers("m3el_hf", config=arguments.to_dict())

    def _clear(self) -> None:
        self._terms: dict[str, list[Tensor]] = {}
        self._counts = dict.fromkeys(("mentions", "candidates", "entities", "seconds", "waited"), 0.0)

    def start(self, step: int) -> None:
        """Begins at a step: what an earlier run logged after it is left out."""
        if self._accelerator.is_main_process:
            kept = [entry for entry in read_log(self._folder) if entry["step"] <= step]
            self._folder.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(entry) + "\n" for entry in kept)
            (self._folder / LINES).write_text(text, encoding="utf-8")

    def count(self, batch: TrainingBatch, terms: dict[str, Tensor], seconds: float, waited: float) -> None:
        """Notes a step: what it was of, this process's share of each term, how long it took and waited for its data."""
        for name, value in terms.items():
            if name != "loss":
                self._terms.setdefault(name, []).append(value)
        self._counts["mentions"] += len(batch.names)
        self._counts["candidates"] += batch.candidates
        self._counts["entities"] += len(batch.entity_ids)
        self._counts["seconds"] += seconds
        self._counts["waited"] += waited

    def write(self, step: int, learning_rate: float) -> None:
        """Writes what was counted since the last time, after ``step`` steps; the learning rate is the towers'."""
        names = sorted(self._terms)
        losses = total(torch.stack([torch.stack(self._terms[name]).sum() for name in names])).tolist()
        counts = total(torch.tensor(list(self._counts.values()), device=self._accelerator.device)).tolist()
        mentions, candidates, entities, busy, waited = counts
        seconds = (busy + waited) / self._accelerator.num_processes
        steps = len(self._terms["total"])
        entry = {"step": step} | {f"loss/{name}": loss / steps for name, loss in zip(names, losses, strict=True)}
        entry |= {
            "learning_rate": learning_rate,
            "mentions_per_second": mentions / seconds,
            "candidates_per_entity": candidates / entities,
            "waiting_for_data": waited / (busy + waited),
            "peak_memory_gb": _peak_memory(self._accelerator.device) / 1e9,
        }
        self._append(entry)
        self._clear()

    def validation(self, entry: dict[str, float]) -> None:
        """Writes what a validation run showed, and draws the plot anew."""
        self._append({"step": entry["step"], "validation_mrr": entry["validation_mrr"]})
        if self._accelerator.is_main_process:
            plot_log(read_log(self._folder), self._folder / PLOT)

    def _append(self, entry: dict[str, Any]) -> None:
        if self._accelerator.is_main_process:
            with (self._folder / LINES).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        self._accelerator.log({name: value for name, value in entry.items() if name != "step"}, step=int(entry["step"]))


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's log, in their order; a last one that was cut off by a kill is left out."""
    if not (folder / LINES).is_file():
        return []
    lines = (folder / LINES).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def plot_log(entries: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the terms of the loss, the validation MRR and the learning rate over steps.

    Args:
        entries: What `read_log` returns.
        path: The PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1))
    names = sorted({name for entry in entries for name in entry if name.startswith("loss/")})
    curves = [
        (losses, name, name.removeprefix("loss/")) for name in sorted(names, key=lambda name: name != "loss/total")
    ]
    curves += [(middle, "validation_mrr", "validation MRR"), (lower, "learning_rate", "learning rate")]
    for axes, name, label in curves:
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        if points:
            marker = "o" if name == "validation_mrr" else None
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3, linewidth=1.2)
    for axes, label in ((losses, "loss"), (middle, "validation MRR"), (lower, "learning rate")):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if names:
        losses.legend(fontsize="small", frameon=False)
    lower.set_xlabel("step")
    figure.savefig(path, dpi=120)


def _total_first(name: str) -> tuple[bool, str]:
    return name != "loss/total", name


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the accelerator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
