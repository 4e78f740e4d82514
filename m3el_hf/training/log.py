"""What a run writes down: losses, rates and memory by step, as lines and as a plot."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.checkpoints import PARTIAL
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
        self._lines = 0
        self._clear()
        if arguments.report_to != "none":
            accelerator.init_trackers("m3el_hf", config=arguments.to_dict())

    def _clear(self) -> None:
        self._terms: dict[str, tuple[Tensor, int]] = {}  # this process's share of the sum over steps; how many had it
        self._counts = dict.fromkeys(("mentions", "candidates", "entities", "seconds", "waited"), 0.0)

    @property
    def is_empty(self) -> bool:
        """Whether all that was counted is written."""
        return not self._terms

    def state(self) -> dict[str, Any]:
        """What the log is continued with: how many lines it has, and what was counted since the last."""
        terms, counts = self._totals()
        return {"lines": self._lines, "terms": terms, "counts": counts}

    def start(self, state: dict[str, Any] | None) -> None:
        """Begins anew, or goes on from a `state`: lines that were written after it are left out."""
        lines = read_log(self._folder)[: state["lines"] if state else 0]
        self._lines = len(lines)
        is_main, device = self._accelerator.is_main_process, self._accelerator.device
        if state:  # all have the same terms, whose sums pair up; the main process has what all had counted
            self._terms = {
                name: (torch.tensor(one * is_main, device=device), n) for name, (one, n) in state["terms"].items()
            }
            self._counts = {name: count * is_main for name, count in state["counts"].items()}
        if not is_main:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        new = self._folder / f"{LINES}{PARTIAL}"
        new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(new, self._folder / LINES)

    def count(self, batch: TrainingBatch, terms: dict[str, Tensor], seconds: float, waited: float) -> None:
        """Notes a step: what it was of, this process's share of each term, how long it took and waited for its data."""
        for name, value in terms.items():
            summed, steps = self._terms.get(name, (0, 0))
            self._terms[name] = summed + value.detach().float(), steps + 1
        self._counts["mentions"] += len(batch.names)
        self._counts["candidates"] += batch.candidates
        self._counts["entities"] += len(batch.entity_ids)
        self._counts["seconds"] += seconds
        self._counts["waited"] += waited

    def _totals(self) -> tuple[dict[str, tuple[float, int]], dict[str, float]]:
        """Sums over processes: of each term, with the steps that had it, and of the counts."""
        device = self._accelerator.device
        names = sorted(self._terms)
        numbers = [torch.as_tensor(self._terms[name][0], device=device) for name in names]
        numbers += [torch.tensor(count, dtype=torch.float32, device=device) for count in self._counts.values()]
        sums = total(torch.stack(numbers)).tolist()
        terms = {name: (one, self._terms[name][1]) for name, one in zip(names, sums, strict=False)}
        return terms, dict(zip(self._counts, sums[len(names) :], strict=True))

    def write(self, step: int, learning_rate: float) -> None:
        """Writes what was counted since the last time, after ``step`` steps; the learning rate is the towers'.

        ``loss`` is the mean of what the steps minimised and ``loss/NAME`` that of a term, over the steps that had it.
        """
        terms, counts = self._totals()
        busy, waited = counts["seconds"], counts["waited"]
        entry = {"step": step} | {name: summed / steps for name, (summed, steps) in terms.items()}
        entry |= {
            "learning_rate": learning_rate,
            "mentions_per_second": counts["mentions"] * self._accelerator.num_processes / (busy + waited),
            "candidates_per_entity": counts["candidates"] / counts["entities"],
            "waiting_for_data": waited / (busy + waited),
            "peak_memory_gb": _peak_memory(self._accelerator.device) / 1e9,
        }
        self._append(entry)
        self._clear()

    def validation(self, entry: dict[str, float]) -> None:
        """Writes what a validation run showed, and draws the plot anew."""
        self._append({"step": entry["step"], "validation_mrr": entry["validation_mrr"]})
        self.plot()

    def plot(self) -> None:
        """Draws all that was written until now."""
        if self._accelerator.is_main_process:
            plot_log(read_log(self._folder), self._folder / PLOT)

    def _append(self, entry: dict[str, Any]) -> None:
        self._lines += 1
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

    figure = Figure(figsize=(8, 7), layout="constrained")
    losses, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1))
    names = sorted({name for entry in entries for name in entry if name.startswith("loss")})
    for name in names:
        steps, values = _curve(entries, name)
        style: dict[str, Any] = {"color": "black", "linewidth": 2, "zorder": 3} if name == "loss" else {"linewidth": 1}
        style |= {"marker": "."} if len(steps) == 1 else {}  # a line of one point shows nothing
        losses.plot(steps, values, label=name.removeprefix("loss/").replace("_", " "), **style)
    steps, values = _curve(entries, "validation_mrr")
    middle.plot(steps, values, marker="o", markersize=3, linewidth=1.2)
    if values:
        best = max(range(len(values)), key=values.__getitem__)
        middle.plot(
            steps[best], values[best], marker="o", color="C3", linestyle="none", label=f"best {values[best]:.3f}"
        )
        middle.legend(fontsize="small", frameon=False, loc="best")
    steps, values = _curve(entries, "learning_rate")
    lower.plot(steps, values, linewidth=1.2, marker="." if len(steps) == 1 else None)
    for axes, label in ((losses, "loss"), (middle, "validation MRR"), (lower, "learning rate")):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if names:
        losses.legend(fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    lower.set_xlabel("step")
    lower.set_ylim(bottom=0)
    figure.align_ylabels()
    new = path.with_name(path.name + PARTIAL)
    figure.savefig(new, format="png", dpi=120)
    os.replace(new, path)


def _curve(entries: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """The steps at which something was written, and its values."""
    points = [(entry["step"], entry[name]) for entry in entries if name in entry]
    return [step for step, _ in points], [value for _, value in points]


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the accelerator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
