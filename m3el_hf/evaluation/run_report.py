"""One table of figures for the terminal, a bar chart, an HTML page, Markdown for the card, JSON for machines."""

from __future__ import annotations

import base64
import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from rich import box
from rich.table import Table as RichTable

from m3el_hf.evaluation.evaluator import Table
from m3el_hf.tasks import get_task

NOT_APPLICABLE = "–"

COLOURS = ("#9aa0a6", "#e8a33d", "#8b6fb8", "#b9cfe4", "#1f6fb2", "#d9534f")
"""One a system, in the table's order; the fifth, the trained model, is the strongest."""


@dataclass(frozen=True)
class Example:
    """One linked mention: what was asked, and the candidates from best to worst.

    Attributes:
        mention: Its name.
        context: Its sentence, or None.
        picture: Its encoded picture, or None.
        candidates: For each: name, description, score, whether it is the gold, and the encoded picture or None.
    """

    mention: str
    context: str | None
    picture: bytes | None
    candidates: list[tuple[str | None, str | None, float, bool, bytes | None]]


@dataclass(frozen=True)
class RunReport:
    """All that a run's outputs show.

    Attributes:
        title: The heading.
        table: The figures.
        provenance: Where they come from, by name: data, split, seed, versions, ...
        notes: Lines that must be read with the table.
        example: One linked mention, or None.
    """

    title: str
    table: Table
    provenance: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    example: Example | None = None

    @property
    def systems(self) -> list[str]:
        """The systems, in the order in which they were measured."""
        return list(self.table.cells)

    def rows(self) -> list[list[str]]:
        """The table as text: task, one accuracy in percent a system, n; last the mean over the evaluable tasks."""
        rows = []
        for task, count in self.table.evaluable.items():
            if count:
                cells = [_percent(self.table.cells[system].get(task, {}).get("accuracy")) for system in self.systems]
                rows.append([task, *cells, str(count)])
            else:
                missing = "0 images" if get_task(task).needs_images else "0 texts"
                rows.append([task, f"not evaluable, {missing}", *[""] * (len(self.systems) - 1), "0"])
        mean = [_percent(self.table.mean(system)) for system in self.systems]
        return [*rows, ["mean", *mean, ""]]

    def interval(self, system: str, task: str) -> tuple[float, float] | None:
        """The 95 % interval of an accuracy in percent, or None where there is none."""
        cell = self.table.cells[system].get(task)
        return None if cell is None else (100 * cell["accuracy_low"], 100 * cell["accuracy_high"])

    def to_rich(self) -> RichTable:
        """The table for a terminal."""
        caption = ["accuracy in %; ties count as chance"]
        table = RichTable(title=self.title, box=box.SIMPLE_HEAD, pad_edge=False)
        *tasks, mean = self.rows()
        for column, name in enumerate(["task", *self.systems, "n"]):
            # A header breaks at every space, so that the table fits 80 columns and nothing is cut.
            table.add_column(name.replace(" ", "\n"), justify="right" if column else "left", no_wrap=True)
        for task, *cells in tasks:
            if self.table.evaluable[task]:
                table.add_row(task, *cells)
            else:  # its reason is too long for a narrow column
                caption.append(f"{task}: {cells[0]}")
        table.add_section()
        table.add_row(*mean, style="bold")
        table.caption = "\n".join(caption)
        return table

    def to_markdown(self) -> str:
        """The table for a card."""
        lines = [["task", *self.systems, "n"], ["---", *["---:"] * (len(self.systems) + 1)], *self.rows()]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def save(self, folder: Path) -> None:
        """Writes ``report.html``, ``chart.png`` and ``results.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        self.chart().savefig(folder / "chart.png", dpi=150)
        (folder / "report.html").write_text(self._html((folder / "chart.png").read_bytes()), encoding="utf-8")
        results = {"title": self.title, **asdict(self.table), "notes": self.notes, "provenance": self.provenance}
        (folder / "results.json").write_text(json.dumps(results, indent=2, default=str), encoding="utf-8")

    def chart(self) -> Figure:
        """Accuracy by task and system, with 95 % intervals; chance as a line."""
        tasks = [task for task, count in self.table.evaluable.items() if count]
        systems = [system for system in self.systems if system != "chance"]
        figure = Figure(figsize=(max(6.0, 1.25 * len(tasks)), 4.4), layout="constrained")
        axes = figure.subplots()
        width = 0.84 / max(1, len(systems))
        for number, system in enumerate(systems):
            for position, task in enumerate(tasks):
                interval = self.interval(system, task)
                if interval is not None:
                    value = 100 * self.table.cells[system][task]["accuracy"]
                    axes.bar(
                        position + (number - (len(systems) - 1) / 2) * width,
                        value,
                        0.92 * width,
                        color=COLOURS[self.systems.index(system) % len(COLOURS)],
                        label=system if system not in axes.get_legend_handles_labels()[1] else None,
                        yerr=[[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]],
                        error_kw={"elinewidth": 0.8, "alpha": 0.6},
                    )
        if "chance" in self.systems and tasks:
            chance = 100 * self.table.cells["chance"][tasks[0]]["accuracy"]
            axes.axhline(chance, color="black", linewidth=1, linestyle="--", label=f"chance ({chance:.1f} %)")
        axes.set_xticks(range(len(tasks)), tasks)
        axes.set_ylim(0, 100)
        axes.set_ylabel("accuracy in %, 95 % intervals")
        axes.set_title(self.title, loc="left", parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize="small")
        return figure

    def _html(self, chart: bytes) -> str:
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        environment.filters["data_url"] = _data_url
        template = files("m3el_hf.evaluation").joinpath("run_report.html.jinja").read_text(encoding="utf-8")
        return environment.from_string(template).render(report=self, chart=chart, rows=self.rows())


def software() -> dict[str, str]:
    """The versions that a figure depends on."""
    packages = ("m3el-hf", "torch", "transformers", "datasets", "accelerate", "peft", "evaluate", "pillow")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def _percent(share: float | None) -> str:
    return NOT_APPLICABLE if share is None else f"{100 * share:.1f}"


def _data_url(picture: bytes) -> str:
    kind = "jpeg" if picture.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
