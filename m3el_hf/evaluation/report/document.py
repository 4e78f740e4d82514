"""What a report says: figures with what they are of, examples, notes, and where all of it comes from."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from m3el_hf.errors import M3ELError

if TYPE_CHECKING:
    from rich.console import Group

SHARE, POINTS = "%", "points"
"""The units of a share and of a difference of shares: kept as 0 to 1, shown in percent."""

SHARES = (SHARE, POINTS)


@dataclass(frozen=True)
class Estimate:
    """A figure with what is known of its error.

    Attributes:
        value: A share 0 to 1 where the column's unit is ``"%"``, a difference of shares where it is ``"points"``, else
            a plain number.
        low: The lower end of its 95 % interval, or None where none was computed.
        high: The upper end, or None with ``low``.
        n: The rows it is of, or None where rows make no sense.
        deviation: The standard deviation over seeds, None for a single one.

    Raises:
        M3ELError: If one of them is no finite number, or there is half an interval.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    deviation: float | None = None

    def __post_init__(self) -> None:
        for number in (self.value, self.low, self.high, self.deviation):
            _check_finite(number)
        if (self.low is None) != (self.high is None):
            raise M3ELError(f"an interval has two ends, got {self.low} and {self.high}: give both, or neither")


Value = Estimate | str | int | float | None
"""What a cell holds; None says that it does not apply, and shows as a dash."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: The heading, and the key in JSON and CSV.
        unit: ``"%"`` for shares, ``"points"`` for their differences; any other (``"rank"``, ``"s"``) is shown beside
            the heading; empty for none.
        is_strong: Whether it is the system that the report is about, which is highlighted.
    """

    name: str
    unit: str = ""
    is_strong: bool = False


@dataclass(frozen=True)
class Setting:
    """What every figure carries: how it was measured.

    Attributes:
        split: The rows' split.
        protocol: Among what the gold was sought, and what was done to the rows: ``"candidate set, as released"``.
        ties: How equal scores count: ``"expected rank"``.
        seed: The seed, or the seeds.
    """

    split: str
    protocol: str
    ties: str
    seed: str

    def line(self) -> str:
        """All of it in one line.

        Example:
            >>> Setting("test", "candidate set, as released", "expected rank", "0").line()
            'test · candidate set, as released · ties: expected rank · seed 0'
        """
        return f"{self.split} · {self.protocol} · ties: {self.ties} · seed {self.seed}"


@dataclass(frozen=True)
class DataTable:
    """Figures by row and column.

    Attributes:
        key: Unique in a report: its anchor and the name of its chart's file.
        title: The heading.
        about: What is measured, in one or two sentences.
        setting: How it was measured; stands under the table and in every row of the CSV.
        columns: The first names the row.
        rows: One value a column.
        tags: Of each row, what filters look at: ``{"task": "t2t", "topic": "person", "system": "BM25"}``. A row
            without a tag is of all of them. Empty where no row has any.
        chart: How the same figures are drawn, if at all: a series a column of estimates, of those that have the unit of
            the first of them. The first column's numbers are the x of lines, or its texts in their order.
        chance: Drawn as a line in bars and lines, in place of a column of that name.
        summary_rows: So many of the last rows are means: set apart, and not sorted among the others.

    Raises:
        M3ELError: If rows, columns and tags do not fit each other, a number is not finite, or the key is no file name.
    """

    key: str
    title: str
    about: str
    setting: Setting
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    tags: tuple[Mapping[str, str], ...] = ()
    chart: Literal["bars", "lines", "heatmap"] | None = None
    chance: float | None = None
    summary_rows: int = 0

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.key):
            raise M3ELError(f"table {self.key!r}: make its key of letters, digits, - and _, as it names a file")
        if not names or len(set(names)) != len(names):
            raise M3ELError(f"table {self.key!r}: give it columns of different names, got {names}")
        for row in self.rows:
            if len(row) != len(names):
                raise M3ELError(f"table {self.key!r}: the row {row[:1]} has {len(row)} of {len(names)} values")
            for value in row:
                if isinstance(value, float):
                    _check_finite(value)
        if self.tags and len(self.tags) != len(self.rows):
            raise M3ELError(f"table {self.key!r}: {len(self.tags)} tags for {len(self.rows)} rows; give one a row")
        if not 0 <= self.summary_rows <= len(self.rows):
            raise M3ELError(f"table {self.key!r}: {self.summary_rows} of its {len(self.rows)} rows cannot be means")

    @property
    def body(self) -> tuple[tuple[Value, ...], ...]:
        """The rows that are no means."""
        return self.rows[: len(self.rows) - self.summary_rows]


@dataclass(frozen=True)
class Candidate:
    """What a mention could mean.

    Attributes:
        name: Its name.
        description: Its description, or None.
        score: The system's score.
        is_gold: Whether it is what the mention means.
        picture: Its encoded picture (PNG, JPEG, GIF or WebP), or None.
    """

    name: str
    description: str | None
    score: float
    is_gold: bool
    picture: bytes | None


@dataclass(frozen=True)
class Example:
    """One mention as a system linked it.

    Attributes:
        task: The task.
        topic: The topic.
        system: The system.
        mention: Its name.
        context: Its sentence, or None.
        picture: Its encoded picture (PNG, JPEG, GIF or WebP), or None.
        candidates: From best to worst.
        remark: What there is to see: ``"the gold is 3rd of 4"``.
    """

    task: str
    topic: str
    system: str
    mention: str
    context: str | None
    picture: bytes | None
    candidates: tuple[Candidate, ...]
    remark: str = ""


@dataclass(frozen=True)
class Report:
    """The report of an evaluation or an experiment.

    Attributes:
        title: The heading.
        question: What an experiment asks.
        answers: Sentences with their figures; where an effect is within noise they say so.
        tables: The figures.
        examples: Mentions to look at.
        notes: What is to be read with the figures.
        provenance: Where they come from, by name: data, seeds, versions, ...

    Raises:
        M3ELError: If two tables have the same key.
    """

    title: str
    question: str = ""
    answers: tuple[str, ...] = ()
    tables: tuple[DataTable, ...] = ()
    examples: tuple[Example, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = [table.key for table in self.tables]
        if len({key.lower() for key in keys}) != len(keys):  # files of different case may be one file
            raise M3ELError(f"tables of a report need keys that differ, got {', '.join(keys)}")

    # What writes it is imported where it is used: it needs the classes above, and matplotlib takes its time.

    def to_html(self) -> str:
        """One page that needs no other file and no network."""
        from m3el_hf.evaluation.report.page import page

        return page(self)

    def to_markdown(self, level: int = 1) -> str:
        """All but the examples, for a card; ``level`` is that of the title, tables' are one below."""
        from m3el_hf.evaluation.report.tables import markdown

        return markdown(self, level)

    def to_latex(self) -> str:
        """The tables for a paper that uses ``booktabs``; other letters than Latin ones need XeLaTeX or LuaLaTeX."""
        from m3el_hf.evaluation.report.tables import latex

        return latex(self)

    def to_csv(self) -> str:
        """One row a cell, unrounded."""
        from m3el_hf.evaluation.report.tables import csv_text

        return csv_text(self)

    def to_json(self) -> str:
        """Everything but pictures, unrounded."""
        from m3el_hf.evaluation.report.tables import json_text

        return json_text(self)

    def to_rich(self) -> Group:
        """The answers and the first table for a terminal of 80 columns."""
        from m3el_hf.evaluation.report.tables import rich_group

        return rich_group(self)

    def save(self, folder: Path) -> None:
        """Writes ``report.html``, ``report.md``, ``results.json``, ``results.csv``, ``tables.tex`` and the charts.

        A table with a chart gets ``chart-<key>.png``; charts of an earlier report in the folder are removed.
        """
        from m3el_hf.evaluation.report.charts import png

        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("chart-*.png"):
            old.unlink()
        for table in self.tables:
            if table.chart:
                (folder / f"chart-{table.key}.png").write_bytes(png(table))
        texts = {
            "report.html": self.to_html(),
            "report.md": self.to_markdown(),
            "results.json": self.to_json(),
            "results.csv": self.to_csv(),
            "tables.tex": self.to_latex(),
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8", newline="")  # a CSV has line ends of its own


def software() -> dict[str, str]:
    """The versions that a figure depends on."""
    packages = ("m3el-hf", "torch", "transformers", "datasets", "accelerate", "peft", "evaluate", "pillow")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def _check_finite(number: float | None) -> None:
    if number is not None and not math.isfinite(number):
        raise M3ELError(f"{number} is no figure: give None where there is none")
